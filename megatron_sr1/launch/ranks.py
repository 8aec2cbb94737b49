"""torchrun without its own error report: the ranks have already reported why they failed.

In: torchrun's arguments. Out: the exit status of the rank that failed first. torchrun itself would
print a traceback of its own frames and a table, 47 lines, below the one line that matters.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Start the ranks and wait for them.

    Args:
        arguments: of torchrun.

    Returns:
        0, or the status of the first rank that failed; 128 + the signal if a signal ended it or
        this process.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # how it stops which rank; exceptions are still shown
    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        sys.stderr.write(f"megatron-sr1: rank {rank} was ended by {failure.signal_name()}\n")
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # torch is still being imported
        sys.exit(130)
