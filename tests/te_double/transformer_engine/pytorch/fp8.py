"""FP8 as a region that is entered under a recipe; nothing in it is computed in FP8.

Delayed scaling communicates as the real one does: on leaving a region with gradients, and in the
backward pass of the region's first layer, maxima are taken over the region's group. A checkpointed
layer keeps its scales until it is computed again, whether there are gradients or not.
"""

import contextlib
import math

import torch

from transformer_engine.common.recipe import DelayedScaling

STATE = {"recipe": None, "group": None, "is_first": False, "phase": None}
"""Of the region that the program is in: recipe, None outside; group; whether no layer has been
called; `forward` or `recompute` within a checkpoint."""
KEPT: list[torch.nn.Module] = []
"""Layers with scales that are kept for a recomputation, once for each call."""
GROUPS: list[tuple[int, ...]] = []
"""Ranks of each reduction."""


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return STATE["recipe"] is not None


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
    assert enabled and fp8_recipe is not None and not calibrating
    before = dict(STATE)
    STATE.update(recipe=fp8_recipe, group=fp8_group, is_first=True)
    try:
        yield
    finally:
        STATE.update(before)
        if isinstance(fp8_recipe, DelayedScaling) and torch.is_grad_enabled():
            _reduce(fp8_group)


def called(module, hidden, out):
    """Note that a layer of a region was called, with its input and output [..., features]."""
    if STATE["recipe"] is None:
        return
    assert math.prod(hidden.shape[:-1]) % 8 == 0, f"rows of {tuple(hidden.shape)} in FP8"
    if not isinstance(STATE["recipe"], DelayedScaling):
        return
    if STATE["phase"] == "forward":
        KEPT.append(module)
    elif STATE["phase"] == "recompute":
        KEPT.remove(module)
    if torch.is_grad_enabled() and out.requires_grad and STATE["is_first"]:
        group = STATE["group"]
        out.register_hook(lambda gradient: _reduce(group))
    STATE["is_first"] = False


def _reduce(group):
    GROUPS.append(tuple(torch.distributed.get_process_group_ranks(group)))
    if len(GROUPS[-1]) > 1:
        maxima = torch.ones(3)
        torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX, group=group)


def fp8_model_init(*args, **kwargs):
    raise NotImplementedError("the double keeps no weights in FP8")
