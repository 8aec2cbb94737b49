"""Where the time and memory of a step go: seconds and peaks by phase, and torch's profiles.

Also returns free host memory to the system, without which resident memory grows for hundreds of
steps.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import profile

log = logging.getLogger(__name__)
GIB = 2**30
OUTSIDE = ""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = b"5"  # proc(5): resets VmHWM to the current resident size
RESIDENT_KIB = re.compile(rb"^Vm(HWM|RSS):\s*(\d+)", re.MULTILINE)
STEPS_BETWEEN_TRIMS = 10
"""The step after a trim has to request the returned memory again."""
PROFILE_DIRECTORY = "profile"


class StepMeter:
    """Wall time and peak memory of a step, by phase; a nested phase counts for the inner one only.

    Times are `time/PHASE_seconds`, which never sum to more than `time/step_seconds`. Memory, GiB,
    is `memory/host_gib` now, `memory/host_peak_gib` since the process began, `memory/gpu_peak_gib`
    in the step, and `memory/PHASE_host_gib` and `memory/PHASE_gpu_gib`, the peaks inside a phase.
    Host memory is this process's resident memory by Linux's high-water mark, which is reset at each
    boundary (where that is not permitted, there is none by phase). GPU memory is what torch's
    allocator has allocated.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start the first step; `clock` returns seconds."""
        self._clock, self._marked = clock, clock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._peaks: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._open = [OUTSIDE]
        self._host_peak_gib = 0.0
        # Kept open, as opening them at each boundary takes several ms of a step.
        self._status, self._clear = os.open(STATUS, os.O_RDONLY), -1
        with suppress(OSError):
            self._clear = os.open(CLEAR, os.O_WRONLY)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block, also if it raises."""
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def move(self, source: str, target: str, seconds: float) -> None:
        """Move `seconds` from one phase to another, at most what the first one has."""
        moved = min(max(seconds, 0.0), self._seconds[source])
        self._seconds[source] -= moved
        self._seconds[target] += moved

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the metrics of time and those of memory, and start the next step."""
        now_gib, whole = self._mark(), sum(self._seconds.values())
        del self._seconds[OUTSIDE]
        times = {f"time/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        times["time/step_seconds"] = whole
        memory = {"memory/host_gib": now_gib, "memory/host_peak_gib": self._host_peak_gib}
        on_gpu = [gib for (_, kind), gib in self._peaks.items() if kind == "gpu"]
        if on_gpu:
            memory["memory/gpu_peak_gib"] = max(on_gpu)
        for (phase, kind), gib in self._peaks.items():
            if phase != OUTSIDE:
                memory[f"memory/{phase}_{kind}_gib"] = gib
        self._seconds.clear()
        self._peaks.clear()
        return times, memory

    def _mark(self) -> float:
        """Add time and peaks since the last boundary to the open phase; return host GiB now."""
        since, self._marked = self._marked, self._clock()
        self._seconds[self._open[-1]] += self._marked - since
        status = os.pread(self._status, 1 << 14, 0)
        kib = {name: int(number) for name, number in RESIDENT_KIB.findall(status)}
        now_gib, peak_gib = (kib.get(name, 0) * 1024 / GIB for name in (b"RSS", b"HWM"))
        peak_gib = max(now_gib, peak_gib)
        self._host_peak_gib = max(self._host_peak_gib, peak_gib)
        peaks = {}
        if torch.cuda.is_available():
            peaks["gpu"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            os.write(self._clear, RESET_PEAK)
            peaks["host"] = peak_gib
        for kind, gib in peaks.items():
            key = self._open[-1], kind
            self._peaks[key] = max(self._peaks[key], gib)
        return now_gib


def trim_host_memory() -> None:
    """Collect garbage, then return free pages of all heaps (malloc_trim(3)), if the C library can.

    Batches of varying shapes leave holes between live allocations; glibc keeps the holes and
    returns only the end of its heaps.
    """
    gc.collect()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class StepProfiler:
    """Records a window of steps with torch.profiler; does nothing outside of it.

    Writes `profile/rank_R_steps_A_B.json.gz` in the run directory, which Perfetto (ui.perfetto.dev)
    and chrome://tracing open. The phases of a step have the same names there as in
    `time/PHASE_seconds`.
    """

    def __init__(self, steps: Sequence[int], num_steps: int, run_dir: Path, rank: int) -> None:
        """Set the window: `steps` is its first and last step, from 1, or empty for none.

        A window that is longer than the run ends after `num_steps`.
        """
        first, last = steps or (0, 0)
        self._first, self._last = first, min(last, num_steps)
        self._directory, self._rank = run_dir / PROFILE_DIRECTORY, rank
        self._running: profile | None = None
        self._began = 0

    def begin(self, step: int) -> None:
        """Start recording before a step if it is in the window."""
        if self._running is not None or not self._first <= step <= self._last:
            return
        self._running, self._began = profile(), step
        self._running.start()

    def end(self, step: int) -> None:
        """After the last step of the window, stop and write the file."""
        if self._running is None or step < self._last:
            return
        recorded, self._running = self._running, None
        recorded.stop()
        path = self._directory / f"rank_{self._rank}_steps_{self._began}_{step}.json.gz"
        self._directory.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))
        log.info("profile of steps %d to %d: %s", self._began, step, path)
