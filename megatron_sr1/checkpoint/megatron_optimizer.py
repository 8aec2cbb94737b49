"""Adapt optimizer state to Megatron's checkpoints: torch's AdamW, and state in bfloat16.

Megatron-Core expects the number of updates once per parameter group, as Transformer Engine's and
apex's Adam keep it; torch's keeps one per parameter. Where Megatron falls back to torch's, three
things fail in `DistributedOptimizer` (0.16.1, megatron/core/optimizer/distrib_optimizer.py):

- `state_dict` asserts that there is a step, which a new optimizer does not have;
- `_set_main_param_and_optimizer_states` looks for a step among the loaded tensors: `KeyError`;
- `load_state_dict` gives all parameters the same step tensor, and AdamW counts in place: after one
  update of n parameters it would be n.

`DistributedOptimizer` writes three float32 tensors per parameter: `param` and two moments. With
`optimizer.state: bfloat16` its `param` is the rounding compensation of the model's own weights;
taking one for the other would ruin a run silently. So it is named `compensation`, all three are
written as the bfloat16 that they are, and a checkpoint of the other kind is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sr1.errors import CheckpointError

MASTER, COMPENSATION = "optimizer.state.param.", "optimizer.state.compensation."


def _chained(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _over_torch(optimizer: Any) -> list[Any]:
    """Return Megatron's `DistributedOptimizer`s over torch's Adam inside an optimizer or None."""
    found = [part for part in _chained(optimizer) if hasattr(part, "gbuf_ranges")]
    return [part for part in found if isinstance(part.optimizer, torch.optim.Adam)]


def ensure_state(optimizer: Any) -> None:
    """Give parameters that were never updated the state that a first update starts from."""
    for part in _over_torch(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    moments = {n: torch.zeros_like(parameter) for n in ("exp_avg", "exp_avg_sq")}
                    state.update(step=torch.tensor(0.0), **moments)


@contextlib.contextmanager
def fill_step(optimizer: Any) -> Iterator[None]:
    """Complete the loaded state with a step per parameter; around all of the loading."""
    parts, name = _over_torch(optimizer), "_set_main_param_and_optimizer_states"
    ensure_state(optimizer)

    def with_step(part: Any, original: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][order]
        original(model_param, {"step": part.optimizer.state[main_param]["step"], **tensors})

    for part in parts:
        setattr(part, name, partial(with_step, part, getattr(part, name)))
    try:
        yield
    finally:
        for part in parts:
            delattr(part, name)
    for part in parts:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _in_bfloat16(optimizer: Any) -> bool:
    """Return True if an optimizer of Megatron's holds its state in bfloat16; None does not."""
    inner = (getattr(part, "optimizer", None) for part in _chained(optimizer))
    return any(getattr(one, "dtype", None) == torch.bfloat16 for one in inner)


def named_by_kind(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Rename and narrow the sharded float32 state of an optimizer that holds it in bfloat16."""
    if not _in_bfloat16(optimizer) or state["param_state"] is None:
        return state

    def narrow(tensor: Any) -> Any:
        """Return a sharded tensor, or a factory of some, in bfloat16; exact, as its values were."""
        key, data = tensor.key.replace(MASTER, COMPENSATION, 1), tensor.data.to(torch.bfloat16)
        dtype = {"dtype": data.dtype} if hasattr(tensor, "dtype") else {}
        return replace(tensor, key=key, data=data, **dtype)

    kept = {
        number: {name: narrow(tensor) for name, tensor in tensors.items()}
        for number, tensors in state["param_state"].items()
    }
    return {**state, "param_state": kept}


def check_kind(folder: Path, names: Collection[str], optimizer: Any) -> None:
    """Raise `CheckpointError` if stored tensors of these names are not of the optimizer's type."""
    kinds = {"float32": MASTER, "bfloat16": COMPENSATION}
    found = [kind for kind, prefix in kinds.items() if any(n.startswith(prefix) for n in names)]
    expected = "bfloat16" if _in_bfloat16(optimizer) else "float32"
    if optimizer is not None and found and expected not in found:  # None reads no state
        raise CheckpointError(
            f"{folder}: its optimizer state is {found[0]}, this run's is {expected}; set "
            f"optimizer.state={found[0]}, or start a new run with model.path={folder}"
        )
