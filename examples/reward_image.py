r"""A reward function that opens the image: it grades points by their distance in the picture.

    megatron-sr1 train CONFIG reward.function=examples/reward_image.py:near

docs/reward.md describes the arguments of such functions and what happens if one fails.
"""

from __future__ import annotations

import math
import re

from PIL import Image


def near(*, response: str, gold: str, images: list[Image.Image]) -> float:
    r"""Grade \boxed{(x, y)}, pixels: 1 at the gold point, 0 from a tenth of the diagonal on."""
    boxed = re.findall(r"\\boxed\{\((\d+), *(\d+)\)\}", response)
    if not boxed:
        return 0.0
    x, y = map(int, re.findall(r"\d+", gold))
    distance = math.dist((x, y), map(int, boxed[-1]))
    return max(0.0, 1 - 10 * distance / math.hypot(*images[0].size))
