"""Patches that let Megatron-Core and torchvision run with a CPU build of torch.

Megatron refers to CUDA in three ways, each handled in the narrowest place that works:

- `torch.cuda.*` calls (current device, synchronize, RNG state, streams): `install` replaces them by
  their CPU counterparts, once, and only if torch sees no GPU: there is none, or
  `device.select_device` has hidden it.
- `device="cuda"`, `Tensor.cuda()` and comparisons with `Tensor.type()` strings: `megatron_mode`,
  a `TorchFunctionMode` entered around calls into Megatron, and left for the forward and backward
  passes of its micro-batches, which do none of this. Torch's factory functions themselves
  are never replaced: torch's device contexts look them up by identity, and with a replaced
  `torch.arange` transformers builds models from uninitialised memory.
- RNG states of `megatron.core.tensor_parallel.random`: they use the CPU generator.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_TYPE_NAMES = {
    f"torch.{name}Tensor": f"torch.cuda.{name}Tensor" for name in ("Float", "Half", "BFloat16")
}


class _Stream:
    """A stream or event of a device with a single queue, which has nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True


class _CPUMode(TorchFunctionMode):
    """Redirects calls for `cuda` to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _TYPE_NAMES.get(name, name)
        if func is torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return False
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def megatron_mode() -> AbstractContextManager[Any]:
    """Return a context for calls into Megatron; it does nothing if CUDA is available."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CPUMode()


def install() -> None:
    """Replace the `torch.cuda` functions that Megatron calls, unless CUDA is available.

    Call it before using Megatron-Core. Calling it again has no effect.
    """
    if not torch.cuda.is_available():
        _install()


@functools.cache
def _install() -> None:
    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    answers: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "manual_seed": torch.default_generator.manual_seed,
        "Stream": _Stream,
        "Event": type("_Event", (_Stream,), {}),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": contextlib.nullcontext,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
    }
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        # One function per name: torch's compiler keeps its rules by object identity.
        answers[name] = lambda *args, **kwargs: None
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    for name in ("forward_step", "backward_step"):
        setattr(schedules, name, _outside_mode()(getattr(schedules, name)))


@contextlib.contextmanager
def _outside_mode() -> Iterator[None]:
    """Leave Megatron's CPU mode for a micro-batch.

    The mode costs microseconds per operation, thousands of which are a micro-batch's, and none of
    them names CUDA.
    """
    with torch._C.DisableTorchFunction():
        yield


@functools.cache
def patch_torchvision() -> None:
    """Import torchvision, without its operator descriptions if they cannot be loaded.

    PyPI's torchvision is compiled for CUDA builds of torch. With a CPU build its compiled operators
    are not registered, and `import torchvision` fails in the two modules that describe them
    (`operator torchvision::nms does not exist`). transformers and vLLM only need its transforms, so
    those two modules are replaced by empty ones, and only if the plain import has failed. In the
    environment of `make env` they are empty files (tools/make_env.py); this function serves
    environments made with pip. Call it before importing transformers' models or vLLM.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    else:
        return
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("torchvision._meta_registrations", "torchvision._autograd_registrations"):
        sys.modules[name] = ModuleType(name)
    import torchvision  # noqa: F401, F811
