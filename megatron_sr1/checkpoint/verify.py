"""A checkpoint is compared with its checksums before it is read; an older one has none and is told.

In: a `step_N` folder. Out: nothing, or one error on all ranks that names what is damaged and which
complete checkpoints are beside it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_sr1.checkpoint.folders import other_steps
from megatron_sr1.checkpoint.manifest import MANIFEST, check_files
from megatron_sr1.checkpoint.state import WITH_MANIFEST
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.groups import Groups

log = logging.getLogger(__name__)


def verify_folder(folder: Path, groups: Groups, digests: bool, saved_with: int) -> None:
    """Compare a checkpoint with its manifest; collective over all ranks.

    Args:
        folder: of the checkpoint.
        groups: the layout.
        digests: False compares names and sizes only.
        saved_with: format of its state; 0 where it has none.

    Raises:
        CheckpointError: on all ranks: a file is not as it was saved, or the manifest is missing
            where saving wrote one.
    """
    if (folder / MANIFEST).exists():
        check_files(folder, groups, digests=digests, advice=other_steps(folder))
    elif saved_with >= WITH_MANIFEST:
        raise CheckpointError(f"{folder / MANIFEST}: missing; {other_steps(folder)}")
    elif groups.world.rank == 0:
        log.warning(
            "%s has no %s: it was saved before checksums were kept, so damage to it goes unnoticed",
            *(folder, MANIFEST),
        )
