"""Length and repetition of responses: by hand, and where they are reported."""

import numpy as np
import pytest
from rich.console import Console

from megatron_sr1.evaluation.lines import evaluation_line, verdicts_of
from megatron_sr1.evaluation.results import set_rates, set_results
from megatron_sr1.records import Completion, Example, Message, Reward, Rollout
from megatron_sr1.report.results import results_tables
from megatron_sr1.rollout.text_stats import repeated_shares, step_metrics, summarize, text_stats

EXAMPLE = Example(0, "k", "s.tar", (Message("user", "<image>?"),), "7", 1)


def rollout(token_ids, description=None, finish_reason="stop", index=0):
    completion = Completion(tuple(token_ids), (), "", finish_reason)
    return Rollout(index, 0, (1,), completion, description, None, 0)


def words(texts):
    return [text.split() for text in texts]


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [
        ([1, 2, 3], None),
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # the last 4-gram is the first again
        ([7] * 103, 99 / 100),
        (range(1000), 0.0),
        ([1, 2, 3, 4, 4, 3, 2, 1], 0.0),  # order counts
        ([2**18 - 1, 0, 0, 0, 2**18 - 1, 0, 0, 0, 1], 1 / 6),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_occurred_before(token_ids, share):
    assert repeated_shares([tuple(token_ids)]) == [share if share is None else pytest.approx(share)]


def test_repetition_equals_a_count_of_tuples_in_each_of_many_sequences():
    random = np.random.default_rng(0)
    lengths = [500, 3, 0, 4, *random.integers(0, 60, 200).tolist(), 1]
    sequences = [tuple(random.integers(0, 4, length).tolist()) for length in lengths]
    expected = []
    for ids in sequences:
        grams = [ids[i : i + 4] for i in range(len(ids) - 3)]
        expected.append(pytest.approx(1 - len(set(grams)) / len(grams)) if grams else None)
    assert repeated_shares(sequences) == expected
    assert repeated_shares([]) == []


def test_a_step_reports_lengths_truncated_share_and_repetition():
    rollouts = [
        rollout([1] * 10, "two words", "length"),
        rollout([1, 2], None),
        *(rollout(range(20), "one") for _ in range(18)),
    ]
    encoded = []
    found = step_metrics(rollouts, lambda texts: encoded.append(list(texts)) or words(texts))
    assert encoded == [["two words", "one"]], "each distinct description once, all in one call"
    assert found == pytest.approx(
        {
            "rollout/response_tokens_mean": (10 + 2 + 18 * 20) / 20,
            "rollout/response_tokens_p95": 20,
            "rollout/response_tokens_max": 20,
            "rollout/description_tokens_mean": 20 / 19,
            "rollout/description_tokens_p95": 1.1,  # between the 18th and the 19th
            "rollout/description_tokens_max": 2,
            "rollout/truncated_share": 1 / 20,
            "rollout/repetition": (6 / 7) / 19,  # the shortest has no 4-gram
        }
    )


def test_responses_without_descriptions_have_no_lengths_of_them():
    found = step_metrics([rollout(range(5))], lambda texts: pytest.fail("nothing to encode"))
    assert not [name for name in found if "description" in name]
    assert summarize([]) == {}


def test_an_evaluation_has_them_by_line_in_the_rates_and_in_the_table():
    rollouts = [rollout(range(10)), rollout([5] * 30, "a b", "length", index=1)]
    reward = Reward(1.0, 1.0, None, False, 1.0, "7", None)
    lines = [
        evaluation_line(each, reward, EXAMPLE, "p", stats)
        for each, stats in zip(rollouts, text_stats(rollouts, words), strict=True)
    ]
    assert lines[1]["response_tokens"] == 30 and lines[1]["truncated"] == 1
    assert lines[1]["description_tokens"] == 2 and lines[0]["description_tokens"] is None
    rows = [verdicts_of(line) for line in lines]
    rates = set_rates(rows)
    assert rates["response_tokens_mean"] == 20 and rates["truncated_share"] == 0.5
    assert rates["repetition"] == pytest.approx(26 / 27 / 2)
    table = results_tables({"sets": {"a": {"weight": 1.0, **set_results(rows)}}})[0]
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["tokens (p95)"] == ["20\n(29)"] and cells["truncated"] == ["50.0"]


def test_responses_made_elsewhere_have_none():
    line = evaluation_line(rollout(()), Reward(1, 1, None, False, 1, "7", None), EXAMPLE, "p")
    assert "response_tokens" not in line
    assert not [name for name in set_rates([verdicts_of(line)]) if "tokens" in name]


def test_a_table_of_all_rates_is_printed_whole():
    """150 columns hold every interval only if long headers are printed on several lines."""
    names = ("accuracy", "self_reward", "shortcut_rate", "description_exact")
    found = {"rates": dict.fromkeys(names, [0.828, 0.777, 0.869]), "questions": 256}
    cells = [f"pass1_{one}_pass2_{two}" for one in ("right", "wrong") for two in ("right", "wrong")]
    lengths = {"response_tokens_mean": 18.0, "response_tokens_p95": 23, "truncated_share": 0.0}
    found |= {"table": dict.fromkeys(cells, 64), "lengths": lengths, "weight": 1.0}
    parts = dict.fromkeys(("sources", "categories"), {})
    table = results_tables({"sets": {"a long name of a set": found | parts}})[0]
    console = Console(width=150)
    with console.capture() as printed:
        console.print(table)
    assert printed.get().count("(77.7–86.9)") == 4 and "…" not in printed.get()
