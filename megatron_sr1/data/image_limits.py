"""Largest image after resizing: the configured limits, and what rounding adds to them.

In: `data.min_pixels`, `data.max_pixels` and the side of a merged patch. Out: the largest area that
the image processor can return. It rounds sides to whole patches after scaling the area, so an image
can exceed `max_pixels`: an enlarged one is rounded up, and a thin one keeps a width of one patch.
Source: `smart_resize` of transformers' Qwen2-VL image processor.
"""

from __future__ import annotations

import math

from megatron_sr1.data.images import MAX_ASPECT_RATIO
from megatron_sr1.errors import ConfigError


def check_limits(min_pixels: int, max_pixels: int, patch_side: int) -> None:
    """Check pixel limits against each other and against the side of a merged patch, in pixels.

    Raises:
        ConfigError: `min_pixels` is less than one patch, or more than `max_pixels`.
    """
    if min_pixels < patch_side**2:
        raise ConfigError(
            f"min_pixels={min_pixels} is less than a patch of {patch_side} x {patch_side} pixels, "
            f"so a small image would have none; set it to {patch_side**2} or more"
        )
    if min_pixels > max_pixels:
        raise ConfigError(f"min_pixels={min_pixels} is more than max_pixels={max_pixels}")


def largest_pixels(min_pixels: int, max_pixels: int, patch_side: int) -> int:
    """Return the largest area of any image after resizing, pixels.

    Args:
        min_pixels: a smaller image is enlarged to this area, its sides rounded up.
        max_pixels: a larger image is reduced to this area, its sides rounded down.
        patch_side: side of a merged patch, pixels; sides are multiples of it.
    """
    area = patch_side**2
    # Reduced: rounding down keeps the limit, unless a side below one patch is raised to one.
    thin = math.floor(math.sqrt(MAX_ASPECT_RATIO * max_pixels) / patch_side)
    largest = max(max_pixels // area, thin)
    # Enlarged to a x b = min_pixels / area patches, a <= b: the worst a is just above k - 1.
    patches = min_pixels / area
    narrowest = math.sqrt(patches / MAX_ASPECT_RATIO)
    for k in range(max(1, math.ceil(narrowest)), math.ceil(math.sqrt(patches)) + 1):
        longer = math.floor(patches / max(k - 1, narrowest)) + 1
        largest = max(largest, k * longer)
    return largest * area
