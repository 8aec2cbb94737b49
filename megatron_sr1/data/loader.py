"""The order of samples: every one exactly once an epoch, the same on every layout.

In: the number of samples and a seed. Out: the indices of a step, global; each data-parallel rank
takes its share with `shard`. The state is a cursor in plain JSON; nothing in it depends on ranks,
so a run may be resumed on another number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_sr1.errors import DataError


class Loader:
    """Draws steps of sample indices, epoch after epoch."""

    def __init__(self, num_samples: int, per_step: int, seed: int, shuffle: bool = True) -> None:
        """Start at the first sample of epoch 0.

        Args:
            num_samples: samples of the dataset, 1 or more.
            per_step: samples of a step, 1 or more. A step may reach into the next epoch.
            seed: with the number of the epoch it gives the epoch's order.
            shuffle: False: the order of the dataset, each epoch.

        Raises:
            DataError: no samples.
        """
        if num_samples < 1:
            raise DataError("the dataset is empty: there is nothing to draw a step from")
        assert per_step >= 1, per_step
        self.num_samples, self.per_step = num_samples, per_step
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.position = 0, 0
        self._waiting: list[int] = []
        self._order = self._order_of(0)

    def next_step(self) -> list[int]:
        """The indices of the next step, and move on.

        Where a step reaches into the next epoch, a sample that it already holds waits for the
        following step, so that no step holds a sample twice (as far as there are enough samples).
        """
        return self._draw(self.per_step, set(), self.per_step <= self.num_samples)

    def more(self, count: int, held: Iterable[int]) -> list[int]:
        """Further indices for a step, and move on; they are consumed as the step's own are.

        Args:
            count: how many, 0 or more.
            held: what the step has drawn so far; none of it comes again in this step.

        Returns:
            `count` indices, fewer where the dataset has no more that the step does not hold.
        """
        seen = set(held)
        return self._draw(min(count, self.num_samples - len(seen)), seen, True)

    def _draw(self, count: int, held: set[int], distinct: bool) -> list[int]:
        drawn: list[int] = []
        early, self._waiting = self._waiting, []
        while len(drawn) < count:
            index = early.pop(0) if early else self._advance()
            if index in held and distinct:
                self._waiting.append(index)
            else:
                drawn.append(index)
                held.add(index)
        self._waiting += early
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The cursor, plain JSON."""
        return {
            "num_samples": self.num_samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "position": self.position,
            "waiting": list(self._waiting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a cursor stood; the number of samples a step may be another.

        Raises:
            DataError: the cursor belongs to another dataset or another order.
        """
        for name in ("num_samples", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"resume: the saved data order has {name}={state[name]}, this run has "
                    f"{getattr(self, name)}; use the same data and seed, or start a new run"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._waiting = [int(i) for i in state["waiting"]]
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


def shard(indices: Sequence[int], rank: int, size: int) -> list[int]:
    """The share of one data-parallel rank: every `size`-th index from `rank` on.

    Args:
        indices: of the whole step.
        rank: of this process among `size`.
        size: number of shares; they differ by one index at most.
    """
    assert 0 <= rank < size, (rank, size)
    return list(indices[rank::size])
