"""Results of an evaluation: rates with 95 % intervals by set, source and category, and averages.

In: the lines of `eval/NAME.jsonl`, of which only the verdicts are kept. Out: `eval/results.json`
(docs/evaluation.md has its format), and `summary.json` with the rates alone. Sources: the score
interval of Wilson (1927); a bootstrap that draws whole questions; for averages of sets, which are
independent, the sums of squared distances to each set's limits (MOVER, Zou and Donner 2008).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sr1.config.evaluation import EvaluationConfig
from megatron_sr1.evaluation.lines import Line, verdicts_of
from megatron_sr1.observability.metrics import each_line
from megatron_sr1.records import RIGHT_FROM
from megatron_sr1.report.results import RESULTS_FILE
from megatron_sr1.rewards.agreement import judge_rates
from megatron_sr1.rewards.answers import clean
from megatron_sr1.rewards.score import VERDICTS, cross
from megatron_sr1.rollout.text_stats import summarize
from megatron_sr1.runtime.files import write_text

NORMAL_95 = 1.959964
NUM_DRAWS = 1000
"""Bootstrap samples; the limits of an interval vary by about 2 % of its width."""
AVERAGES = ("average", "weighted_average")
COUNTS = ("ungraded", "skipped")
"""Questions of a set that are not in its rates."""
Rate = list[float]
"""Value, lower and upper limit of its 95 % interval."""


def set_rates(rows: Sequence[Line]) -> dict[str, float]:
    """Return the rates of a set's responses, in [0, 1], and `questions`, their number.

    accuracy, self_reward, description_exact and shortcut_rate, those that apply, are means over all
    responses. With k > 1 responses to a question also `pass@k`, the share of questions with a right
    one, and `majority@k`, that of questions whose most frequent answer is right; of equally
    frequent answers the first counts. With a judge also `accuracy_judged`, the mean of the final
    verdicts, and what `judge_rates` returns. Lengths and repetition are those of `summarize`.
    """
    found: dict[str, float] = {
        name: float(sums.sum() / counts.sum())
        for name, (sums, counts) in _by_question(rows).items()
    }
    more = {**judge_rates(rows), **summarize(rows)}
    return {**found, **more, "questions": len({row["index"] for row in rows})}


def _by_question(rows: Sequence[Line]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return of each rate its sum and its number of values in each question that has any."""
    groups = defaultdict[int, list[Line]](list)
    for row in rows:
        groups[row["index"]].append(row)
    values: dict[str, list[list[float]]] = {}
    names = {verdict: name for verdict, (name, _) in VERDICTS.items()}
    for verdict, name in {**names, "accuracy_judged": "accuracy_judged"}.items():
        given = ([r[verdict] for r in g if r.get(verdict) is not None] for g in groups.values())
        values[name] = [each for each in given if each]
    k = max(map(len, groups.values()), default=0)
    if k > 1:
        right = ([row["accuracy"] >= RIGHT_FROM for row in group] for group in groups.values())
        values[f"pass@{k}"] = [[float(any(each))] for each in right]
        values[f"majority@{k}"] = [[float(_is_majority_right(g))] for g in groups.values()]
    return {
        name: (np.array([sum(each) for each in found]), np.array([len(each) for each in found]))
        for name, found in values.items()
        if found
    }


def _is_majority_right(group: Sequence[Line]) -> bool:
    answers = [clean(row["answer"] or "") for row in group]
    ((most, _),) = Counter(answers).most_common(1)
    return bool(group[answers.index(most)]["accuracy"] >= RIGHT_FROM)


def rate_with_interval(sums: np.ndarray, counts: np.ndarray) -> Rate:
    """Return a rate and its interval: Wilson's if each question has one verdict, 0 or 1.

    Otherwise the questions are resampled, as the responses to one question depend on each other.
    """
    value, num_questions = float(sums.sum() / counts.sum()), len(sums)
    if (counts == 1).all() and np.isin(sums, (0, 1)).all():
        return [value, *_wilson(value, num_questions)]
    random, means = np.random.default_rng(0), np.empty(NUM_DRAWS)
    for draw in range(NUM_DRAWS):
        drawn = random.integers(num_questions, size=num_questions)
        means[draw] = sums[drawn].sum() / counts[drawn].sum()
    return [value, *np.percentile(means, [2.5, 97.5]).tolist()]


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = NORMAL_95**2 / n
    middle = (share + z / 2) / (1 + z)
    half = NORMAL_95 / (1 + z) * math.sqrt(share * (1 - share) / n + z / (4 * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def part_results(rows: Sequence[Line]) -> dict[str, Any]:
    """Return the results of some responses: counts, rates, and the table of pass 1 x pass 2."""
    cells = cross((row["accuracy"], row["self_reward"]) for row in rows)
    words = {True: "right", False: "wrong"}
    return {
        "questions": len({row["index"] for row in rows}),
        "responses": len(rows),
        "rates": {name: rate_with_interval(*each) for name, each in _by_question(rows).items()},
        "table": {
            f"pass1_{words[first]}_pass2_{words[second]}": cells[first, second]
            for first in words
            for second in words
            if cells
        },
        "judge": judge_rates(rows),
        "lengths": summarize(rows),
    }


def set_results(rows: Sequence[Line]) -> dict[str, Any]:
    """Return the results of a set, and of each of its sources and categories, largest first."""
    results = part_results(rows)
    for key, name in (("sources", "source"), ("categories", "category")):
        parts = defaultdict[str, list[Line]](list)
        for row in rows:
            if row[name] is not None:
                parts[str(row[name])].append(row)
        largest = sorted(parts.items(), key=lambda part: (-len(part[1]), part[0]))
        results[key] = {part: part_results(own) for part, own in largest}
    return results


def average(sets: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, Rate]:
    """Return the weighted mean over the sets of each rate, over those that have it."""
    means: dict[str, Rate] = {}
    for name in dict.fromkeys(rate for each in sets.values() for rate in each["rates"]):
        own = {s: each["rates"][name] for s, each in sets.items() if name in each["rates"]}
        total = sum(weights[s] for s in own)
        if total:
            shares = {s: weights[s] / total for s in own}
            value = sum(shares[s] * rate[0] for s, rate in own.items())
            below, above = (
                math.hypot(*(shares[s] * (rate[limit] - rate[0]) for s, rate in own.items()))
                for limit in (1, 2)
            )
            means[name] = [value, max(value - below, 0.0), min(value + above, 1.0)]
    return means


def write_results(
    run_dir: Path, evaluation: EvaluationConfig, found: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Write eval/results.json and summary.json from the sets' files; return the former.

    `found` holds the rates of each set by its name, as `set_rates` returns them, and its counts of
    questions left out.
    """
    sets: dict[str, dict[str, Any]] = {}
    for name, rates in found.items():
        lines = each_line(run_dir / f"eval/{name}.jsonl")
        rows = [verdicts_of(line, evaluation.category) for line in lines]
        if rows:
            counts = {key: rates[key] for key in COUNTS if key in rates}
            weight = evaluation.sets[name].weight if name in evaluation.sets else 1.0
            sets[name] = {"weight": weight, **counts, **set_results(rows)}
    results: dict[str, Any] = {"sets": sets}
    summary: dict[str, Any] = dict(found)
    if len(sets) > 1:
        weights = {name: each["weight"] for name, each in sets.items()}
        for key, used in zip(AVERAGES, (dict.fromkeys(sets, 1.0), weights), strict=True):
            results[key] = average(sets, used)
            summary[key] = {rate: value for rate, (value, *_) in results[key].items()}
    (run_dir / RESULTS_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return results
