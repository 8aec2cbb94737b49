"""Both passes of a step on the real engine.

The model is random, so a description here ends with a letter that it happens to write; what the
real tags are is the scorer's business.
"""

from dataclasses import replace

import pytest
import rollout_setup as setup

from megatron_sr1.errors import EngineError
from megatron_sr1.rollout.two_pass import Pass2, roll_out


@pytest.fixture(scope="module")
def engine(tiny_model):
    return setup.engine(tiny_model)[0]


@pytest.fixture
def roll(tiny_model, engine):
    processor = setup.processor(tiny_model)

    def reading_prompt(prompt, description):
        text = f"{prompt.example.question} {description}"
        return processor.encode_text(
            [{"role": "user", "content": [{"type": "text", "text": text}]}]
        )

    def call(prompts, end="e", schedule="fork", **changes):
        settings = {
            "samples_per_prompt": 4,
            "temperature": 1.0,
            "max_response_tokens": 24,
            "pass2": Pass2(schedule, 1.0, 10),
            "find_description": lambda text: text.split(end)[0] if end in text else None,
            "reading_prompt": reading_prompt,
            "seed_of": lambda index, sample, part: 1000 * index + 10 * sample + part,
            "closing_mark": end[-1],
        }
        return roll_out(engine, prompts, **{**settings, **changes})

    call.reading_prompt = reading_prompt
    return call


def test_fork_and_barrier_give_the_same_rollouts(tiny_model, roll):
    prompts = [setup.prompt(tiny_model, k) for k in range(4)]
    forked, fork_stats = roll(prompts, end="x", schedule="fork")
    held, barrier_stats = roll(prompts, end="x", schedule="barrier")
    assert forked == held
    assert 0 < fork_stats.num_pass2 == sum(r.reading is not None for r in forked) < 16
    assert fork_stats.engine_steps <= 24 + 10 == barrier_stats.engine_steps
    assert fork_stats.pass2_only_seconds < fork_stats.seconds


def test_rollouts_are_ordered_by_prompt_and_sample_and_carry_the_version(tiny_model, engine, roll):
    prompts = [setup.prompt(tiny_model, k) for k in (2, 0)]
    rollouts, stats = roll(prompts)
    assert [(r.index, r.sample) for r in rollouts] == [(i, k) for i in (2, 0) for k in range(4)]
    assert {r.prompt_token_ids for r in rollouts[:4]} == {prompts[0].token_ids}
    assert len({r.completion.token_ids for r in rollouts}) == 8
    assert {r.weight_version for r in rollouts} == {engine.weight_version}
    assert stats.pass1_tokens == sum(len(r.completion.token_ids) for r in rollouts)
    assert stats.truncated == sum(r.completion.finish_reason == "length" for r in rollouts)


def test_reading_is_what_the_engine_says_to_the_text_alone(tiny_model, engine, roll):
    prompts = [setup.prompt(tiny_model, k) for k in range(3)]
    rollouts, stats = roll(prompts)
    read = [r for r in rollouts if r.reading is not None]
    assert read
    for rollout in read:
        ids = roll.reading_prompt(prompts[rollout.index], rollout.description)
        seed = 1000 * rollout.index + 10 * rollout.sample + 2
        request = replace(setup.request(setup.prompt(tiny_model, 0), "x"), images=(), seed=seed)
        request = replace(request, token_ids=ids, expanded_token_ids=ids, max_tokens=10)
        (alone,) = engine.generate([request])
        assert alone.token_ids == rollout.reading.token_ids
    assert stats.pass2_tokens == sum(len(r.reading.token_ids) for r in read)


def test_description_is_found_where_its_end_shares_tokens_with_its_neighbours(
    tiny_model, engine, roll
):
    """The mark begins inside one sampled token and ends inside the next."""
    prompts = [setup.prompt(tiny_model, k) for k in range(4)]
    rollouts, _ = roll(prompts, pass2=None)
    pieces = [[engine.piece(t) for t in r.completion.token_ids] for r in rollouts]
    ends = (
        (left[-1] + right[0], rollout)
        for rollout, words in zip(rollouts, pieces, strict=True)
        for left, right in zip(words, words[1:], strict=False)
        if left[1:].isascii()
        and left[1:].isalpha()
        and right[:-1].isascii()
        and right[:-1].isalpha()
    )
    end, rollout = next(ends)
    again, _ = roll(prompts, end=end)
    (found,) = (r for r in again if (r.index, r.sample) == (rollout.index, rollout.sample))
    assert found.completion == rollout.completion
    assert found.description == rollout.completion.text.split(end)[0]
    assert found.reading is not None


def test_without_images_a_closed_description_or_pass_2_there_is_no_reading(tiny_model, roll):
    text_only, image = setup.prompt(tiny_model, 0, num_images=0), setup.prompt(tiny_model, 1)
    rollouts, stats = roll([text_only, image])
    assert all(r.reading is None for r in rollouts[:4])
    assert all((r.reading is None) == (r.description is None) for r in rollouts[4:])
    rollouts, stats = roll([image], pass2=None)
    assert stats.num_pass2 == stats.pass2_tokens == stats.pass2_only_seconds == 0
    assert any(r.description is not None for r in rollouts)
    rollouts, stats = roll([image], end="\u2603")
    assert stats.num_pass2 == 0 and all(r.description is None for r in rollouts)


def test_no_prompts_give_no_rollouts(roll):
    rollouts, stats = roll([])
    assert rollouts == [] and stats.engine_steps == 0


def test_lengths_that_may_not_fit_are_refused_before_anything_is_sampled(tiny_model, engine, roll):
    prompts, steps = [setup.prompt(tiny_model, 0), setup.prompt(tiny_model, 3)], engine.num_steps
    with pytest.raises(EngineError, match=r"shard0\.tar sample key0 .*pass 1"):
        roll(prompts, max_response_tokens=250)
    with pytest.raises(EngineError, match=r"sample key0 .*pass 2"):
        roll(prompts, pass2=Pass2("fork", 0.0, 250))
    assert engine.num_steps == steps and engine.num_live == 0
