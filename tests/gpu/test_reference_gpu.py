"""The reference is kept in page-locked memory, in the weights' size, and used from the GPU."""

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_copies_on_the_host_are_page_locked_and_equal():
    from megatron_sr1.runtime.host_memory import host_copies

    given = [torch.randn(3, 5), torch.randn(1000, 777).bfloat16(), torch.randn(1)]
    given = [tensor.cuda() for tensor in given]
    copies = host_copies(given)
    for tensor, copy in zip(given, copies, strict=True):
        assert copy.is_pinned() and copy.device.type == "cpu"
        assert torch.equal(copy.to("cuda", non_blocking=True), tensor)
    block = copies[0].untyped_storage().nbytes()
    assert block < sum(tensor.nbytes for tensor in given) + 3 * 256
