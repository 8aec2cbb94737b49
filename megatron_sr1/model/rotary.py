"""Rotary tables: one row of angles a token, for text (three position rows) and for vision (two).

In: positions. Out: angles [tokens, 1, 1, width] as Megatron's unfused `apply_rotary_pos_emb` takes
them. A table has one row for each token that a rank holds, in the rank's order, so packing and
context parallelism need no further rule. Formulas: transformers,
models/qwen2_5_vl/modeling_qwen2_5_vl.py (RoFormer, arXiv 2104.09864, with sections by axis).
"""

from __future__ import annotations

import torch


def inverse_frequencies(width: int, theta: float, device: torch.device) -> torch.Tensor:
    """theta^(-2i/width) for i < width/2: [width / 2] float32."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / theta**exponents


def text_angles(
    position_ids: torch.Tensor, head_dim: int, theta: float, sections: tuple[int, int, int]
) -> torch.Tensor:
    """Angles of the language model's multimodal rotary embedding.

    Args:
        position_ids: [3, 1, T] int64: time, height, width.
        head_dim: width of a head.
        theta: base.
        sections: frequencies that turn by each of the three; sums to head_dim / 2.

    Returns:
        [T, 1, 1, head_dim] float32.
    """
    frequencies = inverse_frequencies(head_dim, theta, position_ids.device)
    angles = position_ids[:, 0, :, None].float() * frequencies
    by_axis = angles.split(sections, dim=-1)
    half = torch.cat([part[axis] for axis, part in enumerate(by_axis)], dim=-1)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def vision_angles(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Angles of the vision tower: half of the frequencies turn by row, half by column.

    Args:
        positions: [patches, 2] int64: row and column of each patch in its image.
        head_dim: width of a head.
        theta: base.

    Returns:
        [patches, 1, 1, head_dim] float32.
    """
    frequencies = inverse_frequencies(head_dim // 2, theta, positions.device)
    half = (positions[:, :, None].float() * frequencies).flatten(1)
    return torch.cat([half, half], dim=-1)[:, None, None, :]
