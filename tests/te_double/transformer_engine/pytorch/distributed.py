"""Checkpointed layers; other names are without a body."""

import torch.utils.checkpoint

import transformer_engine
from transformer_engine.pytorch.fp8 import STATE


def checkpoint(
    function,
    *args,
    use_reentrant=True,
    distribute_saved_activations=False,
    get_rng_state_tracker=None,
    tp_group=None,
):
    """Call a function, and again in the backward pass, under the FP8 region of the first call."""
    assert use_reentrant and not distribute_saved_activations
    region = dict(STATE)
    phases = iter(("forward", "recompute"))

    def run(*args):
        before = dict(STATE)
        STATE.update(region, phase=next(phases))
        try:
            return function(*args)
        finally:
            STATE.update(before)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return transformer_engine._Name(name, (), {"__module__": __name__})
