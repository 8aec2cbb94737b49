"""`state.json` of a checkpoint: what a resumed run needs beside tensors and generators.

In: a folder. Out: `{"format", "step", "layout", "scheduler", "state"}`, checked before it is used:
the file may be damaged or written by someone else.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint.disk import size_text
from megatron_sr1.checkpoint.folders import STATE, step_names, whole_steps
from megatron_sr1.errors import CheckpointError
from megatron_sr1.runtime.files import write_text
from megatron_sr1.runtime.groups import Groups

FORMAT = 2
WITH_MANIFEST = 2  # formats before this one had none
MAX_BYTES = 16 * 2**20
TYPES: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "step": (int,),
    "layout": (dict,),
    "scheduler": (dict, type(None)),
    "state": (dict,),
}


def layout_of(groups: Groups) -> dict[str, int]:
    """Ranks a dimension; generators go with them."""
    return {
        "tensor": groups.tensor.size,
        "pipeline": groups.pipeline.size,
        "context": groups.context.size,
        "data": groups.data.size,
    }


def write_state(
    folder: Path, step: int, layout: Mapping[str, int], scheduler: Any, state: Mapping[str, Any]
) -> None:
    """Write the file; on one rank.

    Args:
        folder: of the checkpoint.
        step: its number.
        layout: as `layout_of` gives it; empty of a conversion, which has no ranks' generators.
        scheduler: Megatron's learning-rate schedule, or None.
        state: JSON values of the caller.
    """
    record = {
        "format": FORMAT,
        "step": step,
        "layout": dict(layout),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "state": dict(state),
    }
    write_text(folder / STATE, json.dumps(record, indent=2) + "\n", sync=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the file.

    Raises:
        CheckpointError: absent, a link, too large, not JSON, or not of this form.
    """
    path = folder / STATE
    try:
        # A link could lead anywhere, a pipe never ends.
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{path}: a link or no regular file, which no save leaves")
        if facts.st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path}: {size_text(facts.st_size)}, at most {size_text(MAX_BYTES)} expected"
            )
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = step_names(whole_steps(folder.parent)) or "nothing"
        raise CheckpointError(f"{path}: no such file; complete here: {there}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    _check(path, record)
    return dict(record)


def _check(path: Path, record: Any) -> None:
    if not isinstance(record, dict) or record.get("format") not in range(1, FORMAT + 1):
        came = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise CheckpointError(
            f"{path}: format {came!r} came, expected 1 to {FORMAT} of a checkpoint's state"
        )
    for name, types in TYPES.items():
        if not isinstance(record.get(name), types) or isinstance(record[name], bool):
            raise CheckpointError(f"{path}: {name} is {str(record.get(name))[:40]!r}")
