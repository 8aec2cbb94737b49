"""Which ranks of a run are there: each holds a lock that the kernel drops whatever ends it.

In: the folder of the run's stack files. Out: this rank's file, locked, and whether the next rank
is gone. SIGKILL and the kernel's out-of-memory killer leave no word behind, but the lock is free
afterwards. Each rank watches the next one only, so that a look costs the same in a world of any
size. A rank counts as gone only after we have seen it hold its lock: where locks do not reach (a
file system without them, or one that keeps them on each host), nobody is ever taken for gone.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

from megatron_sr1.errors import ConfigError

PATIENCE_SECONDS = 20.0
"""A launch that was killed a moment ago may still hold its locks for so long."""


class Presence:
    """This rank's stack file and lock, and a look at the next rank's.

    Args:
        folder: of the stack files, seen by all ranks; made if absent.
        rank: of this process in the world.
        world_size: ranks in the world.

    Attributes:
        file: `rank_N.txt`, empty and open for writing.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        """Open and lock the file.

        Raises:
            ConfigError: another process is this rank of the same run directory, or the directory
                cannot be made or written to.
        """
        self._next = (rank + 1) % world_size if world_size > 1 else None
        self._folder, self._seen = folder, False
        path, until = folder / f"rank_{rank}.txt", time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.file: TextIO = open(path, "a")  # noqa: SIM115
            except OSError as error:
                # Another rank takes the folder away at its end.
                if isinstance(error, FileNotFoundError) and time.monotonic() < until:
                    time.sleep(0.01)
                    continue
                raise ConfigError(
                    f"output={folder.parent} cannot be written to ({error.strerror}: "
                    f"{error.filename}); name another directory, or free this one"
                ) from None
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.close()
                if time.monotonic() > until:
                    raise ConfigError(
                        f"{folder.parent}: another process is rank {rank} of this run; wait for "
                        "that run or stop it, or give another output"
                    ) from None
                time.sleep(0.1)
                continue
            except OSError:  # no locks on this file system
                break
            if os.fstat(self.file.fileno()).st_nlink:
                break
            self.file.close()  # its name went to nobody between opening and locking
        self.file.truncate(0)

    def gone(self) -> int | None:
        """The next rank if it was there and its process has ended without a good end."""
        if self._next is None:
            return None
        try:
            with open(self._folder / f"rank_{self._next}.txt", "r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended_well = os.fstat(file.fileno()).st_nlink == 0
                return self._next if self._seen and not ended_well else None
        except BlockingIOError:
            self._seen = True
        except OSError:  # not there yet, or there no more after a good end
            pass
        return None

    def leave(self) -> None:
        """A good end: the file goes first, so that nobody takes us for gone."""
        Path(self.file.name).unlink(missing_ok=True)
        self.file.close()
        try:
            self._folder.rmdir()
        except OSError:  # other ranks' files are in it, or another rank was quicker
            pass
