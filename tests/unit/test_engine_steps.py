"""The cost model and the simulated schedules, by values computed by hand.

That a simulated schedule equals the real engine's is what `make bench` and a parity test compare.
"""

import math
from dataclasses import replace

import pytest

from megatron_sr1.planning.engine_time import Replica
from tools.engine_steps import (
    H100,
    DeclaredWorkload,
    EngineStep,
    Job,
    Limits,
    read_published,
    replay_seconds,
    simulate,
    step_seconds,
    whole_gpu,
)

SEVEN = read_published("7b")
TEXT = replace(
    SEVEN.text,
    hidden_size=4,
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=8,
    vocab_size=10,
)
SLOW = replace(H100, peak_flops=1000.0, matmul_share=0.5, memory_rate=100.0)
TOY = Replica(replace(SEVEN, text=TEXT), SLOW, 1, 1e9, 2, 1, step_overhead_seconds=0.25)
WIDE = Limits(max_num_seqs=8, max_step_tokens=100, block_tokens=16, chunked=True)
JOBS = [Job(0, 3, 4, 2, (0, 0), 2), Job(1, 3, 2, 1, (1, 1), 2)]


def test_a_replica_counts_the_weights_and_bytes_of_a_step():
    # Attention 2 x 16 + 2 x 4 x 2 = 48, MLP 3 x 32 = 96, two layers; 2 x 2 bytes x 2 layers x 2.
    assert (TOY.layer_weights, TOY.output_weights, TOY.token_bytes) == (288, 40, 16)


def test_shapes_of_the_published_models():
    three, seven = whole_gpu(read_published("3b")), whole_gpu(SEVEN)
    assert (three.layer_weights, three.output_weights) == (2774532096, 311164928)
    assert (seven.layer_weights, seven.output_weights) == (6525288448, 544997376)
    assert (three.token_bytes, seven.token_bytes) == (36864, 57344)


def test_a_decoding_step_takes_the_time_of_its_bytes():
    # 576 / 100 + 80 / 100 + 16 x 5 / 100 + 0.25; the operations would take 576 / 500 and 80 / 500.
    assert step_seconds(EngineStep(0, 0, 1, 5), TOY) == pytest.approx(7.61)


def test_a_prompt_takes_the_time_of_its_operations():
    # 2 x 288 x 10 / 500 instead of 5.76; one row of the output layer; 16 x 10 / 100; 0.25.
    step = EngineStep(
        prefill_tokens=10, prefill_sequences=1, decoding_sequences=0, context_tokens=10
    )
    assert step_seconds(step, TOY) == pytest.approx(11.52 + 0.8 + 1.6 + 0.25)
    mixed = EngineStep(10, 1, 12, 10)
    # 22 rows of the matrices, 13 of the output layer: 25.344 and max(0.8, 1040 / 500).
    assert step_seconds(mixed, TOY) == pytest.approx(25.344 + 2.08 + 1.6 + 0.25)
    both = replay_seconds([step, mixed], TOY)
    assert both == pytest.approx(14.17 + 29.274)


def test_a_single_sequence_of_7b_decodes_at_the_bandwidth():
    replica = replace(whole_gpu(SEVEN), step_overhead_seconds=0.0)
    alone = step_seconds(EngineStep(0, 0, 1, 0), replica)
    assert alone == pytest.approx(2 * 7070285824 / 3.35e12)  # 4.2 ms


def test_one_pass_ends_with_the_longest_response():
    assert simulate(JOBS, "one", WIDE) == [
        EngineStep(6, 2, 0, 6),
        EngineStep(0, 0, 2, 8),
        EngineStep(0, 0, 1, 5),
        EngineStep(0, 0, 1, 6),
    ]


def test_a_barrier_reads_after_the_last_response():
    steps = simulate(JOBS, "barrier", WIDE)
    assert steps[:4] == simulate(JOBS, "one", WIDE)
    assert steps[4:] == [EngineStep(4, 2, 0, 4), EngineStep(0, 0, 2, 6)]


def test_a_fork_reads_from_the_step_after_the_closing_tag():
    assert simulate(JOBS, "forked", WIDE) == [
        EngineStep(6, 2, 0, 6),
        EngineStep(2, 1, 2, 10),
        EngineStep(2, 1, 2, 10),
        EngineStep(0, 0, 2, 9),
    ]


def test_equal_descriptions_are_read_once_and_unclosed_ones_never():
    twins = [replace(JOBS[0], reading=(5, 5)), replace(JOBS[1], reading=(5, 5))]
    (second,) = (s for s in simulate(twins, "barrier", WIDE) if s.context_tokens == 2)
    assert second.prefill_sequences == 1
    open_ended = [replace(job, description_tokens=0) for job in JOBS]
    assert simulate(open_ended, "forked", WIDE) == simulate(JOBS, "one", WIDE)


def test_slots_and_the_token_budget_delay_prompts():
    steps = simulate(JOBS, "one", replace(WIDE, max_num_seqs=1))
    assert [s.prefill_tokens for s in steps] == [3, 0, 0, 0, 3, 0]
    steps = simulate(JOBS, "one", replace(WIDE, max_step_tokens=4))
    assert steps[:2] == [EngineStep(4, 2, 0, 4), EngineStep(2, 1, 1, 7)]
    steps = simulate(JOBS, "one", replace(WIDE, max_step_tokens=4, chunked=False))
    assert steps[:2] == [EngineStep(3, 1, 0, 3), EngineStep(3, 1, 1, 7)]


def test_samples_of_a_prompt_share_its_full_blocks():
    twins = [JOBS[0], replace(JOBS[1], prompt=0)]
    (first, *_) = simulate(twins, "one", replace(WIDE, block_tokens=2))
    assert first == EngineStep(
        prefill_tokens=4, prefill_sequences=2, decoding_sequences=0, context_tokens=6
    )


def test_readings_share_the_full_blocks_of_their_common_beginning():
    jobs = [replace(JOBS[0], reading=(5, 6, 7, 8)), replace(JOBS[1], reading=(5, 6, 7, 9))]
    *_, second = (
        step
        for step in simulate(jobs, "barrier", replace(WIDE, block_tokens=2))
        if step.prefill_sequences
    )
    assert second == EngineStep(6, 2, 0, 8)


def test_drawn_lengths_have_the_stated_mean_and_tail():
    workload = DeclaredWorkload(longest_tokens=10**6)
    lengths = sorted(job.response_tokens for job in workload.draw(40_000, seed=1))
    assert sum(lengths) / len(lengths) == pytest.approx(500, rel=0.02)
    tail = 500 / math.exp(0.6**2 / 2) * math.exp(2.326 * 0.6)  # 99th percentile, log-normal
    assert lengths[int(0.99 * len(lengths))] == pytest.approx(tail, rel=0.04)
    readings = [job.reading_tokens for job in workload.draw(40_000, seed=1)]
    assert sum(readings) / len(readings) == pytest.approx(300, rel=0.02)
    assert max(job.response_tokens for job in DeclaredWorkload().draw(4000, seed=1)) == 2048


@pytest.mark.parametrize("model", ["3b", "7b"])
@pytest.mark.parametrize("num_sequences", [64, 128])
def test_a_fork_costs_at_most_half_of_what_a_barrier_costs(model, num_sequences):
    """For the declared workload; `make bench` gives the larger numbers of sequences."""
    replica = whole_gpu(read_published(model))
    limits = Limits(2 * num_sequences, 16384, 16, True)
    jobs = DeclaredWorkload().draw(num_sequences, seed=1)
    one, barrier, forked = (
        replay_seconds(simulate(jobs, schedule, limits), replica)
        for schedule in ("one", "barrier", "forked")
    )
    assert 0 < forked - one <= 0.5 * (barrier - one)
