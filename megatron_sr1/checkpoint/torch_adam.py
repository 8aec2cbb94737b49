"""What torch's AdamW needs to pass through Megatron's optimizer checkpoints unharmed.

Megatron-Core expects the number of updates once a parameter group, as Transformer Engine's and
apex's Adam keep it; torch's keeps one a parameter. Where Megatron falls back to torch's, three
things go wrong in `DistributedOptimizer` (0.16.1, megatron/core/optimizer/distrib_optimizer.py):

- `state_dict` asserts that there is a step, which a new optimizer does not have;
- `_set_main_param_and_optimizer_states` looks for a step among the loaded tensors: `KeyError`;
- `load_state_dict` gives all parameters one and the same step tensor, and AdamW counts in place:
  after one update of n parameters it would stand at n.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch


def distributed_parts(optimizer: Any) -> list[Any]:
    """Megatron's `DistributedOptimizer`s over torch's Adam inside an optimizer; None has none."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        part
        for part in chained
        if hasattr(part, "gbuf_ranges")
        and isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))
    ]


def ensure_state(optimizer: Any) -> None:
    """Give parameters that were never updated the state that a first update starts from."""
    for part in distributed_parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


@contextlib.contextmanager
def loading(optimizer: Any) -> Iterator[None]:
    """Around everything that loads a checkpoint into the optimizer."""
    parts = distributed_parts(optimizer)
    ensure_state(optimizer)
    name = "_set_main_param_and_optimizer_states"
    for part in parts:
        setattr(part, name, partial(_set_with_step, part, getattr(part, name)))
    try:
        yield
    finally:
        for part in parts:
            delattr(part, name)
    for part in parts:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _set_with_step(part: Any, original: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    group, order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][order]
    original(model_param, {"step": part.optimizer.state[main_param]["step"], **tensors})
