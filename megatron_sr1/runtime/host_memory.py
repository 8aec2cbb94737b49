"""Copies of tensors in host memory from which a GPU reads at the speed of its bus."""

from __future__ import annotations

from collections.abc import Sequence

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
