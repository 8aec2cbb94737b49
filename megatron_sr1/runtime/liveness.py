"""Which ranks of a run are alive: each holds a lock, which the kernel releases when it dies.

In: the directory of the run's stack files. Out: this rank's file, locked, and whether the next rank
has died. SIGKILL and the kernel's out-of-memory killer leave no message, but they free the lock.
Each rank watches only the next one, so that the cost does not depend on the number of ranks. A rank
counts as dead only if it was seen to hold its lock: on a file system without locks, or whose locks
are local to each host, no rank is ever taken for dead.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

from megatron_sr1.errors import ConfigError

PATIENCE_SECONDS = 20.0
"""How long a launch that has just been killed may still hold its locks."""


class Presence:
    """The stack file and lock of this rank, and a check of the next rank's lock.

    Args:
        folder: of the stack files, shared by all ranks; created if absent.
        rank: of this process in the world.
        world_size: ranks in the world.

    Attributes:
        file: `rank_N.txt`, empty and open for writing.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        """Open and lock the file.

        Raises:
            ConfigError: another process is this rank of the same run directory, or the directory
                cannot be created or written to.
        """
        self._next = (rank + 1) % world_size if world_size > 1 else None
        self._folder, self._seen = folder, False
        path, until = folder / f"rank_{rank}.txt", time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.file: TextIO = open(path, "a")  # noqa: SIM115
            except OSError as error:
                # Another rank removes the directory when it ends.
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
            self.file.close()  # it was removed between opening and locking
        self.file.truncate(0)

    def gone(self) -> int | None:
        """Return the next rank if it was alive and its process died; None otherwise."""
        if self._next is None:
            return None
        try:
            with open(self._folder / f"rank_{self._next}.txt", "r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended_well = os.fstat(file.fileno()).st_nlink == 0
                return self._next if self._seen and not ended_well else None
        except BlockingIOError:
            self._seen = True
        except OSError:  # it does not exist yet, or was removed after a normal end
            pass
        return None

    def leave(self) -> None:
        """Remove the file, then release the lock, so that this rank is not taken for dead."""
        Path(self.file.name).unlink(missing_ok=True)
        self.file.close()
        try:
            self._folder.rmdir()
        except OSError:  # other ranks' files are in it, or another rank removed it
            pass
