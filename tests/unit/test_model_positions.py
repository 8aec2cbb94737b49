"""Rotary angles by hand; window order and patch positions against transformers' own functions."""

import math

import pytest
import torch

from megatron_sr1.errors import DataError
from megatron_sr1.model.layers import text_angles, vision_angles
from megatron_sr1.model.vision import image_layout, row_layout

GRIDS = ((1, 4, 12), (1, 8, 8), (2, 6, 10), (1, 2, 2), (1, 4, 12))


def test_text_angles_take_each_section_from_its_axis():
    positions = torch.tensor([[3], [5], [7]])[:, None]
    angles = text_angles(positions, head_dim=8, theta=16.0, sections=(1, 2, 1))
    # Frequencies 16^0, 16^-1/4, 16^-1/2, 16^-3/4; axes: time, height, height, width; twice.
    half = [3.0, 5 / 2, 5 / 4, 7 / 8]
    assert angles.shape == (1, 1, 1, 8)
    assert angles.flatten().tolist() == pytest.approx(half + half)


def test_vision_angles_are_row_frequencies_then_column_frequencies():
    angles = vision_angles(torch.tensor([[2, 9]]), head_dim=8, theta=100.0)
    half = [2.0, 0.2, 9.0, 0.9]
    assert angles.flatten().tolist() == pytest.approx(half + half)


@pytest.mark.parametrize(("merge", "window"), [(2, 1), (2, 2), (2, 3), (1, 3), (2, 50)])
def test_window_order_and_positions_are_those_of_transformers(merge, window):
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_position_ids,
        get_vision_window_index,
    )

    grid = torch.tensor(GRIDS)
    layout = row_layout(GRIDS, merge, window, torch.device("cpu"))
    order, borders = get_vision_window_index(
        grid, spatial_merge_size=merge, window_size=window * merge * 14, patch_size=14
    )
    assert layout.order.tolist() == order.tolist()
    assert layout.windows.cu_seqlens_q.tolist() == borders.tolist()
    assert layout.images.cu_seqlens_q.tolist() == get_vision_cu_seqlens(grid).tolist()
    by_token = get_vision_position_ids(grid, merge).unflatten(0, (-1, merge**2))
    assert layout.positions.tolist() == by_token[order].flatten(0, 1).tolist()
    assert layout.order[layout.inverse].tolist() == list(range(len(order)))


def test_a_grid_that_does_not_merge_is_refused():
    with pytest.raises(DataError, match="3 x 4"):
        image_layout(1, 3, 4, 2, 4)


def test_windows_cover_the_image_and_none_is_larger_than_its_side():
    _, _, window_lengths = image_layout(1, 10, 14, 2, 2)
    assert len(window_lengths) == math.ceil(5 / 2) * math.ceil(7 / 2)
    assert max(window_lengths) == 2 * 2 * 4
    assert sum(window_lengths) == 10 * 14
