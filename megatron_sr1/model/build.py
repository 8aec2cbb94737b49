"""From a shape and a layout to this rank's share of the model.

In: a model's shape, the groups, kernels. Out: `Qwen25VL` chunks without weights, one a virtual
stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from megatron_sr1.model import specs
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.model.layout_checks import check_layout
from megatron_sr1.model.logprobs import vocabulary_rows
from megatron_sr1.model.qwen25_vl import Qwen25VL
from megatron_sr1.model.transformer_config import text_transformer_config
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups


def build_model(
    hf_config: HFConfig,
    groups: Groups,
    *,
    dtype: torch.dtype,
    spec: str = "local",
    sequence_parallel: bool = False,
    virtual_stages: int = 1,
    stage_layers: Sequence[int] = (),
    recompute: str = "none",
    fp8: str | None = None,
    fp8_recipe: str = "delayed",
    bf16_layers: tuple[int, int] = (0, 0),
    logprob_chunk_tokens: int = 1024,
) -> list[Qwen25VL]:
    """Build this rank's share of the model, its weights not yet loaded: they are NaN.

    Args:
        hf_config: shape of the model.
        groups: the layout.
        dtype: of parameters and activations.
        spec: kernels: local | transformer_engine.
        sequence_parallel: split rows over the tensor-parallel ranks between layers.
        virtual_stages: of each pipeline rank.
        stage_layers: layers of each of the stages, in order; empty for equally many.
        recompute: none | selective (MLPs of the language model, blocks of the tower) | full.
        fp8: Transformer Engine's FP8 format, or None.
        fp8_recipe: its scaling.
        bf16_layers: with FP8, so many first and last layers of the language model without it.
        logprob_chunk_tokens: tokens whose logits exist at a time.

    Returns:
        a chunk for each virtual stage of this rank.

    Raises:
        ConfigError: the layout does not divide the model, or the kernels cannot run here.
    """
    check_layout(
        hf_config,
        tensor=groups.tensor.size,
        tower=groups.tower.size,
        pipeline=groups.pipeline.size,
        virtual_stages=virtual_stages,
        stage_layers=stage_layers,
        sequence_parallel=sequence_parallel,
    )
    if spec == "transformer_engine":
        specs.require_transformer_engine()
    config = text_transformer_config(
        hf_config,
        groups,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        virtual_stages=virtual_stages,
        stage_layers=stage_layers,
        recompute=recompute,
        fp8=fp8,
        fp8_recipe=fp8_recipe,
        bf16_layers=bf16_layers,
    )
    with cpu.megatron_mode():
        if not get_cuda_rng_tracker().is_initialized():
            model_parallel_cuda_manual_seed(1)
        chunks = [
            Qwen25VL(
                config,
                hf_config,
                groups,
                kernels=spec,
                virtual_stage=number,
                logprob_chunk_tokens=logprob_chunk_tokens,
            )
            for number in range(virtual_stages)
        ]
    for chunk in chunks:
        _mark_unloaded(chunk, hf_config, groups)
    return chunks


@torch.no_grad()
def _mark_unloaded(chunk: Qwen25VL, hf_config: HFConfig, groups: Groups) -> None:
    """NaN everywhere, so that a weight that nobody loads is loud; zero in padding rows."""
    for parameter in chunk.parameters():
        parameter.fill_(float("nan"))
    for layer in ("embedding.word_embeddings", "output_layer"):
        with contextlib.suppress(AttributeError):
            weight = chunk.language_model.get_submodule(layer).weight
            if weight is not None:
                _, num_ids = vocabulary_rows(
                    hf_config.text.vocab_size, len(weight), groups.tensor.rank
                )
                weight[num_ids:].zero_()
