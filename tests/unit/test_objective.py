"""The objective of a micro-batch, by hand: value, gradient and denominator of each kind of loss.

The row has sequence A (positions 0 to 2, targets 0 and 1), B (3 to 6, targets 3 to 5) and two
positions of padding. Ratios are policy over old. Sums over ranks and micro-batches are tested in
tests/distributed/test_updates.py.
"""

import math

import pytest
import torch

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.errors import EngineError
from megatron_sr1.records import PackedBatch
from megatron_sr1.trainer.objective import grpo_loss

BORDERS = [0, 3, 7, 9]
TARGETS = [0, 1, 3, 4, 5]
A, B = [0, 1], [3, 4, 5]
MAX_RESPONSE = 10


def row(values, elsewhere=float("nan")):
    """Return [1, 9] with the values at the targets."""
    out = torch.full((1, 9), elsewhere)
    out[0, TARGETS] = torch.tensor(values, dtype=torch.float32)
    return out


def run(ratios, advantages, **options):
    """Return loss sum, denominator, gradients of the policy's logprobs at the targets, and sums."""
    *found, reported = run_pairs(ratios, advantages, **options)
    return *found, {name: value for name, (value, _) in reported.items()}


def run_pairs(
    ratios, advantages, *, actor_over_engine=(1.0,) * 5, reference=None, bound=0.0, **chosen
):
    """Return the same; each reported sum with the number of tokens that it covers."""
    logs = torch.tensor(ratios).log()
    policy = row((logs - 1.0).tolist(), elsewhere=-7.0).requires_grad_()
    engine = -1.0 - torch.tensor(actor_over_engine).log()
    batch = PackedBatch(
        sample_ids=(0, 1),
        input_ids=torch.zeros(1, 9, dtype=torch.int64),
        labels=torch.zeros(1, 9, dtype=torch.int64),
        loss_mask=row([1.0] * 5, elsewhere=0.0),
        position_ids=torch.zeros(3, 1, 9, dtype=torch.int64),
        cu_seqlens=torch.tensor(BORDERS, dtype=torch.int32),
        advantages=row(advantages, elsewhere=0.0),
        old_logprobs=row([-1.0] * 5),
        engine_logprobs=row(engine.tolist()),
        reference_logprobs=None if reference is None else row(reference),
    )
    algorithm = AlgorithmConfig(**{"kl_coefficient": 0.0, **chosen})
    rollout = RolloutConfig(max_response_tokens=MAX_RESPONSE, mismatch_bound=bound)
    loss, denominator, reported = grpo_loss(algorithm, rollout)(policy, batch)
    loss.backward()
    assert reported.pop("loss") == (loss, denominator)
    outside = [i for i in range(9) if i not in TARGETS]
    assert not policy.grad[0, outside].any()
    return (
        loss.item(),
        denominator.item(),
        policy.grad[0, TARGETS].tolist(),
        {name: (value.item(), count.item()) for name, (value, count) in reported.items()},
    )


# A is good, B is bad. With clips at 0.8 and 1.3 the tokens' losses are
#   A: 1.1 -> -2.2, 1.5 -> -2.6 without gradient;  B: 0.5 -> 0.8 without, 1.2 -> 1.2, 1.0 -> 1.0
RATIOS, ADVANTAGES = [1.1, 1.5, 0.5, 1.2, 1.0], [2.0, 2.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("kind", "loss", "denominator", "gradients"),
    [
        ("token_mean", -4.8 + 3.0, 5, [-2.2, 0, 0, 1.2, 1.0]),
        ("sequence_mean", -4.8 / 2 + 3.0 / 3, 2, [-2.2 / 2, 0, 0, 1.2 / 3, 1.0 / 3]),
        ("dr_grpo", (-4.8 + 3.0) / 10, 2, [-0.22, 0, 0, 0.12, 0.1]),
    ],
)
def test_a_loss_weighs_tokens_and_counts_its_denominator(kind, loss, denominator, gradients):
    got, count, grads, reported = run(RATIOS, ADVANTAGES, loss=kind)
    assert got == pytest.approx(loss, rel=1e-6)
    assert count == denominator
    assert grads == pytest.approx(gradients, rel=1e-5, abs=1e-7)
    assert reported["clipped_share"] == 2  # tokens, whatever the loss
    assert reported["ratio_max"] == pytest.approx(1.5)


GSPO = {"loss": "gspo", "gspo_clip_low": 0.2, "gspo_clip_high": 0.3}


@pytest.mark.parametrize(
    ("ratios", "loss", "gradients", "clipped"),
    [
        # s_A = sqrt(1.44 x 1) = 1.2 and s_B = (8 x 1 x 1)^(1/3) = 2: loss -2.4 and 2, gradients
        # A_i s_i / |y_i|. A clip of tokens would have cut the 1.44 and the 8.
        ([1.44, 1.0, 8.0, 1.0, 1.0], -2.4 + 2.0, [-1.2, -1.2, 2 / 3, 2 / 3, 2 / 3], 0),
        # s_A = 2 gains nothing beyond 1.3, s_B = 0.5 loses nothing below 0.8, at any token.
        ([4.0, 1.0, 0.125, 1.0, 1.0], -2.6 + 0.8, [0, 0, 0, 0, 0], 5),
        # s_A = 0.5 and s_B = 1: a good sequence keeps its gradient, however unlikely it is.
        ([0.25, 1.0, 4.0, 0.5, 0.5], -1.0 + 1.0, [-0.5, -0.5, 1 / 3, 1 / 3, 1 / 3], 0),
    ],
)
def test_gspo_clips_the_ratio_of_the_sequence(ratios, loss, gradients, clipped):
    got, count, grads, reported = run(ratios, ADVANTAGES, **GSPO)
    assert got == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert count == 2
    assert grads == pytest.approx(gradients, rel=1e-5, abs=1e-7)
    assert reported["clipped_share"] == clipped


def test_gspo_has_its_own_narrow_clips():
    # s_A = exp(0.0005) is beyond 1 + 4e-4, s_B = exp(-0.0002) within 1 - 3e-4.
    ratios = [math.exp(0.001), 1.0, math.exp(-0.0006), 1.0, 1.0]
    got, _, grads, _ = run(ratios, ADVANTAGES, loss="gspo")
    assert got == pytest.approx(-2 * 1.0004 + math.exp(-0.0002), rel=1e-6)
    assert grads == pytest.approx([0, 0] + [math.exp(-0.0002) / 3] * 3, rel=1e-5)

    # s_B = exp(-0.0005) is below 1 - 3e-4.
    got, _, grads, _ = run([1, 1, math.exp(-0.0015), 1, 1], ADVANTAGES, loss="gspo")
    assert got == pytest.approx(-2 + 0.9997, rel=1e-6)
    assert grads == pytest.approx([-1, -1, 0, 0, 0])


def test_gspo_gives_each_token_its_own_advantage_with_credit_per_span():
    # s_A = 1.2 with advantages 2 and -1, s_B = 1 with 1, 0, -2.
    got, _, grads, _ = run([1.44, 1.0, 1, 1, 1], [2.0, -1.0, 1.0, 0.0, -2.0], **GSPO)
    assert got == pytest.approx((-2.4 + 1.2) / 2 + (-1 + 2) / 3, rel=1e-5)
    assert grads == pytest.approx([-1.2, 0.6, -1 / 3, 0, 2 / 3], rel=1e-5, abs=1e-7)


def test_the_kl_term_is_reduced_as_the_policy_loss_is():
    # reference - policy = ln 2 at the first token of B, else 0: k3 = 2 - ln 2 - 1, gradient -1.
    reference = [-1.0, -1.0, -1.0 + math.log(2), -1.0, -1.0]
    k3 = 1 - math.log(2)
    for kind, weight in (("token_mean", 1), ("sequence_mean", 1 / 3), ("dr_grpo", 1 / 10)):
        got, _, grads, reported = run(
            [1.0] * 5, [0.0] * 5, loss=kind, kl_coefficient=0.5, reference=reference
        )
        assert got == pytest.approx(0.5 * k3 * weight, rel=1e-5)
        assert grads == pytest.approx([0, 0, -0.5 * weight, 0, 0], rel=1e-5, abs=1e-7)
        assert reported["reference_kl"] == pytest.approx(k3, rel=1e-5)


# pi_actor / pi_engine of each token; of A 4 x 0.5 = 2, of B 0.5 x 0.5 x 1 = 0.25.
GAPS = (4.0, 0.5, 0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("level", "weights", "capped"),
    [
        ("off", [1, 1, 1, 1, 1], None),
        ("token", [3, 0.5, 0.5, 0.5, 1], 1),
        ("sequence", [2, 2, 0.25, 0.25, 0.25], 0),
    ],
)
def test_importance_weights_scale_the_policy_loss_up_to_the_cap(level, weights, capped):
    got, count, grads, reported = run(
        [1.0] * 5, ADVANTAGES, actor_over_engine=GAPS, importance_sampling=level, importance_cap=3.0
    )
    expected = [-a * w for a, w in zip(ADVANTAGES, weights, strict=True)]
    assert grads == pytest.approx(expected, rel=1e-5)
    assert (got, count) == (pytest.approx(sum(expected), rel=1e-5), 5)
    assert reported.get("importance/capped_share") == capped
    if capped is not None:
        assert reported["importance/weight"] == pytest.approx(sum(weights), rel=1e-5)


def test_a_sequences_weight_is_capped_as_a_whole():
    _, _, grads, reported = run(
        [1.0] * 5,
        ADVANTAGES,
        actor_over_engine=GAPS,
        importance_sampling="sequence",
        importance_cap=1.5,
    )
    assert grads == pytest.approx([-3, -3, 0.25, 0.25, 0.25], rel=1e-5)
    assert reported["importance/capped_share"] == 2


@pytest.mark.parametrize(
    ("kind", "gradients", "denominator"),
    [("token_mean", [-2.0, -2.0, 0, 0, 0], 2), ("sequence_mean", [-1.0, -1.0, 0, 0, 0], 1)],
)
def test_a_sequence_beyond_the_limit_is_out_of_loss_and_denominator(kind, gradients, denominator):
    # Mean gaps a token: A ln(2) / 2 = 0.347, B ln(4) / 3 = 0.462.
    got, count, grads, reported = run(
        [1.0] * 5,
        ADVANTAGES,
        actor_over_engine=GAPS,
        loss=kind,
        mask_beyond_nats=0.4,
        kl_coefficient=0.5,
        reference=[-1.0, -1.0, 0.0, 0.0, 0.0],
    )
    assert grads == pytest.approx(gradients, rel=1e-5, abs=1e-7)
    assert (got, count) == (pytest.approx(sum(gradients), rel=1e-5), denominator)
    assert reported["mismatch/num_masked_sequences"] == 1
    assert reported["mismatch/masked_share"] == 3


def test_sequences_all_beyond_the_limit_give_no_gradient():
    got, count, grads, reported = run(
        [1.0] * 5, ADVANTAGES, actor_over_engine=GAPS, loss="gspo", mask_beyond_nats=0.1
    )
    assert (got, count, grads) == (0.0, 0, [0.0] * 5)
    assert reported["mismatch/num_masked_sequences"] == 2


OVER_SAMPLED = {"mismatch/k1", "mismatch/kl", "mismatch/far_share", "mismatch/masked_share"}


@pytest.mark.field
@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "dr_grpo", "gspo"])
def test_reports_about_the_loss_cover_the_tokens_in_the_loss(kind):
    """B is masked: means are those of a row of A alone, and only the mismatch is over both."""
    options = {"loss": kind, "kl_coefficient": 0.5, "importance_sampling": "token"}
    reference = [-1.5, -0.5, 3.0, 3.0, 3.0]
    *_, masked = run_pairs(
        RATIOS,
        ADVANTAGES,
        actor_over_engine=GAPS,
        reference=reference,
        mask_beyond_nats=0.4,
        **options,
    )
    *_, whole = run_pairs(
        RATIOS[:2] + [1.0] * 3,
        ADVANTAGES,
        actor_over_engine=GAPS[:2] + (1.0,) * 3,
        reference=reference[:2] + [-1.0] * 3,
        **options,
    )
    for name, (value, count) in masked.items():
        if name in OVER_SAMPLED | {"mismatch/abs_max", "mismatch/num_masked_sequences"}:
            assert count == 5, name
            continue
        assert count == 2, name
        # Each of B's tokens in the whole row has ratio and weight 1, KL 0 and logprob -1.
        neutral = 3.0 if name in ("importance/weight", "entropy") else 0.0
        assert whole[name] == (pytest.approx(value + neutral, rel=1e-6), 5), name
    assert masked["reference_kl"][0] > 0.1 and masked["importance/weight"][0] != 2


@pytest.mark.field
def test_reports_about_the_loss_cover_no_token_if_all_are_masked():
    *_, reported = run_pairs(RATIOS, ADVANTAGES, actor_over_engine=GAPS, mask_beyond_nats=1e-12)
    counts = {name: count for name, (_, count) in reported.items()}
    assert counts["clipped_share"] == counts["old_kl"] == counts["ratio_max"] == 0
    assert counts["mismatch/kl"] == counts["mismatch/masked_share"] == 5


def test_a_gap_beyond_the_mismatch_bound_stops_the_run_even_if_masked():
    with pytest.raises(EngineError, match="disagree by 1.4 nats"):
        run([1.0] * 5, ADVANTAGES, actor_over_engine=GAPS, bound=1.0, mask_beyond_nats=0.1)
