"""Build this rank's share of the model.

In: the model's shape, process groups, and the configuration of model and layout. Out: `Qwen25VL`
chunks without weights, one per virtual stage.
"""

from __future__ import annotations

import contextlib

import torch
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from megatron_sr1.config.model import ModelConfig, ParallelConfig
from megatron_sr1.model import specs
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.model.layout_checks import check_layout
from megatron_sr1.model.logprobs import vocabulary_rows
from megatron_sr1.model.qwen25_vl import Qwen25VL
from megatron_sr1.model.transformer_config import text_transformer_config
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups


def build_model(
    hf_config: HFConfig, groups: Groups, model: ModelConfig, parallel: ParallelConfig
) -> list[Qwen25VL]:
    """Build this rank's share of the model. Its weights are NaN until they are loaded.

    Args:
        hf_config: shape of the model.
        groups: process groups of the layout.
        model: dtype, kernels, recomputation and FP8; `path` and `freeze` are not used here.
        parallel: sequence parallelism and stages; the ranks are those of `groups`.

    Returns:
        A chunk for each virtual stage of this rank.

    Raises:
        ConfigError: the layout does not divide the model, or the kernels cannot run here.
    """
    check_layout(
        hf_config,
        tensor=groups.tensor.size,
        tower=groups.tower.size,
        pipeline=groups.pipeline.size,
        virtual_stages=parallel.virtual,
        stage_layers=parallel.stage_layers,
        sequence_parallel=parallel.sequence,
    )
    if model.spec == "transformer_engine":
        specs.require_transformer_engine()
    config = text_transformer_config(hf_config, groups, model, parallel)
    with cpu.megatron_mode():
        if not get_cuda_rng_tracker().is_initialized():
            model_parallel_cuda_manual_seed(1)
        chunks = [
            Qwen25VL(
                config,
                hf_config,
                groups,
                kernels=model.spec,
                virtual_stage=number,
                logprob_chunk_tokens=model.logprob_chunk_tokens,
            )
            for number in range(parallel.virtual)
        ]
    for chunk in chunks:
        _mark_unloaded(chunk, hf_config, groups)
    return chunks


@torch.no_grad()
def _mark_unloaded(chunk: Qwen25VL, hf_config: HFConfig, groups: Groups) -> None:
    """Fill with NaN, so that a weight that nobody loads is noticed; padding rows with 0."""
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
