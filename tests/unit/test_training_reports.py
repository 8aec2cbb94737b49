"""What other trainers' bug reports describe and what holds here: seeds, targets, epochs, saves.

The sources are named in the tests.
"""

import itertools

import pytest

from megatron_sr1.checkpoint.folders import latest_step, steps
from megatron_sr1.config.loading import load_config
from megatron_sr1.data.loader import Loader
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import DataError
from megatron_sr1.records import Example, Message
from megatron_sr1.runtime import signals
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer.context import Context
from tests.checkpoint_run import make_run

pytestmark = pytest.mark.field


def test_no_two_requests_of_a_few_steps_have_the_same_seed():
    """verl-project/verl#6857: equal seeds make a group's responses equal."""
    steps_, indices, samples, parts = range(4), range(12), range(16), range(1, 4)
    asked = list(itertools.product(steps_, indices, samples, parts))
    seeds = {request_seed(1, *one) for one in asked}
    assert len(seeds) == len(asked)
    assert request_seed(1, *asked[7]) in seeds and request_seed(2, *asked[7]) not in seeds


QUOTED = 'What does "<|im_start|>assistant\nyes<|im_end|>" mean?'


def conversation(processor, *, max_tokens=None):
    turns = [("user", QUOTED), ("assistant", "A turn."), ("user", "<image>And"), ("assistant", "7")]
    messages = tuple(Message(role, text) for role, text in turns)
    example = Example(3, "k", "s.tar", messages, "", 1)
    return processor.encode_conversation(example, ((1, 2, 2),), max_tokens=max_tokens)


def test_targets_are_the_answers_and_their_ends_however_a_question_quotes_them(tiny_model):
    """verl-project/verl#3287, NVIDIA-NeMo/Megatron-Bridge#4169, #5217, #5737."""
    processor = Processor(tiny_model, 784, 50176)
    sample = conversation(processor)
    decode = processor.tokenizer.decode
    assert decode(sample.token_ids[sample.loss_mask]) == "A turn.<|im_end|>7<|im_end|>"
    (end,) = processor.end_token_ids
    assert (sample.token_ids == end).sum() == 4  # of the turns; a quoted one is characters
    length = len(sample.token_ids)
    assert len(conversation(processor, max_tokens=length).token_ids) == length
    with pytest.raises(DataError, match=f"{length} tokens, limit {length - 1}"):
        conversation(processor, max_tokens=length - 1)


@pytest.mark.parametrize("per_step", [8, 5])
def test_a_run_that_was_stopped_at_an_epochs_end_begins_the_next(per_step):
    """verl-project/verl#5725: the loader was exhausted, and the resumed run ended at once."""
    whole, first = Loader([32], per_step, seed=3), Loader([32], per_step, seed=3)
    stop = -(-32 // per_step)  # the step that ends the epoch, or goes over its end
    expected = [whole.next_step() for _ in range(3 * stop)]
    drawn = [first.next_step() for _ in range(stop)]
    again = Loader([32], per_step, seed=3)
    again.load_state_dict(first.state_dict())
    drawn += [again.next_step() for _ in range(2 * stop)]
    assert drawn == expected
    order = list(itertools.chain(*drawn))
    for epoch in range(2):
        assert sorted(order[32 * epoch : 32 * (epoch + 1)]) == list(range(32))


def context_of(tiny_model, groups, output):
    config = load_config(
        None,
        [
            *(
                f"model.path={tiny_model}",
                "data.train=x",
                "evaluation.sets.a.path=x",
                f"output={output}",
            ),
            *("checkpoint.keep_last=1", "checkpoint.keep_best=1", "algorithm.filter_groups=true"),
            *("optimizer.num_steps=5", "checkpoint.every_steps=2"),
        ],
    )
    context, actor = Context(config, groups, 8), make_run(tiny_model, groups)
    context.start(actor)
    return context, actor


def test_the_last_step_is_saved_and_unrated_or_removed_checkpoints_leave_the_best(
    tiny_model, groups, tmp_path, monkeypatch
):
    """verl-project/verl#2619: the last step of dynamic sampling was not saved. NVIDIA-NeMo/RL#1229,
    modelscope/FunASR#3455, NVIDIA-NeMo/Speech#12804: keeping the best met unrated ones."""

    def go_on(context, actor, until, rating):
        while context.step < until:
            context.finish_step({}, actor, lambda is_last: {"a": {"accuracy": rating}})

    context, actor = context_of(tiny_model, groups, tmp_path)
    go_on(context, actor, 2, rating=0.9)
    monkeypatch.setattr(signals, "stop_requested", lambda: True)
    go_on(context, actor, 3, rating=0.0)  # saved, as it was asked to leave, without a rating
    monkeypatch.setattr(signals, "stop_requested", lambda: False)
    context.close()
    assert context.is_leaving and steps(context.checkpoints) == [2, 3]

    newest = context.checkpoints / "step_3"
    newest.rename(tmp_path / "removed")
    (context.checkpoints / "latest").write_text("step_2\n")
    context, actor = context_of(tiny_model, groups, tmp_path)
    assert context.step == 2
    go_on(context, actor, 5, rating=0.5)
    context.close()
    assert steps(context.checkpoints) == [2, 5] and latest_step(context.checkpoints) == 5
