"""What malloc keeps between live blocks is given back."""

import psutil

from megatron_sr1.runtime.host_memory import give_back

BLOCK_BYTES, NUM_BLOCKS, LIVING = 4096, 30_000, 100


def test_free_pages_between_live_blocks_go_back_to_the_system():
    resident = psutil.Process().memory_info
    blocks = [bytearray(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    living = blocks[::LIVING] + blocks[-1:]
    del blocks
    held = resident().rss
    give_back()
    assert held - resident().rss > 0.5 * BLOCK_BYTES * NUM_BLOCKS
    assert len(living) == NUM_BLOCKS // LIVING + 1
