"""Optimizer state in bfloat16, under a name and in a type of its own.

Megatron's `DistributedOptimizer` writes three float32 tensors a parameter: `param` and two
moments. With `optimizer.state: bfloat16` what comes as `param` is the compensation of the model's
own weights: read as weights, or weights read as it, it would ruin a run without a word. So it is
called `compensation`, all three are written as the bfloat16 that they are, and a folder of the
other kind is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.errors import CheckpointError

MASTER, COMPENSATION = "optimizer.state.param.", "optimizer.state.compensation."


def in_bfloat16(optimizer: Any) -> bool:
    """Whether an optimizer of Megatron's holds its state in bfloat16; None does not."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [getattr(part, "optimizer", None) for part in chained]
    return any(getattr(one, "dtype", None) == torch.bfloat16 for one in inner)


def named_by_kind(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's sharded state dict, as it is written and read.

    Args:
        optimizer: Megatron's.
        state: what it gave; its tensors are float32.

    Returns:
        the same where the state is float32.
    """
    if not in_bfloat16(optimizer) or state["param_state"] is None:
        return state
    kept = {
        number: {name: _narrow(tensor) for name, tensor in tensors.items()}
        for number, tensors in state["param_state"].items()
    }
    return {**state, "param_state": kept}


def check_kind(folder: Path, names: Collection[str], optimizer: Any) -> None:
    """Refuse optimizer state of the other kind before anything is read.

    Args:
        folder: of the checkpoint, for the message.
        names: of its tensors.
        optimizer: Megatron's, or None, which reads no state.

    Raises:
        CheckpointError: the folder's state is bfloat16 and the optimizer's float32, or the reverse.
    """
    kinds = {"float32": MASTER, "bfloat16": COMPENSATION}
    found = [kind for kind, prefix in kinds.items() if any(n.startswith(prefix) for n in names)]
    expected = "bfloat16" if in_bfloat16(optimizer) else "float32"
    if optimizer is not None and found and expected not in found:
        raise CheckpointError(
            f"{folder}: its optimizer state is {found[0]}, this run's is {expected}; set "
            f"optimizer.state={found[0]}, or start a new run with model.path={folder}"
        )


def _narrow(tensor: Any) -> Any:
    """A sharded tensor, or a factory of some, in bfloat16; exact, as its values were."""
    changes: dict[str, Any] = {
        "key": tensor.key.replace(MASTER, COMPENSATION, 1),
        "data": tensor.data.to(torch.bfloat16),
    }
    if hasattr(tensor, "dtype"):
        changes["dtype"] = torch.bfloat16
    return replace(tensor, **changes)
