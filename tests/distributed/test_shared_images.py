"""Images that sequences of a row share are encoded once, and nothing else changes.

Losses and gradients of rows with shared images equal those of one process that encodes an image
for each sequence. Twelve images keep their order on one rank and on two. That packing shares
images is tested in tests/unit/test_data_packing.py, a whole update in test_updates.py.
"""

from pathlib import Path

import torch

from tests.model_cases import write_case

SCRIPT = Path(__file__).parent / "ranks" / "shared_images.py"
LAYOUTS = ["1x1x1", "2x1x1s", "1x2x1", "1x1x2", "2x1x1i"]


def test_the_tower_sees_each_image_once_and_loss_and_gradients_stay(tmp_path, run_ranks):
    for seed in (0, 1, 3):  # tied and untied
        _, rows = write_case(tmp_path / f"{seed:02d}", seed)
        torch.save(rows, tmp_path / f"{seed:02d}" / "samples.pt")
    done = run_ranks(SCRIPT, 2, tmp_path, *LAYOUTS)
    assert f"SAME {3 * len(LAYOUTS)} layouts" in done.stdout
