"""Which checkpoints of a run stay: the last ones, and the best by an evaluation.

In: a folder of checkpoints, of which each may hold in its state what an evaluation gave:
`{"evaluation": {"accuracy": 0.81, …}}`. Out: the folder with those that stay. As the ratings lie
with the checkpoints, a run that was stopped and goes on keeps the same.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_sr1.checkpoint.folders import remove_remains, step_names, steps
from megatron_sr1.checkpoint.manifest import is_whole
from megatron_sr1.checkpoint.state import read_state
from megatron_sr1.errors import CheckpointError

log = logging.getLogger(__name__)
EVALUATION = "evaluation"


@dataclass(frozen=True)
class Keep:
    """What stays when a checkpoint has been saved.

    Attributes:
        last: the newest so many, 0 for all.
        best: so many besides, by `metric`; one may be among the last as well.
        metric: a rate of the evaluation.
        highest: whether a higher rate is the better one.
    """

    last: int = 0
    best: int = 0
    metric: str = ""
    highest: bool = True

    @staticmethod
    def by(last: int, best: int, rule: str) -> Keep:
        """From a rule such as `max accuracy`."""
        way, metric = rule.split()
        assert way in ("max", "min"), rule
        return Keep(last, best, metric, way == "max")


def remove_old(folder: Path, step: int, keep: Keep, busy: Collection[str] = ()) -> None:
    """Remove checkpoints up to a step but the complete ones that stay, and remains of others.

    Args:
        folder: of the run's checkpoints.
        step: the newest; later ones, of a run that was set back, are left alone.
        keep: what stays; the newest complete one does in any case.
        busy: names of folders that are being written.
    """
    remove_remains(folder, busy)
    present = [s for s in steps(folder) if s <= step]
    whole = [s for s in present if is_whole(folder / f"step_{s}")]
    if keep.last < 1 or not whole:
        return
    best = best_steps(folder, whole, keep)
    if best:
        log.info("best by %s: %s", keep.metric, step_names(best))
    for old in present:
        if old not in whole[-keep.last :] and old not in best:
            # Out of sight first: a removal that is cut short must not look like a checkpoint.
            gone = (folder / f"step_{old}").rename(folder / f".step_{old}.old")
            shutil.rmtree(gone, ignore_errors=True)


def best_steps(folder: Path, whole: list[int], keep: Keep) -> list[int]:
    """The best of some checkpoints, the best first; of equal ones the later is the better."""
    rated = {step: _rating(folder / f"step_{step}", keep.metric) for step in whole}
    known = {step: value for step, value in rated.items() if value is not None}
    sign = 1 if keep.highest else -1
    return sorted(known, key=lambda step: (sign * known[step], step), reverse=True)[: keep.best]


def _rating(folder: Path, metric: str) -> float | None:
    """What the evaluation of a checkpoint gave; None where there was none, or none to be read."""
    try:
        state = read_state(folder)["state"]
    except (OSError, CheckpointError):
        return None
    rates = state.get(EVALUATION)
    value = rates.get(metric) if isinstance(rates, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
