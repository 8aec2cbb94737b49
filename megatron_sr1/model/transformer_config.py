"""Megatron's configurations of the layers of the language model and of the vision tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig, VisionConfig
from megatron_sr1.model.row_split import sequence_multiple
from megatron_sr1.runtime.groups import Groups

UNIFORM_RECOMPUTE = {"recompute_method": "uniform", "recompute_num_layers": 1}
FP8_RECIPES = {
    "delayed": Fp8Recipe.delayed,
    "current": Fp8Recipe.tensorwise,
    "blockwise": Fp8Recipe.blockwise,
    "mxfp8": Fp8Recipe.mxfp8,
}
"""`model.fp8_recipe` -> Megatron's name, which it turns into a recipe of Transformer Engine
(megatron/core/fp8_utils.py): DelayedScaling, Float8CurrentScaling, Float8BlockScaling,
MXFP8BlockScaling."""


def text_transformer_config(
    hf_config: HFConfig, groups: Groups, model: ModelConfig, parallel: ParallelConfig
) -> TransformerConfig:
    """Return the configuration of the language model's layers; arguments as `build_model`'s."""
    text, on_cpu = hf_config.text, groups.device.type == "cpu"
    dtype = getattr(torch, model.dtype)
    extra: dict[str, Any] = {}
    if model.recompute == "full":
        extra |= UNIFORM_RECOMPUTE
    if parallel.stage_layers:
        stages = [["decoder"] * number for number in parallel.stage_layers]
        stages = [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]
        extra["pipeline_model_parallel_layout"] = stages
    if parallel.virtual > 1:
        extra["virtual_pipeline_model_parallel_size"] = parallel.virtual
        # Between two ranks that are each other's next and previous, batched messages would mix up
        # forward and backward; separate ones also overlap with computation.
        extra |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    extra |= _fp8_settings(model, text.num_layers // groups.pipeline.size)
    return TransformerConfig(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        mrope_section=list(text.mrope_section),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=groups.tensor.size,
        pipeline_model_parallel_size=groups.pipeline.size,
        context_parallel_size=groups.context.size,
        sequence_parallel=parallel.sequence and groups.tensor.size > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths
        calculate_per_token_loss=True,  # a sum, divided by the number of tokens of the update
        use_cpu_initialization=on_cpu,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # The fused forms are compiled, which is not worth it on a CPU.
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=not on_cpu,
        recompute_granularity=None if model.recompute == "none" else model.recompute,
        recompute_modules=["mlp"],
        **extra,
    )


def vision_transformer_config(
    text: TransformerConfig, vision: VisionConfig, tower_size: int
) -> TransformerConfig:
    """Return the configuration of the tower's layers, each shared by `tower_size` ranks.

    Types and kernels are those of the language model's configuration. The tower is on the first
    stage only and sees whole rows of any length: no pipeline, context or sequence parallelism, no
    FP8. If the language model recomputes its MLPs, the tower recomputes whole blocks: Megatron's
    recomputation of an MLP returns the MLP's bias and its backward pass never ends.
    """
    recompute: dict[str, Any] = {}
    if text.recompute_granularity is not None:
        recompute = {"recompute_granularity": "full", **UNIFORM_RECOMPUTE}
    return replace(
        text,
        **recompute,
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        kv_channels=vision.head_dim,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        add_qkv_bias=True,
        mrope_section=None,
        tensor_model_parallel_size=tower_size,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None,
        overlap_p2p_comm=False,
        context_parallel_size=1,
        sequence_parallel=False,
        fp8=None,
    )


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Return the rows of the embedding over all ranks: padded only if ids do not divide evenly."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """Leave the weight as it is: it is loaded, and drawing random values would take minutes."""
    return weight


def _fp8_settings(model: ModelConfig, stage_layers: int) -> dict[str, Any]:
    """Return the FP8 fields, which concern the linear layers of the language model only.

    The tower, the embedding and the output layer remain in the activations' dtype. Raises
    ConfigError if more layers are to be kept in bfloat16 than Megatron supports.
    """
    if model.fp8 is None:
        return {}
    at_start, at_end = model.bf16_layers_at_start, model.bf16_layers_at_end
    if max(at_start, at_end) > stage_layers:
        raise ConfigError(
            f"model.bf16_layers_at_start={at_start}, bf16_layers_at_end={at_end}: each at most the "
            f"{stage_layers} layers of a pipeline stage"
        )
    return {
        "fp8": model.fp8,
        "fp8_recipe": FP8_RECIPES[model.fp8_recipe],
        # After each micro-batch delayed scaling takes maxima over a group of ranks. The default
        # group includes data-parallel ranks, which have different numbers of micro-batches.
        "tp_only_amax_red": True,
        "first_last_layers_bf16": at_start > 0 or at_end > 0,
        "num_layers_at_start_in_bf16": at_start,
        "num_layers_at_end_in_bf16": at_end,
    }


def row_multiple(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the number of tokens that each packed row must be a multiple of.

    Each context-parallel rank has an equal share of a row, which sequence parallelism splits again;
    FP8 products need a multiple of tokens on each rank.
    """
    share = parallel.tensor if parallel.sequence else 1
    if model.fp8 is not None:
        share *= get_fp8_align_size(FP8_RECIPES[model.fp8_recipe])
    return sequence_multiple(parallel.context) * share
