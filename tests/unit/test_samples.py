"""A rollout as a sequence to learn from: which tokens carry which advantage."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.examples import Record
from megatron_sr1.data.packing import size_of
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.shards import write_shards
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.errors import DataError
from megatron_sr1.records import Completion, Message, Rollout
from megatron_sr1.rewards.response import find_description
from megatron_sr1.trainer.grpo import own_samples
from megatron_sr1.trainer.rollouts import Drawn, Entry, follow_up
from megatron_sr1.trainer.samples import Samples
from tests.hostile.mutations import picture


@pytest.fixture(scope="module")
def samples(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    shards = make_digits(folder, 1, num_train=2, num_eval=1, num_cold_start=1)
    options = [
        "data.pass1_template=brief",
        "data.pass2_template=brief",
        "data.max_prompt_tokens=200",
    ]
    config = load_config(None, [f"model.path={tiny_model}", "data.train=x", *options])
    return Samples(config, shards["train"], Processor(tiny_model, 784, 200704))


def rolled_out(samples, text):
    processor = samples.processor
    ids = (*processor.tokenizer.encode(text), processor.end_token_ids[0])
    completion = Completion(ids, (-0.5,) * len(ids), text, "stop")
    prompt = samples.prompt(0)
    description = find_description(text)
    return Rollout(0, 0, prompt.token_ids, completion, description, None, 0), prompt.token_ids


DESCRIBED = "<description>3 8 1</description>"
REST = "<think>3 + 8</think>\\boxed{11}"


def test_by_span_the_description_has_the_visual_advantage_and_the_rest_the_answers(samples):
    rollout, prompt = rolled_out(samples, DESCRIBED + REST)
    got = samples.advantages(rollout, 2.0, -3.0)[len(prompt) :]
    pieces = samples.processor.pieces(rollout.completion.token_ids)
    assert set(got.tolist()) == {2.0, -3.0}
    marked = "".join(p for p, a in zip(pieces, got, strict=True) if a == -3.0)
    # A token that the closing mark shares with what follows is the description's.
    assert marked.startswith(DESCRIBED) and len(marked) - len(DESCRIBED) <= 1
    assert np.flatnonzero(got == -3.0).tolist() == list(range(int((got == -3.0).sum())))
    assert got[-1] == 2.0


@pytest.mark.parametrize(
    ("text", "description_advantage"), [(DESCRIBED + REST, None), (REST, -3.0), ("", -3.0)]
)
def test_else_all_response_tokens_have_one(samples, text, description_advantage):
    rollout, prompt = rolled_out(samples, text)
    got = samples.advantages(rollout, 2.0, description_advantage)
    assert got.dtype == np.float32
    expected = [0.0] * len(prompt) + [2.0] * len(rollout.completion.token_ids)
    assert got.tolist() == expected
    assert samples.train_sample(rollout).loss_mask.tolist() == [a == 2.0 for a in expected]


def test_a_description_that_is_not_one_gets_no_advantage_of_its_own(samples):
    rollout, prompt = rolled_out(samples, "<think>x</think>" + DESCRIBED)
    assert rollout.description is None
    got = samples.advantages(rollout, 2.0, -3.0)[len(prompt) :]
    assert set(got.tolist()) == {2.0}


def test_a_prompt_that_is_too_long_is_named(samples, monkeypatch):
    monkeypatch.setattr(samples._config.data, "max_prompt_tokens", 3)
    samples.forget()
    with pytest.raises(DataError, match=r"tar sample 000000001: prompt of \d+ tokens, at most 3"):
        samples.prompt(1)


@pytest.mark.parametrize(
    ("turns", "num_images", "read", "reason"),
    [
        (["q"], 0, "prompt", "no gold answer"),
        (["q"], 0, "conversation", "no assistant turn"),
        (["q", "a"], 0, "conversation", r"\d+ tokens, limit 3"),
        (["<image>q"], 1, "prompt", "1 image places in the prompt, 2 images"),
        (["<image>q", "a"], 1, "conversation", "1 image places in the prompt, 2 images"),
    ],
)
def test_a_fault_of_a_sample_is_named_by_its_shard_and_key(
    samples, tmp_path, monkeypatch, turns, num_images, read, reason
):
    roles = ("user", "assistant")
    messages = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    answer, images = "7" if num_images else None, (picture("PNG", size=(28, 28)),) * num_images
    write_shards([Record(messages, answer, images)], tmp_path)
    paths = ["model.path=x", "data.train=x", "data.max_prompt_tokens=3"]
    broken = Samples(load_config(None, paths), tmp_path, samples.processor)
    if reason.endswith("2 images"):  # more than the shard's text has marks for
        images = broken.reader.images
        monkeypatch.setattr(broken.reader, "images", lambda index: images(index) * 2)
    with pytest.raises(DataError, match=rf"tar sample 000000000: {reason}"):
        getattr(broken, read)(0)


@pytest.fixture
def picky(tiny_model, tmp_path):
    """Samples whose chat template fails on a word."""
    words = (
        "{% if 'bad' in messages[0]['content'] | string %}{{ raise_exception('no') }}{% endif %}"
    )
    template = tmp_path / "chat.jinja"
    template.write_text(words + str(Processor(tiny_model)._template))
    shards = make_digits(tmp_path, 1, num_train=2, num_eval=1, num_cold_start=1)
    options = ["data.train=x", "data.pass1_template=brief", "data.pass2_template=brief"]
    config = load_config(None, [f"model.path={tiny_model}", *options])
    processor = Processor(tiny_model, 784, 200704, str(template))
    return Samples(config, shards["train"], processor)


def test_of_several_readings_the_one_that_fails_is_named(picky):
    asked = [(picky.prompt(index), text) for index, text in ((0, "good"), (1, "bad"), (0, "fine"))]
    with pytest.raises(DataError, match=r"tar sample 000000001: pass 2: .*chat template fails.*no"):
        picky.reading_prompts(asked)
    good, fine = picky.reading_prompts([asked[0], asked[2]])
    assert good == picky.reading_prompts(asked[:1])[0] != fine


def test_prompts_encoded_together_are_the_same(samples, monkeypatch):
    samples.forget()
    alone = [samples.prompt(index) for index in (0, 1)]
    samples.forget()
    samples.prepare([0, 1])
    monkeypatch.setattr(samples.processor, "encode_prompt", None)
    for index in (0, 1):
        assert samples.prompt(index).token_ids == alone[index].token_ids
        assert samples.prompt(index).image_grid_thw == alone[index].image_grid_thw


def test_of_several_prompts_the_one_that_fails_is_named(picky, monkeypatch):
    alone = picky.prompt(0).token_ids
    picky.forget()
    messages, text = picky.prompts.pass1_messages, [{"type": "text", "text": "bad"}]

    def asked(example):
        (message,) = messages(example)
        return [message if example.index == 0 else {**message, "content": text}]

    monkeypatch.setattr(picky.prompts, "pass1_messages", asked)
    picky.prepare([0, 1])
    assert picky.prompt(0).token_ids == alone
    with pytest.raises(DataError, match=r"tar sample 000000001: .*chat template fails.*no"):
        picky.prompt(1)


def test_pixels_that_were_read_ahead_for_a_sample_without_a_prompt_are_not_kept(picky, monkeypatch):
    monkeypatch.setattr(picky.prompts, "pass1_messages", lambda example: 1 / 0)
    picky.pixels.start([0, 1])
    for index in (0, 1):
        with pytest.raises(ZeroDivisionError):
            picky.prompt(index)
    picky.forget()
    assert not picky.pixels.started and not picky.pixels._held


def test_a_rollouts_size_is_that_of_its_sequence(samples):
    rollout, _ = rolled_out(samples, DESCRIBED)
    size = samples.size(rollout, home=1)
    expected = size_of(samples.train_sample(rollout), share_prompts=True)
    assert size == expected._replace(home=1)
    assert size.shared == len(rollout.prompt_token_ids)
    assert size.patches == 12  # 84 x 28 pixels


def test_a_sequence_made_while_others_were_sampled_is_learned_and_others_are_made(samples):
    made_early, _ = rolled_out(samples, DESCRIBED + REST)
    held = {rollout.key: rollout for rollout in (made_early, replace(made_early, sample=1))}
    sequences, config = {}, samples._config
    follow_up(samples, None, config.rollout, sequences)([made_early])
    entries = [Entry(key, 0, samples.size(each, home=0)) for key, each in held.items()]
    context = SimpleNamespace(groups=SimpleNamespace(data=SimpleNamespace(rank=0)), config=config)
    drawn = Drawn([0], entries, held, sequences, is_leader=True)
    ((first, second),) = own_samples(context, samples, drawn, entries, [0])
    assert first.sample is sequences[made_early.key] and second.rollout.sample == 1
    for name, value in vars(samples.train_sample(made_early)).items():
        for sample in (first.sample, second.sample):
            assert np.array_equal(getattr(sample, name), value), name
