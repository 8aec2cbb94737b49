"""Layers as data: which modules a decoder layer or a vision block is made of.

In: the kind of kernels. Out: Megatron specs. `local` is torch alone and runs anywhere;
`transformer_engine` is NVIDIA's kernels and needs CUDA. The models do not know which one they
hold: both keep the packed row in the sbhd layout and hand its borders to the core attention only,
so that the rotary table stays per token (see attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.errors import ConfigError
from megatron_sr1.model.attention import PackedAttention, PackedRow


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm; under sequence parallelism its gradient is summed over the ranks.

    Megatron sums the gradients of parameters that carry `sequence_parallel` over the
    tensor-parallel ranks, as each rank saw only its share of the tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        """Make a weight of ones.

        Args:
            config: of the layer.
            hidden_size: width.
            eps: added to the mean square.
        """
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension in float32, then scale in the hidden type."""
        if hidden.dtype == torch.float32:
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        normal = F.rms_norm(hidden.float(), self.weight.shape, None, self.eps)
        return self.weight * normal.to(hidden.dtype)


class VisionSelfAttention(SelfAttention):
    """Self-attention of a vision block: over its window, or in some blocks over the image."""

    def __init__(self, *args: Any, full_attention_blocks: tuple[int, ...], **kwargs: Any) -> None:
        """Make Megatron's self-attention.

        Args:
            args: as Megatron's.
            full_attention_blocks: numbers, from 0, of the blocks that attend over the image.
            kwargs: as Megatron's.
        """
        super().__init__(*args, **kwargs)
        self.is_full = self.layer_number - 1 in full_attention_blocks

    def forward(  # type: ignore[override]
        self, *args: Any, packed_seq_params: tuple[PackedRow, PackedRow], **kwargs: Any
    ) -> Any:
        """Attend with the block's own borders.

        Args:
            args: as Megatron's.
            packed_seq_params: the row cut into windows, and cut into images.
            kwargs: as Megatron's.
        """
        windows, images = packed_seq_params
        row = images if self.is_full else windows
        return super().forward(*args, packed_seq_params=row, **kwargs)


def text_layer(kernels: str) -> ModuleSpec:
    """Spec of a decoder layer.

    Args:
        kernels: local | transformer_engine.
    """
    if kernels == "transformer_engine":
        return _transformer_engine_layer()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def vision_layer(kernels: str, full_attention_blocks: tuple[int, ...]) -> ModuleSpec:
    """Spec of a vision block.

    Args:
        kernels: local | transformer_engine.
        full_attention_blocks: numbers, from 0, of the blocks that attend over the whole image.
    """
    spec = text_layer(kernels)
    attention = spec.submodules.self_attention
    attention.module = VisionSelfAttention
    attention.params = {
        "attn_mask_type": AttnMaskType.no_mask,
        "full_attention_blocks": full_attention_blocks,
    }
    return spec


def norm(kernels: str) -> Any:
    """Class of a norm that stands alone: the decoder's last, the merger's."""
    if kernels == "local":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def linears(kernels: str) -> tuple[Any, Any]:
    """Column- and row-parallel linear classes of the merger."""
    if kernels == "local":
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
    )

    return TEColumnParallelLinear, TERowParallelLinear


def require_transformer_engine() -> None:
    """Refuse early where Transformer Engine cannot be used.

    Raises:
        ConfigError: there is no CUDA or no Transformer Engine.
    """
    if not torch.cuda.is_available():
        raise ConfigError("model.spec=transformer_engine needs CUDA; use model.spec=local")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model.spec=transformer_engine, but it does not import ({error}); install it as "
            "docs/scaling.md says, or use model.spec=local"
        ) from None


def _transformer_engine_layer() -> ModuleSpec:
    """A decoder layer of Transformer Engine's modules, attention over the packed row included."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PackedTEAttention(TEDotProductAttention):
        """Transformer Engine's attention in its packed layout, the row in sbhd outside of it.

        Context parallelism is its own then (point to point, the one kind that takes packed rows):
        it is given this rank's share in the order of row_split.py, and the whole row's borders.
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
            """As `PackedAttention.forward`."""
            assert packed_seq_params is not None
            row = packed_seq_params
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=row.cu_seqlens_q,
                cu_seqlens_kv=row.cu_seqlens_kv,
                cu_seqlens_q_padded=row.cu_seqlens_q_padded,
                cu_seqlens_kv_padded=row.cu_seqlens_kv_padded,
                max_seqlen_q=row.max_seqlen_q,
                max_seqlen_kv=row.max_seqlen_kv,
            )
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

    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = PackedTEAttention
    return spec
