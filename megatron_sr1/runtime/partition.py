"""Balanced partition: the largest items first, each to the share with the least load.

No two shares differ by more than the largest item (Graham, 1969, doi:10.1137/0117039).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def share_out(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Partition items by cost.

    Args:
        costs: one per item.
        num_shares: number of shares; some may stay empty.

    Returns:
        for each share the indices of its items, in the order in which they were assigned.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    least = [(0.0, share) for share in range(num_shares)]  # a heap
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        load, share = heapq.heappop(least)
        shares[share].append(number)
        heapq.heappush(least, (load + costs[number], share))
    return shares
