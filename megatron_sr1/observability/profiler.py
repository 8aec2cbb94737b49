"""Profiles of a window of steps, with torch.profiler.

In: the first and last step of the window. Out: `profile/rank_R_steps_A_B.json.gz` in the run
directory, which Perfetto (ui.perfetto.dev) and chrome://tracing open. The phases of a step
have the same names there as in `time/PHASE_seconds`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.profiler import profile

log = logging.getLogger(__name__)
PROFILE_FOLDER = "profile"


class StepProfiler:
    """Records the steps of a window; does nothing outside of it."""

    def __init__(self, steps: Sequence[int], num_steps: int, run_dir: Path, rank: int) -> None:
        """Set the window.

        Args:
            steps: first and last step of the window, from 1; empty for none.
            num_steps: steps of the run; a longer window ends there.
            run_dir: run directory.
            rank: of this process, for the file's name.
        """
        first, last = steps or (0, 0)
        self._first, self._last = first, min(last, num_steps)
        self._folder, self._rank = run_dir / PROFILE_FOLDER, rank
        self._running: profile | None = None
        self._began = 0

    def begin(self, step: int) -> None:
        """Start recording before a step if it is in the window."""
        if self._running is not None or not self._first <= step <= self._last:
            return
        from torch.profiler import profile

        self._running, self._began = profile(), step
        self._running.start()

    def end(self, step: int) -> Path | None:
        """After the last step of the window, stop, write the file and return its path."""
        if self._running is None or step < self._last:
            return None
        recorded, self._running = self._running, None
        recorded.stop()
        path = self._folder / f"rank_{self._rank}_steps_{self._began}_{step}.json.gz"
        self._folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))
        log.info("profile of steps %d to %d: %s", self._began, step, path)
        return path
