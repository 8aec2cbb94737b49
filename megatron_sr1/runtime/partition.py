"""Work shared out evenly: what goes largest first, each to whoever has the least to do.

No two shares differ by more than the largest piece (Graham, 1969, doi:10.1137/0117039).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def share_out(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Numbers of costs, the largest first, each to the share that has the least.

    Args:
        costs: of what is shared out.
        num_shares: to share it; some may have nothing.

    Returns:
        for each share numbers of costs, in the order in which they were given.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    least = [(0.0, share) for share in range(num_shares)]  # a heap
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        load, share = heapq.heappop(least)
        shares[share].append(number)
        heapq.heappush(least, (load + costs[number], share))
    return shares
