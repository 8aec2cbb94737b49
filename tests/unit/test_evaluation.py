"""Rates of held-out sets by hand, and the held-out loss against that of training."""

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.packing import size_of
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.evaluation.held_out_loss import make_losses
from megatron_sr1.evaluation.results import set_rates, verdicts_of
from megatron_sr1.rewards.agreement import JUDGED
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples, make_processor
from megatron_sr1.trainer.sft import token_loss
from megatron_sr1.trainer.step import update
from tests.checkpoint_run import make_run


def row(index, sample, answer, accuracy):
    return {"index": index, "sample": sample, "answer": answer, "accuracy": accuracy}


def test_rates_of_several_responses_are_mean_pass_and_majority():
    rows = [row(0, i, a, r) for i, (a, r) in enumerate([("7", 1), ("$7$", 1), ("3", 0)])]
    rows += [row(1, i, a, r) for i, (a, r) in enumerate([("1", 0), ("2", 1), ("1.", 0)])]
    rows += [row(2, i, a, r) for i, (a, r) in enumerate([(None, 0), (None, 0), ("5", 1)])]
    rows += [row(3, i, a, r) for i, (a, r) in enumerate([("4", 0), ("5", 0), ("6", 0)])]
    rates = set_rates(rows)
    assert rates["accuracy"] == pytest.approx(4 / 12) and rates["questions"] == 4
    assert (rates["pass@3"], rates["majority@3"]) == (3 / 4, 1 / 4)


def test_one_response_to_a_question_has_an_accuracy_alone():
    rates = set_rates([row(0, 0, "7", 1), row(1, 0, None, 0)])
    assert rates == {"accuracy": 0.5, "questions": 2}
    assert set_rates([]) == {"questions": 0}


def test_rates_of_a_judged_set_say_how_it_was_judged():
    lines = [row(0, 0, "7", 1), row(1, 0, "8", 0), row(2, 0, "9", 0)]
    judged = [(None, None, 1), (1, None, 1), (None, "HTTP 500", 0)]
    lines = [
        line | dict(zip(JUDGED, more, strict=True))
        for line, more in zip(lines, judged, strict=True)
    ]
    rates = set_rates([verdicts_of(line | {"response": "long"}) for line in lines])
    expected = {"accuracy": 1 / 3, "accuracy_judged": 2 / 3, "judged": 1, "unjudged": 1}
    assert rates == {**expected, "questions": 3}


def test_the_held_out_loss_of_the_training_set_is_the_training_loss(tiny_model, groups, tmp_path):
    shards = make_digits(tmp_path, 1, num_train=2, num_eval=2, num_cold_start=14)
    config = load_config(
        "examples/digits_cpu.yaml",
        [
            *("stage=sft", f"model.path={tiny_model}", f"output={tmp_path / 'run'}"),
            *(f"data.train={shards['cold_start']}", "data.max_prompt_tokens=40"),
            *("evaluation.sets=", f"evaluation.sets.same.path={shards['cold_start']}"),
            *(f"evaluation.sets.asked.path={shards['eval']}", "evaluation.chunk_prompts=5"),
        ],
    )
    context, actor = Context(config, groups, 14), make_run(tiny_model, groups)
    samples = Samples(config, config.data.train, make_processor(config))
    context.skipped = 3
    (loss,) = make_losses(context, actor, samples.processor)  # questions have no loss
    found = loss.evaluate()
    read = context.read_usable(samples.conversation, range(14), True)
    context.count_skipped()
    assert loss.name == "same" and 0 < found["skipped"] == 14 - len(read) < 14
    assert context.skipped == 3 + found["skipped"], "the evaluation's count is its own"
    assert len({size_of(sample).tokens for sample in read}) > 1
    expected = update(actor, samples.pack(read, groups), token_loss, temperature=1.0)["loss"]
    assert found["loss"] == pytest.approx(expected, rel=1e-6) and expected > 1
