"""Order of samples: each one exactly once per epoch of its set, the same under every layout.

Several sets share a step in proportion to their weights, and each has epochs of its own. Their
samples have one index space: those of a set follow those of the set before it.

The state is plain JSON that does not depend on ranks, so a run can be resumed on another number of
them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_sr1.errors import DataError


class Loader:
    """Yields the sample indices of each step, those of all ranks, epoch after epoch."""

    def __init__(
        self,
        sizes: Sequence[int],
        per_step: int,
        seed: int,
        shuffle: bool = True,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """Start at the first epoch of each set.

        `sizes` are the numbers of samples of the sets, `shares` their names and parts of a step,
        with a sum of 1; None for a single set. The order of an epoch is that of the set or,
        shuffled, follows from seed, epoch and place of the set.
        """
        if not sizes or min(sizes) < 1:
            raise DataError("the dataset is empty: there is nothing to draw a step from")
        assert per_step >= 1, per_step
        self.num_samples, self.per_step = sum(sizes), per_step
        self.seed, self.shuffle = seed, shuffle
        self._orders: dict[str, _Order] = {}
        first = 0
        for (name, share), size in zip((shares or {"": 1.0}).items(), sizes, strict=True):
            seeds = (seed, len(self._orders)) if shuffle else None
            self._orders[name] = _Order(range(first, first + size), share, seeds)
            first += size

    def next_step(self) -> list[int]:
        """Return the indices of the next step and advance.

        If a step extends into the next epoch of a set, a sample that it already holds is deferred
        to the following step, so that no step holds a sample twice (if there are enough samples).
        """
        step: list[int] = []
        while len(step) < self.per_step:
            step += self._draw(min(self.per_step - len(step), self.num_samples), ())
        return step

    def upcoming(self) -> list[int]:
        """Return what `next_step` will return, without advancing."""
        ahead = copy.copy(self)
        ahead._orders = copy.deepcopy(self._orders)
        return ahead.next_step()

    def more(self, count: int, held: Iterable[int]) -> list[int]:
        """Return further indices for a step and advance; they count as consumed.

        None of `held`, which the step has already, is returned again. If it has the rest of the
        samples, fewer than `count` are returned.
        """
        return self._draw(min(count, self.num_samples - len(set(held))), held)

    def _draw(self, count: int, held: Iterable[int]) -> list[int]:
        """Draw indices that are not in `held`, and each only once.

        The next one comes from the set that is furthest behind its share of all samples drawn so
        far. A set of which all samples are held is passed over, and catches up later.
        """
        orders, seen = list(self._orders.values()), set(held)
        drawn: list[int] = []
        left = [len(o.indices) - sum(i in o.indices for i in seen) for o in orders]
        before = sum(order.drawn for order in orders)
        for total in range(before + 1, before + count + 1):
            open_sets = (number for number, some in enumerate(left) if some)
            chosen = max(open_sets, key=lambda n: orders[n].share * total - orders[n].drawn)
            left[chosen] -= 1
            drawn.append(orders[chosen].next(seen))
            seen.add(drawn[-1])
        if len(orders) > 1 and self.shuffle:
            # Or every n-th prompt, which is what a replica takes, could be of the same set.
            mixed = np.random.default_rng([self.seed, before, len(orders)]).permutation(drawn)
            return [int(index) for index in mixed]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as plain JSON."""
        cursors = {name: order.cursor() for name, order in self._orders.items()}
        return {**self._facts(), "cursors": cursors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved cursor; only the number of samples per step may differ."""
        # An older state has the cursor of its only set in itself.
        older = {"mixture": {"": [state["num_samples"], 1.0]}, "cursors": {"": state}}
        state = {**older, **state}
        for name, value in self._facts().items():
            if state[name] != value:
                raise DataError(
                    f"resume: the saved data order has {name}={state[name]}, this run has {value}; "
                    "use the same data and seed, or start a new run"
                )
        for name, order in self._orders.items():
            order.move_to(state["cursors"][name])

    def _facts(self) -> dict[str, Any]:
        """Return what decides the order; `mixture` has the size and the share of each set."""
        mixture = {name: [len(one.indices), one.share] for name, one in self._orders.items()}
        names = ("seed", "shuffle", "num_samples")
        return {**{name: getattr(self, name) for name in names}, "mixture": mixture}


class _Order:
    """Order of the samples of one set.

    Attributes:
        indices: of its samples.
        share: of all samples drawn, more than 0 and at most 1.
    """

    def __init__(self, indices: range, share: float, seeds: tuple[int, int] | None) -> None:
        """Start at epoch 0; `seeds` are those of the run and of the set, None for no shuffling."""
        self.indices, self.share, self._seeds = indices, share, seeds
        self._deferred: list[int] = []
        self._start(0)

    @property
    def drawn(self) -> int:
        """Samples that `next` has returned."""
        return self._epoch * len(self.indices) + self._position - len(self._deferred)

    def next(self, held: set[int]) -> int:
        """Return the next index that is not in `held`; those before it are deferred."""
        for place, index in enumerate(self._deferred):
            if index not in held:
                return self._deferred.pop(place)
        while (index := self._advance()) in held:
            self._deferred.append(index)
        return index

    def __deepcopy__(self, memo: Any) -> _Order:
        other = copy.copy(self)  # the order of an epoch is replaced, never changed
        other._deferred = list(self._deferred)
        return other

    def cursor(self) -> dict[str, Any]:
        """Return the place in the order as plain JSON."""
        place = {"epoch": self._epoch, "position": self._position}
        return place | {"waiting": list(self._deferred)}

    def move_to(self, cursor: dict[str, Any]) -> None:
        """Continue from a place that `cursor` returned."""
        self._start(cursor["epoch"])
        self._position, self._deferred = cursor["position"], list(cursor["waiting"])

    def _start(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = np.asarray(self.indices)
        if self._seeds is not None:
            seed, number = self._seeds
            self._order = np.random.default_rng([seed, epoch, number]).permutation(self._order)

    def _advance(self) -> int:
        if self._position == len(self.indices):
            self._start(self._epoch + 1)
        self._position += 1
        return int(self._order[self._position - 1])
