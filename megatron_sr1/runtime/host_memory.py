"""Copies of tensors in host memory from which a GPU reads at the speed of its bus.

`host_copies` makes them; `HostWeights` has a model's weights leave the device and come back.
`no_collection` leaves Python's garbage where it is for a while.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_ALIGNMENT_BYTES = 256


def host_copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy tensors to host memory, page-locked if they are on a GPU.

    Page-locked copies are parts of one block, which is never unlocked: keep them until the process
    ends. Torch's own page-locked memory takes up to twice the size: it rounds each tensor's up to a
    power of two.
    """
    if not any(tensor.is_cuda for tensor in tensors):
        return [tensor.detach().clone() for tensor in tensors]
    sizes = [-(-t.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for t in tensors]
    block = torch.empty(sum(sizes), dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)))
    copies = []
    for tensor, part in zip(tensors, block.split(sizes), strict=True):
        copy = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor.detach(), non_blocking=True))
    torch.cuda.current_stream().synchronize()
    return copies


class HostWeights:
    """Weights that training leaves as they are, with one copy of them in host memory.

    On a CPU the copy is the weights themselves: the same steps move nothing.
    """

    def __init__(self, weights: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        """Take the weights, which are on `device` and are copied when they leave it at first."""
        self._weights, self._device = list(weights), device
        self._copies: list[torch.Tensor] = []
        self.has_copies = device.type == "cuda"

    def offload(self) -> None:
        """Drop the device's memory; each weight is then its copy, from which it can be read."""
        if not self._copies:
            held = [weight.data for weight in self._weights]
            self._copies = host_copies(held) if self.has_copies else held
        for weight, copy in zip(self._weights, self._copies, strict=True):
            weight.data = copy
        torch.cuda.empty_cache()  # the engine allocates outside of it; without CUDA it does nothing

    def restore(self) -> None:
        """Copy the weights to the device, in the order of what it computes."""
        for weight, copy in zip(self._weights, self._copies, strict=True):
            weight.data = copy.to(self._device, non_blocking=True, copy=self.has_copies)


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage within a block, unless it asks for it.

    If allocations start it, it comes at another time on each rank, for which the others wait;
    Megatron's `--manual-gc` avoids that, too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Within a block, look for no garbage among the objects that are there at its start."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
