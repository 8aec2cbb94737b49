"""Which reward teaches which tokens, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_sr1.config.run import Config
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.records import Reward
from megatron_sr1.trainer.grpo import chosen_groups
from megatron_sr1.trainer.objective import Credit, credit, visual_reward
from megatron_sr1.trainer.samples import description_tokens

# (accuracy, format, self-reward) of one prompt's four samples: the answer is right in the first
# two, the description leads to it in the first and the third.
VERDICTS = [(1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 1, 0)]
OUT = math.sqrt(3) / 2  # of (1, 1, 0, 0): 0.5 / sqrt(4 x 0.25 / 3)


def rewards(verdicts):
    return [
        Reward(a, f, s, False, 0.9 * a + 0.1 * f + (s or 0.0), None, None) for a, f, s in verdicts
    ]


def given(verdicts, pay_leaks=True, **chosen):
    n = len(verdicts)
    return credited(rewards(verdicts), n, pay_leaks, **chosen)


def credited(given_rewards, n, pay_leaks=True, **chosen):
    config = Config(algorithm=AlgorithmConfig(**chosen))
    config.rollout.samples_per_prompt, config.reward.pay_leaks = n, pay_leaks
    return credit(given_rewards, config)


def test_scalar_credit_is_the_sums():
    # totals 2.0, 1.0, 1.1, 0.1: mean 1.05
    got, stats = given(VERDICTS, advantage="dr_grpo")
    assert got.advantages[0] == pytest.approx([0.95, -0.05, 0.05, -0.95], rel=1e-5)
    assert got.advantages_of(3) == {"advantage": pytest.approx(-0.95)}
    assert set(stats) == {"groups/no_spread", "groups/floored", "groups/std"}


def test_components_are_normalised_apart_and_then_added():
    # Answer (1.1, 1.1, 0.1, 0.1), visual (1.1, 0.1, 1.1, 0.1): each gives +-OUT.
    got, stats = given(VERDICTS, credit="component", answer_weight=0.5, visual_weight=0.25)
    expected = [0.75 * OUT, 0.25 * OUT, -0.25 * OUT, -0.75 * OUT]
    assert got.advantages[0] == pytest.approx(expected, rel=1e-5)
    assert set(got.advantages_of(0)) == {"advantage"}
    assert stats["groups/answer_no_spread"] == stats["groups/visual_no_spread"] == 0.0


def test_the_description_learns_from_the_visual_reward_and_the_rest_from_the_answers():
    got, _ = given(VERDICTS, credit="span")
    assert got.advantages[0] == pytest.approx([OUT, OUT, -OUT, -OUT], rel=1e-5)
    assert got.description_advantages[0] == pytest.approx([OUT, -OUT, OUT, -OUT], rel=1e-5)
    both = {"advantage": pytest.approx(OUT), "description_advantage": pytest.approx(-OUT)}
    assert got.advantages_of(1) == both


def test_format_adds_its_share_to_both_components():
    # format_share 0.5: answer (1.5, 1, 0.5, 0), less its mean 0.75; visual (0.5, 0, 1.5, 1).
    verdicts = [(1, 1, 0), (1, 0, 0), (0, 1, 1), (0, 0, 1)]
    got, _ = given(verdicts, credit="span", advantage="dr_grpo", format_share=0.5)
    assert got.advantages[0] == pytest.approx([0.75, 0.25, -0.25, -0.75])
    assert got.description_advantages[0] == pytest.approx([-0.25, -0.75, 0.75, 0.25])


@pytest.mark.parametrize("kind", ["component", "span"])
def test_a_text_only_prompt_has_its_answers_advantage_at_full_strength(kind):
    verdicts = [(1, 1, None), (1, 1, None), (0, 1, None), (0, 1, None)]
    got, stats = given(verdicts, credit=kind, answer_weight=0.4, visual_weight=0.6)
    expected = pytest.approx([OUT, OUT, -OUT, -OUT], rel=1e-5)
    assert got.advantages[0] == expected
    assert (got.description_advantages is None) == (kind == "component")
    if kind == "span":
        assert got.description_advantages[0] == expected
    assert stats["groups/visual_no_spread"] == 0.0  # no group has the reward, so none lacks spread


def test_text_only_prompts_change_nothing_for_those_with_images():
    both = rewards(VERDICTS) + rewards([(1, 1, None), (0, 1, None), (0, 1, None), (0, 1, None)])
    got, stats = credited(both, 4, credit="component")
    alone, alone_stats = given(VERDICTS, credit="component")
    np.testing.assert_array_equal(got.advantages[0], alone.advantages[0])
    # 1.1 against three of 0.1: 0.75 / sqrt((0.5625 + 3 x 0.0625) / 3) = 1.5
    assert got.advantages[1] == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert stats["groups/visual_std"] == alone_stats["groups/visual_std"]


def test_groups_teach_where_some_advantage_is_not_zero():
    flat, spread, visual_only = [(1, 1, 1)] * 4, VERDICTS, [(1, 1, s) for s in (1, 0, 1, 0)]
    both = rewards(flat + spread + visual_only)
    # Answers right, descriptions half: the sum and the visual reward have spread.
    for kind in ("scalar", "component", "span"):
        assert credited(both, 4, credit=kind)[0].teaching == [1, 2]
    # Accuracy, format and self-reward that add up to the same: flat as a sum, not apart.
    traded = [Reward(1, 0, 0, False, 1.0, None, None), Reward(0, 0, 1, False, 1.0, None, None)]
    assert credited(traded, 2)[0].teaching == []
    assert credited(traded, 2, credit="span")[0].teaching == [0]
    # Weighted alike, one component's gain is the other's loss.
    assert credited(traded, 2, credit="component")[0].teaching == []


def test_the_filter_keeps_what_teaches_and_a_step_where_nothing_does():
    mixed, _ = credited(rewards([(1, 1, 1)] * 4 + VERDICTS), 4)
    flat, _ = credited(rewards([(1, 1, 1)] * 8), 4)
    counted = {"filter/dropped_groups": 1.0, "filter/kept_groups": 1.0}
    assert chosen_groups(mixed, 2) == ([1], counted)
    counted = {"filter/dropped_groups": 2.0, "filter/kept_groups": 0.0}
    assert chosen_groups(flat, 2) == ([0, 1], counted)
    assert chosen_groups(flat, 1) == ([0], counted)  # the second was a refill


def test_an_unpaid_leak_has_no_self_reward():
    leaky = replace(rewards([(1, 1, 1)])[0], leak=True)
    assert visual_reward(leaky, 0.1, pay_leaks=True) == pytest.approx(1.1)
    assert visual_reward(leaky, 0.1, pay_leaks=False) == pytest.approx(0.1)


def test_a_rollout_names_both_advantages_only_by_span():
    numbers = np.array([[1.0, 2.0]], np.float32)
    assert Credit(numbers).advantages_of(1) == {"advantage": 2.0}
    both = {"advantage": 2.0, "description_advantage": 3.0}
    assert Credit(numbers, numbers + 1).advantages_of(1) == both


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<description>", " a", " cat", "</description>", "<think>"], (0, 4)),
        (["\n", "<des", "cription>", "cat", ".</", "description", ">\n\n", "<think>"], (1, 7)),
        (["so", "\n<", "description", ">a", "</description><", "think>"], (1, 5)),  # both shared
        (["", "<description>x</description>", ""], (1, 2)),  # a special token has no text
        (["<description>", "\ufffd", "\ufffd<", "/description>", "</description>"], (0, 4)),
        (["<description>", "never closed"], (0, 0)),
        (["</description>", "x", "<description>", "y", "</description>"], (0, 0)),  # no description
        ([], (0, 0)),
    ],
)
def test_the_tokens_of_a_description_are_those_with_a_character_of_it(pieces, expected):
    assert description_tokens(pieces) == expected


def merging_tokenizer():
    """Byte-level, as Qwen's, with tokens that merge a mark with its neighbours."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\u010a"
    merges = [(".", "<"), (".<", "/"), (">", newline), (">" + newline, newline), (">", "\\")]
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


@pytest.mark.parametrize("inside", ["a cat.", "ein Kätzchen 猫 sitzt 🐈.", "🐈"])
def test_merged_marks_and_split_characters_are_found_where_they_were_sampled(inside):
    tokenizer = merging_tokenizer()
    before = "猫 "
    text = f"{before}<description>{inside}</description>\n\n<think>🐈</think>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    first, behind = description_tokens([tokenizer.decode([i]) for i in ids])
    # As many tokens as its prefix has: the marks start and end tokens of their own here but for the
    # last, which holds the line breaks too.
    assert first == len(tokenizer.encode(before).ids)
    through = f"{before}<description>{inside}</description>\n\n"
    assert behind == len(tokenizer.encode(through).ids)
    assert tokenizer.decode(ids[first:behind]) == f"<description>{inside}</description>\n\n"


@pytest.mark.parametrize("inside", ["a cat.", "(a)", "ein Kätzchen 猫 sitzt 🐈", "x = 1"])
@pytest.mark.parametrize("behind", ["\n\n<think>", "<think>", " \\boxed{1}", "\\boxed{1}"])
def test_the_span_is_found_in_qwens_own_vocabulary(qwen_tokenizer, inside, behind):
    """It merges the marks with what stands beside them: `.</`, `>\\n\\n`, `>\\`."""
    span = f"<description>{inside}</description>"
    text = f"猫 {span}{behind}"
    encoded = qwen_tokenizer(text, return_offsets_mapping=True)
    pieces = [qwen_tokenizer.decode([token]) for token in encoded["input_ids"]]
    start, end = 2, 2 + len(span)
    inner = [n for n, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
    assert description_tokens(pieces) == (inner[0], inner[-1] + 1)
