"""The engine's schedule against the simulated one that the benchmark replays.

Not covered: chunked prompts and full slots; tests/unit/test_engine_steps.py has those by hand.
"""

import os

import pytest
import rollout_setup as setup

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.training import DataConfig
from megatron_sr1.data.prompts import Prompts
from megatron_sr1.records import Example, Message
from megatron_sr1.rollout.engine import Request
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from tools.engine_steps import SCHEDULES, Limits, jobs_of, recorded, simulate

LIMITS = Limits(max_num_seqs=128, max_step_tokens=32768, block_tokens=16, chunked=False)
PASS2 = {"one": None, "barrier": "barrier", "forked": "fork"}


def first_letters(text):
    """A description: up to the first e, or nothing so far."""
    return text.split("e")[0] if "e" in text else None


@pytest.fixture(scope="module")
def runs(tiny_model):
    """By schedule: recorded steps and rollouts, from empty caches."""
    engine, processor = setup.engine(tiny_model)[0], setup.processor(tiny_model)
    prompts = [setup.prompt(tiny_model, k) for k in range(4)]

    def reading_prompt(prompt, description):
        parts = [{"type": "text", "text": f"{prompt.example.question} {description}"}]
        return processor.encode_text([{"role": "user", "content": parts}])

    def reading_prompts(asked):
        return [reading_prompt(*each) for each in asked]

    def run(schedule):
        state = setup.reference(tiny_model).state_dict().items()
        engine.sync(((n, t) for n, t in state if n != "lm_head.weight"), version=1)
        with recorded(engine) as steps:
            rollouts, stats = roll_out(
                engine,
                prompts,
                RolloutConfig(
                    samples_per_prompt=6,
                    max_response_tokens=24,
                    pass2=PASS2[schedule] or "fork",
                    pass2_temperature=1.0,
                    max_reading_tokens=10,
                ),
                RolloutHooks(
                    find_description=first_letters,
                    reading_prompts=reading_prompts if PASS2[schedule] else None,
                    seed_of=lambda index, sample, part: (1000 * index + 10 * sample + part) % 2**31,
                    closing_mark="e",
                ),
            )
        return rollouts, stats, steps

    found = {schedule: run(schedule) for schedule in SCHEDULES}
    return engine, prompts, reading_prompts, found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simulated_steps_are_the_recorded_ones(runs, schedule):
    engine, prompts, reading_prompts, found = runs
    rollouts, stats, steps = found[schedule]
    both = found["forked"][0]
    lengths = jobs_of(both, prompts, reading_prompts, first_letters, engine.decode)
    assert simulate(lengths, schedule, LIMITS) == steps
    assert len(steps) == stats.engine_steps
    assert sum(s.decoding_sequences + s.prefill_sequences for s in steps) == (
        stats.pass1_tokens + stats.pass2_tokens
    )
    assert any(r.reading for r in rollouts) == (schedule != "one")


def test_with_the_question_first_a_prompts_readings_share_all_but_the_description(tiny_model, runs):
    """Computed prompt tokens of eight readings of one question, a long one, from empty caches."""
    engine, processor = runs[0], setup.processor(tiny_model)
    question = "Which digit is the largest? " * 12
    computed = {}
    asked = Example(0, "k", "s.tar", (Message("user", question),), "1", 0)
    for template in ("brief", "brief_description_first"):
        prompts = Prompts(DataConfig(pass2_template=template), "vision_sr1")
        readings = [prompts.pass2_messages(asked, f"{k} and {k + 1}") for k in range(8)]
        ids = [processor.encode_text(messages) for messages in readings]
        state = setup.reference(tiny_model).state_dict().items()
        engine.sync(((n, t) for n, t in state if n != "lm_head.weight"), version=1)
        with recorded(engine) as steps:
            engine.generate([Request(str(k), i, max_tokens=1) for k, i in enumerate(ids)])
        computed[template] = sum(step.prefill_tokens for step in steps)
        shared = len(os.path.commonprefix(ids)) // LIMITS.block_tokens * LIMITS.block_tokens
        assert (shared > 0) == (template == "brief")
        assert computed[template] == sum(map(len, ids)) - 7 * shared
    assert computed["brief"] < computed["brief_description_first"] / 2


def test_recording_ends_with_its_block(runs):
    engine, *_ = runs
    with recorded(engine) as steps:
        pass
    engine.generate([setup.request(runs[1][0], "a", max_tokens=3)])
    assert steps == []
