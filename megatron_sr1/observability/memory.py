"""Peaks of memory, by phase of a step.

In: the borders of phases. Out: metrics in GiB: `memory/host_gib` now, `memory/host_peak_gib` since
the process began, `memory/gpu_peak_gib` in the step, and `memory/PHASE_host_gib` and
`memory/PHASE_gpu_gib`, the peaks inside a phase. Host memory is the resident memory of this process
by Linux's own high-water mark, which is set back at each border (left out by phase where the system
does not let us); a GPU's is what torch's allocator has given out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GIB = 2**30
OUTSIDE = ""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets VmHWM back to what is resident now


class PeakMemory:
    """Peaks since the last `take`; a phase inside a phase counts for the inner one only."""

    def __init__(self) -> None:
        """Begin outside of any phase."""
        self._open = [OUTSIDE]
        self._peaks: dict[tuple[str, str], float] = {}
        self._host_peak_gib = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the peak of a block, also when it raises."""
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """The metrics; the next step starts."""
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
        """Give the peaks since the last border to the phase that is open; returns host GiB now."""
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
    """GiB resident now, and at the peak since it was last set back."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    now = int(lines["VmRSS"].split()[0]) * 1024 / GIB
    peak = int(lines.get("VmHWM", "0 kB").split()[0]) * 1024 / GIB
    return now, max(now, peak)


def _gpu() -> dict[str, float]:
    """The allocator's peak since the last call, which it sets back; none without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return {"gpu": peak}
