"""Results of an evaluation by hand: intervals, parts, averages; and its file, cut anywhere."""

import json
import random

import pytest

from megatron_sr1.config.evaluation import EvaluationConfig, EvaluationSet
from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import ConfigError
from megatron_sr1.evaluation.lines import LinesFile, evaluation_line, verdicts_of
from megatron_sr1.evaluation.results import average, set_rates, set_results, write_results
from megatron_sr1.observability.metrics import each_line, read_lines
from megatron_sr1.records import Completion, Example, Message, Reading, Rollout
from megatron_sr1.rewards.score import Scorer


def row(index, accuracy, self_reward=None, sample=0, **more):
    shortcut = None if self_reward is None else int(accuracy > self_reward)
    line = {"index": index, "sample": sample, "answer": str(accuracy), "accuracy": accuracy}
    return verdicts_of(line | {"self_reward": self_reward, "shortcut": shortcut} | more)


def test_one_verdict_a_question_has_wilsons_interval():
    """8 of 10: middle 0.716740, half of the width 0.226578, by hand."""
    rates = set_results([row(i, int(i < 8)) for i in range(10)])["rates"]
    assert rates == {"accuracy": pytest.approx([0.8, 0.490162, 0.943318], abs=1e-5)}
    assert set_results([row(0, 1)])["rates"]["accuracy"][2] == 1.0, "a share stays below 1"


def test_several_responses_to_a_question_are_resampled_together():
    """All responses to a question alike: as uncertain as one response to each."""
    rows = [row(i, i % 2, sample=s) for i in range(100) for s in range(8)]
    _, low, high = set_results(rows)["rates"]["accuracy"]
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.015), "not 8 times as many questions"
    assert set_results(rows) == set_results(rows), "drawn with a seed of its own"
    halves = [row(i, s, sample=s) for i in range(9) for s in range(2)]
    assert set_results(halves)["rates"]["accuracy"] == [0.5, 0.5, 0.5], "no spread of questions"
    fractions = set_results([row(i, 0.25) for i in range(9)])["rates"]["accuracy"]
    assert fractions == [0.25, 0.25, 0.25], "a user's value between 0 and 1"


def test_a_bootstrap_interval_contains_the_truth_as_often_as_it_says():
    draw, hits = random.Random(1), 0
    for _ in range(40):
        shares = [draw.choice((0.2, 0.8)) for _ in range(50)]
        rows = [
            row(i, int(draw.random() < p), sample=s) for i, p in enumerate(shares) for s in range(4)
        ]
        _, low, high = set_results(rows)["rates"]["accuracy"]
        hits += low <= 0.5 <= high
    assert 34 <= hits, "95 % of 40 are 38"


def test_a_set_is_divided_by_source_and_category_and_has_its_table():
    rows = [row(0, 1, 1, source="a"), row(1, 1, 0, source="a"), row(2, 0, 0, source="b")]
    rows[1]["category"] = rows[2]["category"] = 7
    results = set_results([*rows, row(3, 1, source="b")])
    assert results["questions"] == results["responses"] == 4
    assert results["table"] == {
        "pass1_right_pass2_right": 1,
        "pass1_right_pass2_wrong": 1,
        "pass1_wrong_pass2_right": 0,
        "pass1_wrong_pass2_wrong": 1,
    }
    assert results["rates"]["shortcut_rate"][0] == pytest.approx(1 / 3), "of those with a pass 2"
    parts = {name: part["rates"]["accuracy"][0] for name, part in results["sources"].items()}
    assert parts == {"a": 1.0, "b": 0.5}
    assert list(results["categories"]) == ["7"] and results["categories"]["7"]["questions"] == 2
    assert set_results([row(0, 1)])["table"] == {}, "a text-only set has none"


def test_averages_are_of_sets_not_of_questions_and_by_weight():
    easy, hard = (
        {"rates": {"accuracy": [0.9, 0.87, 0.92], "self_reward": [0.5, 0.4, 0.6]}},
        {"rates": {"accuracy": [0.3, 0.26, 0.34]}},
    )
    sets = {"easy": easy, "hard": hard}
    both = average(sets, {"easy": 1, "hard": 1})
    assert both["accuracy"] == pytest.approx([0.6, 0.6 - 0.05 / 2, 0.6 + 20**0.5 / 200])
    assert both["self_reward"] == [0.5, 0.4, 0.6], "over the sets that have it"
    assert average(sets, {"easy": 1, "hard": 3})["accuracy"][0] == pytest.approx(0.45)
    assert average(sets, {"easy": 0, "hard": 1})["accuracy"] == pytest.approx([0.3, 0.26, 0.34])
    assert "self_reward" not in average(sets, {"easy": 0, "hard": 1})


def test_results_are_written_from_the_files_and_the_summary_keeps_its_rates(tmp_path):
    sets = {"a": EvaluationSet("x", weight=3), "b": EvaluationSet("y"), "loss": EvaluationSet("z")}
    for name, accuracies in {"a": (1, 1), "b": (1, 0)}.items():
        file = LinesFile(tmp_path / f"eval/{name}.jsonl")
        for index, accuracy in enumerate(accuracies):
            line = row(index, accuracy) | {"metadata": {"kind": f"k{index}"}, "response": "long"}
            file.append([line])
        file.close()
    found = {"a": {"accuracy": 1.0, "questions": 2, "ungraded": 1}, "b": {"accuracy": 0.5}}
    results = write_results(
        tmp_path, EvaluationConfig(sets, category="kind"), found | {"loss": {"loss": 2.5}}
    )
    assert json.loads((tmp_path / "eval/results.json").read_text()) == results
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["a"] == found["a"] and summary["loss"] == {"loss": 2.5}
    assert summary["average"] == {"accuracy": 0.75}
    assert summary["weighted_average"] == {"accuracy": pytest.approx(0.875)}
    assert results["sets"]["a"]["ungraded"] == 1 and results["sets"]["a"]["weight"] == 3
    assert list(results["sets"]["b"]["categories"]) == ["k0", "k1"]


def test_a_set_must_not_have_the_name_of_an_average():
    with pytest.raises(ConfigError, match=r"evaluation.sets.average: .*use another"):
        load_config(None, ["model.path=x", "stage=eval", "evaluation.sets.average.path=y"])


def test_a_line_has_the_rule_of_each_verdict():
    example = Example(3, "k", "s", (Message("user", "<image>How many?"),), "7", 1, {"source": "x"})
    response = "<description>seven dots</description><think>7</think>\\boxed{7}"
    reading = Reading((Completion((), (), "no idea", "stop"),))
    rollout = Rollout(
        3, 0, (), Completion((), (), response, "stop"), "seven dots", reading, weight_version=0
    )
    config = load_config(None, ["model.path=x"]).reward
    with Scorer(config) as scorer:
        line = evaluation_line(rollout, scorer.score("k", rollout, example), example, "rendered")
    assert line["prompt"] == "rendered" and line["source"] == "x"
    assert (line["accuracy"], line["because"]) == (1, "text")
    assert (line["self_reward"], line["reading_because"]) == (0, "no box")
    assert line["shortcut"] == 1 and json.loads(json.dumps(line)) == line


def test_a_file_that_was_cut_anywhere_goes_on_with_whole_questions(tmp_path):
    lines = [row(i, 1, sample=s) | {"response": "é" * i} for i in range(4) for s in range(2)]
    whole, path = LinesFile(tmp_path / "whole.jsonl"), tmp_path / "cut.jsonl"
    whole.append(lines)
    whole.close()
    data = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    near = {end + offset for end in ends for offset in (-1, 0, 1)}
    for cut in sorted({*range(0, len(data), 50), *near} - {len(data) + 1}):
        path.with_name("cut.jsonl.partial").write_bytes(data[:cut])
        file = LinesFile(path, resume_with=2)
        kept = sum(end <= cut for end in ends[1::2])
        assert [each["index"] for each in file.verdicts] == [i for i in range(kept) for _ in (0, 1)]
        file.append(lines[2 * kept :])
        file.close()
        assert path.read_bytes() == data
        path.unlink()
    path.write_bytes(data)
    finished = LinesFile(path, resume_with=2)
    assert len(finished.verdicts) == 8 and set_rates(finished.verdicts)["questions"] == 4
    LinesFile(path).close()
    assert path.read_bytes() == b"", "without resuming it starts over"


def test_lines_are_read_one_at_a_time_without_a_truncated_last_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": ')
    first = next(each_line(path))
    assert first == {"a": 1} and read_lines(path) == [first, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match="delimiter"):
        read_lines(path)
    assert read_lines(tmp_path / "none") == []
