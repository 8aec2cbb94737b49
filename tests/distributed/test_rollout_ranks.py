"""The same rollouts from one engine over two ranks and from two engines of one rank each.

Not covered: more than two ranks, engines over several nodes.
"""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "ranks" / "rollouts.py"


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    """By tensor parallelism of the engine: what each of two ranks wrote.

    The vocabulary is no round number, so that the engine pads it, and the output layer is its own.
    """
    from megatron_sr1.demo.digits import corpus_texts
    from megatron_sr1.demo.tiny_model import make_tiny_model

    model = tmp_path_factory.mktemp("model")
    make_tiny_model(model, corpus_texts(), vocab_size=371, tie_word_embeddings=False)

    def run(tensor_parallel):
        output = tmp_path_factory.mktemp(f"rollout{tensor_parallel}")
        run_ranks(SCRIPT, 2, model, output, tensor_parallel)
        return [json.loads((output / f"rank{k}.json").read_text()) for k in range(2)]

    return {1: run(1), 2: run(2)}


def test_ranks_know_their_replica(results):
    seen = {
        tp: [(r["replica"], r["num_replicas"], r["is_replica_leader"]) for r in ranks]
        for tp, ranks in results.items()
    }
    assert seen == {1: [(0, 2, True), (1, 2, True)], 2: [(0, 1, True), (0, 1, False)]}


def test_the_engines_groups_have_its_time_limit(results):
    """Not vLLM's own: 10 minutes for NCCL, 30 for gloo, both below the default deadlines."""
    for ranks in results.values():
        assert [rank["time_limits"] for rank in ranks] == [[777.0, 777.0]] * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_ranks_of_a_replica_sample_the_same_tokens(results, when):
    first, second = (rank[when] for rank in results[2])
    assert first == second and len(first) == 16
    assert any(r["reading"] for r in first)


@pytest.mark.parametrize("when", ["before", "after"])
def test_engine_layout_changes_no_token(results, when):
    whole = {(r["index"], r["sample"]): r for r in results[2][0][when]}
    parts = {(r["index"], r["sample"]): r for rank in results[1] for r in rank[when]}
    assert whole.keys() == parts.keys() and len(whole) == 16
    for key, rollout in whole.items():
        other = parts[key]
        assert (rollout["tokens"], rollout["reading"]) == (other["tokens"], other["reading"])
        gaps = [abs(a - b) for a, b in zip(rollout["logprobs"], other["logprobs"], strict=True)]
        assert max(gaps) < 1e-4


def test_sync_changes_what_both_layouts_sample(results):
    for ranks in results.values():
        for rank in ranks:
            assert [r["tokens"] for r in rank["before"]] != [r["tokens"] for r in rank["after"]]
            assert {r["version"] for r in rank["after"]} == {1}


def test_half_a_model_is_refused_and_never_sampled_from(results):
    for ranks in results.values():
        for rank in ranks:
            sync, sample = rank["refused"]
            assert "layers.0.mlp.gate_proj.weight" in sync and "all tensors" in sync
            assert "weight sync 2 failed" in sample
