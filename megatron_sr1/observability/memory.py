"""Peak memory, by phase of a step.

In: the boundaries of phases. Out: metrics in GiB: `memory/host_gib` now, `memory/host_peak_gib`
since the process began, `memory/gpu_peak_gib` in the step, and `memory/PHASE_host_gib` and
`memory/PHASE_gpu_gib`, the peaks inside a phase. Host memory is this process's resident memory by
Linux's high-water mark, which is reset at each boundary (where that is not permitted, there is none
by phase). GPU memory is what torch's allocator has allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GIB = 2**30
OUTSIDE = ""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets VmHWM to the current resident size


class PeakMemory:
    """Peaks since the last `take`; a nested phase counts for the inner one only."""

    def __init__(self) -> None:
        """Start outside of any phase."""
        self._open = [OUTSIDE]
        self._peaks: dict[tuple[str, str], float] = {}
        self._host_peak_gib = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak of a block, also if it raises."""
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Return the metrics and start the next step."""
        now_gib = self._mark()
        taken = {"memory/host_gib": now_gib, "memory/host_peak_gib": self._host_peak_gib}
        on_gpu = [gib for (_, kind), gib in self._peaks.items() if kind == "gpu"]
        if on_gpu:
            taken["memory/gpu_peak_gib"] = max(on_gpu)
        for (phase, kind), gib in self._peaks.items():
            if phase != OUTSIDE:
                taken[f"memory/{phase}_{kind}_gib"] = gib
        self._peaks = {}
        return taken

    def _mark(self) -> float:
        """Add the peaks since the last boundary to the open phase; return the host GiB now."""
        now_gib, peak_gib = _host()
        self._host_peak_gib = max(self._host_peak_gib, peak_gib)
        peaks = _gpu()
        with suppress(OSError):
            CLEAR.write_text(RESET_PEAK)
            peaks["host"] = peak_gib
        for kind, gib in peaks.items():
            key = (self._open[-1], kind)
            self._peaks[key] = max(self._peaks.get(key, 0.0), gib)
        return now_gib


def _host() -> tuple[float, float]:
    """Return the resident GiB now, and at the peak since the last reset."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    now = int(lines["VmRSS"].split()[0]) * 1024 / GIB
    peak = int(lines.get("VmHWM", "0 kB").split()[0]) * 1024 / GIB
    return now, max(now, peak)


def _gpu() -> dict[str, float]:
    """Return the allocator's peak since the last call and reset it; empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return {"gpu": peak}
