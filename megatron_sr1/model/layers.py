"""Layers beside Megatron's: their specs, the RMS norm, and the rotary tables.

The packed row keeps Megatron's sbhd layout, [T, 1, ...]; only the core attention is given its
boundaries. A rotary table has angles [tokens, 1, 1, width] as Megatron's unfused
`apply_rotary_pos_emb` takes them: one row per token that a rank holds, in the rank's order, so
packing and context parallelism need no further rule. Text has three position rows, vision two.
Formulas: transformers, models/qwen2_5_vl/modeling_qwen2_5_vl.py (RoFormer, arXiv 2104.09864, with
sections by axis).
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.errors import ConfigError
from megatron_sr1.model.attention import PackedAttention, PackedRow


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm.

    Under sequence parallelism each rank sees only its share of the tokens; Megatron sums gradients
    of parameters marked `sequence_parallel` over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        """Create a weight of ones; `eps` is added to the mean square."""
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return rms_norm(hidden, self.weight, self.eps)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension in float32, then scale in the input's dtype."""
    if hidden.dtype == torch.float32:
        return F.rms_norm(hidden, weight.shape, weight, eps)
    normal = F.rms_norm(hidden.float(), weight.shape, None, eps)
    return weight * normal.to(hidden.dtype)


class Kernels(NamedTuple):
    """Spec of a decoder layer, and the classes of norms and linear layers outside of layers."""

    layer: ModuleSpec
    norm: Any
    column_linear: Any
    row_linear: Any


def kernels(name: str) -> Kernels:
    """Return the layers of pure torch (`local`) or of NVIDIA's `transformer_engine`, on CUDA."""
    if name == "transformer_engine":
        from megatron.core.extensions import transformer_engine as te

        spec = get_gpt_layer_with_transformer_engine_spec()
        spec.submodules.self_attention.submodules.core_attention = _te_attention()
        return Kernels(spec, te.TENorm, te.TEColumnParallelLinear, te.TERowParallelLinear)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return Kernels(spec, RMSNorm, ColumnParallelLinear, RowParallelLinear)


@functools.cache
def _te_attention() -> type:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PackedTEAttention(TEDotProductAttention):  # type: ignore[misc]
        """Transformer Engine's attention in its packed layout, for a row that is sbhd elsewhere.

        Context parallelism is its own here (point to point, the only kind for packed rows): it
        takes this rank's share in row_split.py's order and the boundaries of the whole row.
        """

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: None,
            packed_seq_params: PackedRow,
            **kwargs: Any,
        ) -> torch.Tensor:
            """Attend as `PackedAttention.forward` does."""
            packed = copy.copy(packed_seq_params)
            packed.qkv_format = "thd"
            query, key, value = query[:, 0], key[:, 0], value[:, 0]
            context = super().forward(query, key, value, None, packed_seq_params=packed, **kwargs)
            return context.reshape(len(query), 1, -1)

    return PackedTEAttention


def require_transformer_engine() -> None:
    """Raise a ConfigError if there is no CUDA or no Transformer Engine."""
    if not torch.cuda.is_available():
        raise ConfigError("model.spec=transformer_engine needs CUDA; use model.spec=local")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model.spec=transformer_engine, but it does not import ({error}); install it as "
            "docs/scaling.md says, or use model.spec=local"
        ) from None


def inverse_frequencies(width: int, theta: float, device: torch.device) -> torch.Tensor:
    """Return theta^(-2i/width) for i < width/2: [width / 2] float32."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / theta**exponents


def text_angles(
    position_ids: torch.Tensor, head_dim: int, theta: float, sections: tuple[int, int, int]
) -> torch.Tensor:
    """Return the angles of the multimodal rotary embedding, [T, 1, 1, head_dim] float32.

    `position_ids` is [3, 1, T] int64: time, height, width. `sections` are the numbers of
    frequencies for each of the three; their sum is head_dim / 2.
    """
    frequencies = inverse_frequencies(head_dim, theta, position_ids.device)
    by_axis = (position_ids[:, 0, :, None].float() * frequencies).split(sections, dim=-1)
    half = torch.cat([part[axis] for axis, part in enumerate(by_axis)], dim=-1)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def vision_angles(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Return the angles of the vision tower, [patches, 1, 1, head_dim] float32.

    `positions` is [patches, 2] int64, row and column of each patch; each has half the frequencies.
    """
    frequencies = inverse_frequencies(head_dim // 2, theta, positions.device)
    half = (positions[:, :, None].float() * frequencies).flatten(1)
    return torch.cat([half, half], dim=-1)[:, None, None, :]
