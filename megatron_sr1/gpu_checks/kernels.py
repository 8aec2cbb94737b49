"""Where the time of a piece of work goes, by class of kernel, from torch's profiler.

On a GPU the kernels on the device are counted, and the time in which at least one of them runs; on
a CPU torch's operations, by their own time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CLASSES = {
    "communication": r"nccl|gloo|c10d",
    "attention": r"flash|fmha|attention|sdpa|softmax_warp",
    "products": r"gemm|gemv|cutlass|nvjet|xmma|splitk|matmul|::(add)?b?mm|::linear",
    "convolution": r"conv",
    "norms": r"norm",
    "optimizer": r"multi_tensor|adam|foreach|lamb",
    "copies": r"memcpy|memset|::copy_|::_to_copy|direct_copy|CatArray",
    "indexing": r"index|gather|scatter|embedding",
    "reductions": r"reduce|::sum|::logsumexp|softmax",
}
"""Class -> pattern of a kernel's name, in any case; the first that matches counts."""
OTHER = "elementwise and other"
NUM_NAMED = 3


@dataclass(frozen=True)
class Timeline:
    """Time of a piece of work, seconds.

    Attributes:
        by_class: sum of the kernels' times, the largest first.
        busy: time in which at least one kernel ran; on a CPU, the sum.
        largest: names of the kernels outside of products and attention that take most, with theirs.
    """

    by_class: dict[str, float]
    busy: float
    largest: dict[str, float]


def timeline(work: Callable[[], Any], kind: str) -> Timeline:
    """Profile a call on a device of a kind, cuda or cpu."""
    events = kernel_events(work, kind)
    by_class: defaultdict[str, float] = defaultdict(float)
    by_name: defaultdict[str, float] = defaultdict(float)
    for name, start, end in events:
        group = class_of(name)
        by_class[group] += end - start
        if group not in ("products", "attention"):
            by_name[name] += end - start
    largest = sorted(by_name, key=lambda name: -by_name[name])[:NUM_NAMED]
    spans = [(start, end) for _, start, end in events]
    return Timeline(
        dict(sorted(by_class.items(), key=lambda item: -item[1])),
        covered(spans) if kind == "cuda" else sum(by_class.values()),
        {name: by_name[name] for name in largest},
    )


def names(work: Callable[[], Any], kind: str, group: str) -> str:
    """Return the names of a class's kernels in a call, shortened."""
    found = {shortened(name) for name, *_ in kernel_events(work, kind) if class_of(name) == group}
    return ", ".join(sorted(found)) or f"no kernel of class {group}"


def class_of(name: str) -> str:
    """Return the class of a kernel or an operation by its name."""
    for group, pattern in CLASSES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return OTHER


def shortened(name: str) -> str:
    """Return a kernel's name without return type, template arguments and parameters."""
    plain = re.sub(r"^void ", "", re.split(r"[<(]", name)[0])
    return plain.rpartition("::")[2] or plain


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kernel_events(work: Callable[[], Any], kind: str) -> list[tuple[str, float, float]]:
    """Return name, start and end of each kernel of a call, seconds."""
    activity = ProfilerActivity.CUDA if kind == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in recorded.events() or ():
        start = event.time_range.start / 1e6
        if kind == "cpu":
            found.append((event.name, start, start + event.self_cpu_time_total / 1e6))
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found.append((event.name, start, event.time_range.end / 1e6))
    return found
