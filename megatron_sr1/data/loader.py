"""Order of samples: each one exactly once per epoch, the same under every layout.

The state is a cursor in plain JSON that does not depend on ranks, so a run can be resumed on
another number of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_sr1.errors import DataError


class Loader:
    """Yields the sample indices of each step, those of all ranks, epoch after epoch."""

    def __init__(self, num_samples: int, per_step: int, seed: int, shuffle: bool = True) -> None:
        """Start at epoch 0, whose order is that of the dataset or, shuffled, follows from seed."""
        if num_samples < 1:
            raise DataError("the dataset is empty: there is nothing to draw a step from")
        assert per_step >= 1, per_step
        self.num_samples, self.per_step = num_samples, per_step
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.position = 0, 0
        self._deferred: list[int] = []
        self._order = self._order_of(0)

    def next_step(self) -> list[int]:
        """Return the indices of the next step and advance.

        If a step extends into the next epoch, a sample that it already holds is deferred to the
        following step, so that no step holds a sample twice (if there are enough samples).
        """
        return self._draw(self.per_step, set(), self.per_step <= self.num_samples)

    def more(self, count: int, held: Iterable[int]) -> list[int]:
        """Return further indices for a step and advance; they count as consumed.

        None of `held`, which the step has already, is returned again. If it has the rest of the
        dataset, fewer than `count` are returned.
        """
        seen = set(held)
        return self._draw(min(count, self.num_samples - len(seen)), seen, True)

    def _draw(self, count: int, held: set[int], distinct: bool) -> list[int]:
        drawn: list[int] = []
        early, self._deferred = self._deferred, []
        while len(drawn) < count:
            index = early.pop(0) if early else self._advance()
            (self._deferred if distinct and index in held else drawn).append(index)
            held.add(index)
        self._deferred += early
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as plain JSON."""
        names = ("num_samples", "seed", "shuffle", "epoch", "position")
        return {name: getattr(self, name) for name in names} | {"waiting": list(self._deferred)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved cursor; only the number of samples per step may differ."""
        for name in ("num_samples", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"resume: the saved data order has {name}={state[name]}, this run has "
                    f"{getattr(self, name)}; use the same data and seed, or start a new run"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._deferred = list(state["waiting"])
        self._order = self._order_of(self.epoch)

    def _advance(self) -> int:
        if self.position == self.num_samples:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._order_of(self.epoch)
        self.position += 1
        return int(self._order[self.position - 1])

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_samples)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
