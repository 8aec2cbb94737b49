"""Layers as data: the Megatron specs of a decoder layer, of norms and of linear layers.

In: the kind of kernels. Out: Megatron specs. `local` is torch alone and runs anywhere;
`transformer_engine` is NVIDIA's kernels and needs CUDA. The models do not know which one they
hold: both keep the packed row in the sbhd layout and pass its borders to the core attention only,
so that the rotary table stays per token (see attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_sr1.errors import ConfigError
from megatron_sr1.model.attention import PackedAttention
from megatron_sr1.model.layers import RMSNorm


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
    from megatron_sr1.model.te_attention import PackedTEAttention

    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = PackedTEAttention
    return spec
