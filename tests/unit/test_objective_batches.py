"""The objective over micro-batches, for all kinds of loss, with and without each correction.

How sequences are packed changes nothing, and values outside the targets have no effect.

Sources: modelscope/ms-swift#10117, huggingface/trl#6024, areal-project/AReaL#1273,
verl-project/verl#4711 (packing); verl-project/verl#6349 (0 x NaN outside the mask);
NVIDIA-NeMo/RL#874, huggingface/trl#3015, OpenRLHF/OpenRLHF#1335 (extreme logprobs).
"""

import itertools

import pytest
import torch

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.records import PackedBatch
from megatron_sr1.trainer.objective import grpo_loss

pytestmark = pytest.mark.field
KINDS = ["token_mean", "sequence_mean", "dr_grpo", "gspo"]
CORRECTIONS = [
    {"importance_sampling": level, "mask_beyond_nats": bound}
    for level, bound in itertools.product(["off", "token", "sequence"], [0.0, 0.1])
]
LENGTHS = [5, 9, 3, 12, 7]
NUMBERS = ("policy", "old_logprobs", "engine_logprobs", "reference_logprobs", "advantages")


def sequences():
    """Return a dict per sequence: its mask (the first token is never a target) and its numbers."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for place, length in enumerate(LENGTHS):
        mask = torch.rand(length, generator=generator) < 0.7
        mask[0], mask[-1] = False, place != 2  # the third has no target at all
        mask &= place != 2
        values = {n: torch.randn(length, generator=generator) for n in NUMBERS}
        logprobs = {n: -2 + 0.3 * values[n] for n in NUMBERS if n != "advantages"}
        made.append({"mask": mask, "advantages": values["advantages"], **logprobs})
    return made


def evaluate(rows, algorithm, outside=0.0):
    """Return loss, denominator, gradients by sequence and reported sums, added up over rows.

    Args:
        rows: sequences of each micro-batch.
        algorithm: values of `AlgorithmConfig`.
        outside: value of the logprobs outside the targets, padding included.
    """
    chosen = AlgorithmConfig(kl_coefficient=0.1, **algorithm)
    loss = grpo_loss(chosen, RolloutConfig(max_response_tokens=16))
    total, denominator, gradients, sums = 0.0, 0.0, [], {}
    for row in rows:
        lengths = [len(s["mask"]) for s in row] + [2]  # two places of padding
        mask = torch.cat([s["mask"] for s in row] + [torch.zeros(2, dtype=torch.bool)])[None]

        def packed(name, fill, row=row, mask=mask):
            values = torch.cat([s[name] for s in row] + [torch.zeros(2)])[None]
            return torch.where(mask, values, fill)

        policy = packed("policy", outside).requires_grad_()
        batch = PackedBatch(
            sample_ids=tuple(range(len(row))),
            input_ids=torch.zeros_like(mask, dtype=torch.int64),
            labels=torch.zeros_like(mask, dtype=torch.int64),
            loss_mask=mask.float(),
            position_ids=torch.zeros(3, *mask.shape, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            advantages=packed("advantages", 0.0),
            **{n: packed(n, outside) for n in NUMBERS[1:4]},
        )
        loss_sum, part, reported = loss(policy, batch)
        loss_sum.backward()
        total, denominator = total + loss_sum.item(), denominator + part.item()
        gradients += policy.grad[0].split(lengths)[:-1]
        for name, (value, count) in reported.items():
            old, number = sums.get(name, (0.0, 0.0))
            joined = max(old, value.item()) if name.endswith("_max") else old + value.item()
            sums[name] = joined, number + count.item()
    return total, denominator, gradients, sums


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_micro_batches_changes_no_number_and_no_gradient(kind):
    given = sequences()
    for correction in CORRECTIONS:
        algorithm = {"loss": kind, **correction}
        loss, denominator, gradients, sums = evaluate([given], algorithm)
        assert any(gradient.any() for gradient in gradients)
        for rows in ([given[:2], given[2:]], [[one] for one in given]):
            found = evaluate(rows, algorithm)
            assert found[:2] == (pytest.approx(loss, rel=1e-5, abs=1e-6), denominator)
            for one, other in zip(gradients, found[2], strict=True):
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
            assert found[3].keys() == sums.keys()
            for name, pair in sums.items():
                assert found[3][name] == pytest.approx(pair, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", [float("nan"), float("inf"), -float("inf"), -1e30])
def test_values_outside_the_targets_have_no_effect(kind, outside):
    given = sequences()
    for correction in CORRECTIONS:
        expected = evaluate([given], {"loss": kind, **correction})
        found = evaluate([given], {"loss": kind, **correction}, outside)
        assert found[:2] == expected[:2]
        assert all(map(torch.equal, found[2], expected[2]))
        assert found[3] == expected[3]


EXTREMES = [(-0.1, -200.0), (-200.0, -0.1), (0.0, -1e4), (-1e4, 0.0), (-3e38, -1.0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", NUMBERS[1:4])
def test_logprobs_arbitrarily_far_apart_give_a_finite_loss_and_gradient(kind, other):
    for (policy, far), correction in itertools.product(EXTREMES, CORRECTIONS):
        given = sequences()
        given[1]["policy"][:], given[1][other][:] = policy, far
        loss, _, gradients, _ = evaluate([given], {"loss": kind, **correction})
        assert torch.isfinite(torch.tensor(loss)), (policy, far, correction)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
