"""Transformer Engine's core attention over a packed row, imported only if layers.py needs it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_sr1.model.attention import PackedRow


class PackedTEAttention(TEDotProductAttention):
    """Transformer Engine's attention in its packed layout, for a row that is sbhd elsewhere.

    Context parallelism is Transformer Engine's own here (point to point, the only kind that
    supports packed rows): it takes this rank's share in the order of row_split.py, and the
    boundaries of the whole row.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend as `PackedAttention.forward` does."""
        assert packed_seq_params is not None
        packed = copy.copy(packed_seq_params)
        packed.qkv_format = "thd"
        context = super().forward(
            query[:, 0],
            key[:, 0],
            value[:, 0],
            None,
            attn_mask_type=attn_mask_type,
            packed_seq_params=packed,
            **kwargs,
        )
        return context.reshape(query.shape[0], 1, -1)
