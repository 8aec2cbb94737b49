"""Both passes of a step on the real engine.

The model is random, so a description here ends with a letter that it happens to write; the real
tags belong to the scorer.
"""

import time
from array import array
from dataclasses import replace

import pytest
import rollout_setup as setup

from megatron_sr1.config.endpoint import EndpointConfig
from megatron_sr1.config.rollout import RewardConfig, RolloutConfig
from megatron_sr1.errors import EngineError, GradingLimit
from megatron_sr1.rewards.response import find_description
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.rollout.engine import Request
from megatron_sr1.rollout.readings import RolloutHooks, _digest
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.chat import ChatClient, defused
from tests.chat_endpoint import CLOSED, SILENT, serving


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

    def call(prompts, end="e", hooks=None, **changes):
        settings = {
            "samples_per_prompt": 4,
            "max_response_tokens": 24,
            "pass2_temperature": 1.0,
            "max_reading_tokens": 10,
        }
        usual = RolloutHooks(
            find_description=lambda text: text.split(end)[0] if end in text else None,
            reading_prompts=lambda asked: [reading_prompt(*each) for each in asked],
            seed_of=lambda index, sample, part: (1000 * index + 10 * sample + part) % 2**31,
            gold_answer=lambda prompt: processor.encode_answer("\\boxed{", "14", "}"),
            closing_mark=end[-1],
        )
        rollout = RolloutConfig(**{**settings, **changes})
        return roll_out(engine, prompts, rollout, replace(usual, **(hooks or {})))

    call.reading_prompt = reading_prompt
    return call


EARLY = {
    "find_description": lambda text: text[:8] if len(text) >= 8 else None,
    "closing_mark": "",
}
"""A description is the first eight characters, whatever they are: greedy text repeats itself."""
QUESTION_ONLY = {"question_only": True}
NO_PASS_2 = {"reading_prompts": None}
LIKELIHOOD = {"pass2_temperature": 0.0, "pass2_mode": "likelihood"}
MODES = {
    "greedy": ({"pass2_temperature": 0.0}, EARLY),
    "sampled": ({"pass2_temperature": 1.0}, EARLY),
    "three answers": ({"pass2_temperature": 1.0, "pass2_samples": 3}, EARLY | QUESTION_ONLY),
    "likelihood": (LIKELIHOOD, EARLY | QUESTION_ONLY),
}


@pytest.mark.parametrize("first_temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_fork_and_barrier_give_the_same_tokens_in_both_passes(
    tiny_model, roll, mode, first_temperature
):
    prompts = [setup.prompt(tiny_model, k) for k in range(4)]
    settings, hooks = MODES[mode]
    forked, held = (
        roll(prompts, temperature=first_temperature, pass2=schedule, hooks=hooks, **settings)[0]
        for schedule in ("fork", "barrier")
    )
    assert [without_scores(r) for r in forked] == [without_scores(r) for r in held]
    assert any(r.reading for r in forked)
    for one, other in zip(forked, held, strict=True):
        for pair in zip(completions(one), completions(other), strict=True):
            assert pair[0].logprobs == pytest.approx(pair[1].logprobs, abs=1e-5)


def completions(rollout):
    read = [r.answers for r in (rollout.reading, rollout.question_only) if r]
    return [rollout.completion, *(answer for answers in read for answer in answers)]


def without_scores(rollout):
    return rollout.description, [(c.token_ids, c.finish_reason) for c in completions(rollout)]


@pytest.mark.parametrize("schedule", ["fork", "barrier"])
@pytest.mark.parametrize("mode", MODES)
def test_a_rollout_is_passed_on_once_and_whole_as_soon_as_it_is(
    tiny_model, engine, roll, mode, schedule
):
    settings, hooks = MODES[mode]
    steps, passed, first = [], [], engine.num_steps
    hooks = hooks | {
        "finished": lambda found: (steps.append(engine.num_steps), passed.extend(found))
    }
    prompts = [setup.prompt(tiny_model, k, num_images=k % 2) for k in range(3)]
    prompts.append(setup.prompt(tiny_model, 1))  # its readings are those of the one before
    lengths = {"max_response_tokens": 12, "max_reading_tokens": 3}
    rollouts, stats = roll(prompts, hooks=hooks, pass2=schedule, **settings, **lengths)
    assert sorted(map(id, passed)) == sorted(map(id, rollouts)) and len(passed) == 16
    assert all(r.reading and r.question_only for r in rollouts if r.index == 1) == (
        "question_only" in hooks
    )
    assert steps[-1] == first + stats.engine_steps
    # Those without a second pass wait for no reading.
    assert schedule == "fork" or steps[0] < steps[-1]


def test_fork_takes_fewer_steps_than_a_barrier(tiny_model, roll):
    prompts = [setup.prompt(tiny_model, k) for k in range(4)]
    forked, fork_stats = roll(prompts, end="x", pass2="fork")
    held, barrier_stats = roll(prompts, end="x", pass2="barrier")
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


def test_a_reading_equals_the_engines_answer_to_the_text_alone(tiny_model, engine, roll):
    prompts = [setup.prompt(tiny_model, k) for k in range(3)]
    rollouts, stats = roll(prompts)
    read = [r for r in rollouts if r.reading is not None]
    assert read
    for rollout in read:
        ids = roll.reading_prompt(prompts[rollout.index], rollout.description)
        (alone,) = engine.generate([sampled(ids, 2)])
        assert alone.token_ids == rollout.reading.answers[0].token_ids
    # The prompts have one question, so two of them may share a description and its reading.
    distinct = {r.description: r.reading for r in read}.values()
    assert stats.pass2_tokens == sum(len(r.answers[0].token_ids) for r in distinct)


def sampled(ids, part):
    """The request that pass 2 makes of a prompt at temperature 1, by itself."""
    seed = -1000 + 10 * _digest(array("q", ids).tobytes()) + part
    return Request("x", ids, max_tokens=10, seed=seed % 2**31)


def test_several_answers_are_those_of_their_seeds(tiny_model, engine, roll):
    prompts = [setup.prompt(tiny_model, k) for k in range(3)]
    rollouts, stats = roll(prompts, pass2_samples=3)
    read = [r for r in rollouts if r.reading is not None]
    assert read and stats.num_prompts2 < 3 * len(read)
    for rollout in read[:4]:
        ids = roll.reading_prompt(prompts[rollout.index], rollout.description)
        alone = [engine.generate([sampled(ids, 2 + k)])[0].token_ids for k in range(3)]
        assert [a.token_ids for a in rollout.reading.answers] == alone
        assert len(set(alone)) == 3


def test_likelihood_of_the_gold_answer_equals_transformers(tiny_model, roll):
    prompts = [setup.prompt(tiny_model, k) for k in range(3)]
    lead, answer = setup.processor(tiny_model).encode_answer("\\boxed{", "14", "}")
    rollouts, stats = roll(prompts, hooks=QUESTION_ONLY, **LIKELIHOOD)
    assert stats.pass2_tokens == 0 and any(r.reading for r in rollouts)
    for rollout in rollouts:
        read = [("", rollout.question_only), (rollout.description, rollout.reading)]
        for description, reading in read:
            if reading is None:
                continue
            ids = (*roll.reading_prompt(prompts[rollout.index], description), *lead)
            text = replace(prompts[rollout.index], token_ids=ids, vision=None)
            expected = setup.reference_logprobs(tiny_model, text, answer)
            assert reading.gold_logprobs == pytest.approx(expected, abs=1e-5)
            assert reading.answers[0].token_ids == answer and reading.texts == ()


def test_equal_descriptions_of_a_question_are_read_once(tiny_model, roll):
    """At temperature 0 all samples of a prompt say the same."""
    prompts = [setup.prompt(tiny_model, k) for k in range(3)]
    rollouts, stats = roll(prompts, temperature=0.0, hooks=EARLY)
    assert stats.num_pass2 == len(rollouts) == 12
    descriptions = {r.description: r.reading for r in rollouts}
    assert stats.num_prompts2 == len(descriptions) <= 3  # the three ask the same question
    assert all(r.reading == descriptions[r.description] for r in rollouts)
    distinct = [reading.answers[0] for reading in descriptions.values()]
    assert stats.pass2_tokens == sum(len(answer.token_ids) for answer in distinct)


def test_questions_alone_are_read_once_and_only_with_images(tiny_model, roll):
    text_only, image = setup.prompt(tiny_model, 0, num_images=0), setup.prompt(tiny_model, 1)
    settings = {"pass2": "barrier", "pass2_temperature": 0.0, "hooks": QUESTION_ONLY}
    rollouts, stats = roll([text_only, image], end="\u2603", **settings)
    assert stats.num_prompts2 == 1 and stats.num_pass2 == 0
    assert [r.question_only is None for r in rollouts] == [True] * 4 + [False] * 4


def test_description_is_found_where_its_end_shares_tokens_with_its_neighbours(
    tiny_model, engine, roll
):
    """The mark begins inside one sampled token and ends inside the next."""
    prompts = [setup.prompt(tiny_model, k) for k in range(4)]
    rollouts, _ = roll(prompts, hooks=NO_PASS_2)
    pieces = [[engine.decode([t]) for t in r.completion.token_ids] for r in rollouts]
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
    assert without_scores(found)[1][0] == without_scores(rollout)[1][0]
    assert found.completion.logprobs == pytest.approx(rollout.completion.logprobs, abs=1e-5)
    assert found.description == rollout.completion.text.split(end)[0]
    assert found.reading is not None


@pytest.mark.parametrize("inside", [" a cat.", "(a)", "ein Kätzchen 猫 sitzt 🐈", " x > 1"])
@pytest.mark.parametrize("after", ["\n\n<think>", "<think>", " \\boxed{1}", "\\boxed{1}"])
def test_in_qwens_own_vocabulary_the_tag_closes_with_the_token_that_holds_its_end(
    tiny_model, engine, qwen_tokenizer, monkeypatch, inside, after
):
    """It merges the tag with its neighbours; here the engine uses that tokenizer."""
    monkeypatch.setattr(engine, "_tokenizer", qwen_tokenizer.backend_tokenizer)
    monkeypatch.setattr(engine, "_ids_with", {})
    before = f"<description>{inside}</description>"
    encoded = qwen_tokenizer(before + after, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    marked = engine.ids_with(RolloutHooks(find_description, None, None).closing_mark)
    told = [number for number, token in enumerate(ids) if token in marked]
    found = {n: find_description(engine.decode(ids[: n + 1])) for n in told}
    closed = [n for n, description in found.items() if description is not None]
    assert closed[0] == next(n for n, (a, b) in enumerate(places) if a < len(before) <= b)
    assert found[closed[0]] == inside.strip()


def test_without_images_a_closed_description_or_pass_2_there_is_no_reading(tiny_model, roll):
    text_only, image = setup.prompt(tiny_model, 0, num_images=0), setup.prompt(tiny_model, 1)
    rollouts, stats = roll([text_only, image])
    assert all(r.reading is None for r in rollouts[:4])
    assert all((r.reading is None) == (r.description is None) for r in rollouts[4:])
    rollouts, stats = roll([image], hooks=NO_PASS_2)
    assert stats.num_pass2 == stats.pass2_tokens == stats.pass2_only_seconds == 0
    assert any(r.description is not None for r in rollouts)
    rollouts, stats = roll([image], end="\u2603")
    assert stats.num_pass2 == 0 and all(r.description is None for r in rollouts)


def test_only_requests_with_an_open_description_are_watched(tiny_model, engine, roll, monkeypatch):
    """Each is reported up to the step in which its description closes, and at its end."""
    reports, watched, step = {}, [], engine.step

    def recorded():
        watched.append(set().union(*engine._watched.values()))
        found = step()
        for progress in found:
            reports.setdefault(progress.id, []).append(progress.completion is not None)
        return found

    monkeypatch.setattr(engine, "step", recorded)
    prompts = [setup.prompt(tiny_model, 0, num_images=0), setup.prompt(tiny_model, 1)]
    rollouts, _ = roll(prompts, hooks=EARLY)  # its mark is in every token
    assert all(r.reading for r in rollouts[4:]) and not any(engine._watched.values())
    expected = dict.fromkeys(reports, 0)
    for rollout in rollouts[4:]:
        ids = rollout.completion.token_ids
        closed = (k for k in range(1, len(ids)) if len(engine.decode(ids[:k])) >= 8)
        seen = [token in engine.ids_with("") for token in ids[: next(closed)]]
        expected[f"1.{rollout.sample}"] = sum(seen)  # without ids that have no text
    for name, ends in reports.items():
        assert ends == [False] * expected[name] + [True], name
    assert watched[0] == {f"1.{k}" for k in range(4)} and watched[-1] == set()
    tokens = sum(len(r.completion.token_ids) for r in rollouts[4:])
    assert sum(map(len, watched)) < tokens / 2


def test_no_prompts_give_no_rollouts(roll):
    rollouts, stats = roll([])
    assert rollouts == [] and stats.engine_steps == 0


def test_lengths_that_may_not_fit_are_rejected_before_anything_is_sampled(tiny_model, engine, roll):
    prompts, steps = [setup.prompt(tiny_model, 0), setup.prompt(tiny_model, 3)], engine.num_steps
    with pytest.raises(EngineError, match=r"shard0\.tar sample key0 .*pass 1"):
        roll(prompts, max_response_tokens=250)
    with pytest.raises(EngineError, match=r"sample key0 .*pass 2"):
        roll(prompts, max_reading_tokens=250)
    assert engine.num_steps == steps and engine.num_live == 0


def reader(endpoint, **settings):
    own = {"base_url": endpoint.url, "model": "m", "timeout_seconds": 20.0, "retries": 0}
    return ChatClient("rollout.endpoint", EndpointConfig(**own | settings))


def messages(prompt, description):
    return (("user", f"{prompt.example.question} {description}"),)


def test_an_endpoint_reads_each_description_while_the_engine_samples(tiny_model, engine, roll):
    live = []

    def script(number, body):
        live.append(engine.num_live)
        time.sleep(0.05)
        return f"read {len(body['messages'][0]['content'])} with {body['seed'] % 2}"

    prompts = [setup.prompt(tiny_model, k) for k in range(3)]
    with serving(script) as endpoint, reader(endpoint) as client:
        hooks = EARLY | QUESTION_ONLY | {"reading_messages": messages, "reader": client}
        passed = []
        hooks |= {"finished": lambda found: passed.extend((r, engine.num_live) for r in found)}
        rollouts, stats = roll(prompts, hooks=hooks, pass2_mode="endpoint", pass2_samples=2)
        assert sorted(id(r) for r, _ in passed) == sorted(map(id, rollouts))
        alone, _ = roll(prompts, hooks=hooks | {"reader": None}, pass2_mode="endpoint")
    read = [r for r in rollouts if r.reading is not None]
    assert len(read) == stats.num_pass2 > 4 and stats.pass2_tokens == 0
    for each in read:
        length = len(defused(messages(prompts[each.index], each.description)[0][1]))
        texts = each.reading.texts
        assert sorted(texts) == [f"read {length} with 0", f"read {length} with 1"]
        assert each.reading.gold_logprobs is None and each.reading.failure is None
        assert len(each.question_only.texts) == 2
    distinct = {(each.index, each.description) for each in read} | {(k, "") for k in range(3)}
    assert stats.num_prompts2 <= len(distinct)
    assert len(endpoint.bodies) == 2 * stats.num_prompts2
    assert max(live) > 0, "all were asked only after pass 1"
    assert endpoint.bodies[0]["max_completion_tokens"] == 10
    assert {r.reading for r in alone} == {None}, "other ranks of the replica do not ask"
    assert [r.completion.token_ids for r in alone] == [r.completion.token_ids for r in rollouts]


@pytest.mark.parametrize("fault", [500, CLOSED, SILENT, b"<html>"], ids=str)
def test_a_reading_that_fails_is_no_answer_and_leaves_its_prompt_ungraded(tiny_model, roll, fault):
    prompts = [setup.prompt(tiny_model, k) for k in range(2)]
    with serving(lambda n, b: fault) as endpoint:
        with reader(endpoint, timeout_seconds=0.5) as client:
            hooks = EARLY | {"reading_messages": messages, "reader": client}
            rollouts, _ = roll(prompts, hooks=hooks, pass2_mode="endpoint")
    failed = [r for r in rollouts if r.reading is not None]
    assert failed and all(r.reading.failure and r.reading.texts == () for r in failed)
    with Scorer(RewardConfig()) as scorer:
        with pytest.raises(GradingLimit, match="shard0.tar 0: pass 2 at rollout.endpoint"):
            scorer.score("shard0.tar 0", failed[0], prompts[failed[0].index].example)
