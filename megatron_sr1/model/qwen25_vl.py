"""Qwen2.5-VL on Megatron-Core: one pipeline stage of it, and how stages are built.

In: a packed row of tokens with positions and boundaries, and the images in it. Out: hidden states
for the next stage; on the last stage logprobs of the labels, or logits. Numbers are those of
transformers' Qwen2_5_VLForConditionalGeneration, sequence by sequence.

Context-parallel ranks are given the same whole row, compute on their own share of it and return the
whole result (row_split.py). Image features are inserted into the embedded share before it is split
for sequence parallelism, so each of these ranks gets the whole gradient of the share's features.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.errors import DataError
from megatron_sr1.model import layers
from megatron_sr1.model.adapters import Adapters
from megatron_sr1.model.attention import pack_row
from megatron_sr1.model.hf_config import HFConfig, check_layout
from megatron_sr1.model.logprobs import full_logits, label_logprobs, vocabulary_rows
from megatron_sr1.model.row_split import RowSplit, split_row
from megatron_sr1.model.transformer_config import padded_vocab_size, text_transformer_config
from megatron_sr1.model.vision import VisionModel, encode_by_turns, feature_numbers
from megatron_sr1.records import VisionInputs
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups


class Qwen25VL(MegatronModule):
    """One stage: the first has the vision tower and the embedding, the last the output layer."""

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: HFConfig,
        groups: Groups,
        model: ModelConfig,
        virtual_stage: int,
    ) -> None:
        """Build a stage of this rank; `virtual_stage` is its index among the rank's stages.

        `config` is that of the language model, from `text_transformer_config`.
        """
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules read it
        self.hf_config = hf_config
        self.groups = groups
        self.logprob_chunk_tokens = model.logprob_chunk_tokens
        num_virtual = config.virtual_pipeline_model_parallel_size or 1
        # Megatron accepts a number only if there are several stages.
        self.vp_stage = virtual_stage if num_virtual > 1 else None
        self.pre_process = groups.is_first_stage and virtual_stage == 0
        self.post_process = groups.is_last_stage and virtual_stage == num_virtual - 1
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        self.adapters: Adapters | None = None
        num_layers = get_num_layers_to_build(config, self.vp_stage, groups.pipeline.rank)
        kernels = layers.kernels(model.spec)
        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[kernels.layer] * num_layers, layer_norm=kernels.norm
            ),
            vocab_size=padded_vocab_size(hf_config.text.vocab_size, groups.tensor.size),
            max_sequence_length=hf_config.text.max_position_embeddings,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            # Our own table has a row per token of this rank; Megatron's is split differently.
            position_embedding_type="none",
            # Image features are inserted first.
            scatter_embedding_sequence_parallel=False,
            pg_collection=groups.collection,
            vp_stage=self.vp_stage,
        )
        self.vision_model = (
            VisionModel(config, hf_config, groups, model.spec) if self.pre_process else None
        )

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Mark a tower that each tensor-parallel rank holds entirely as replicated over them."""
        found = super().sharded_state_dict(prefix, *args, **kwargs)
        if self.groups.tower.size < self.groups.tensor.size:
            for name, value in found.items():
                if name.startswith(f"{prefix}vision_model."):
                    first, _, last = value.replica_id
                    value.replica_id = (first, self.groups.tensor.rank, last)
        return found

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the previous stage; called by Megatron's schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return this stage's tied weight, whose gradients Megatron sums over both end stages."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        vision: VisionInputs | None = None,
        labels: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
        temperature: float = 1.0,
        shared_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the stage on one packed row; raises DataError if row and images do not match.

        Args:
            input_ids: [1, T] int64, the same row on all context-parallel ranks; each sequence's
                length is a multiple of `sequence_multiple`. Under sequence parallelism each
                context-parallel rank's share is a multiple of the tensor-parallel ranks.
            position_ids: [3, 1, T] int64, time, height and width, from 0 in each sequence.
            cu_seqlens: [sequences + 1] int32, boundaries; the last is T.
            vision: the row's images in order; None: no images.
            labels: [1, T] int64, the token after each position; None: return logits.
            wanted: [1, T] bool, positions whose logprobs are computed, 0 elsewhere; None: all.
            temperature: divisor of the logits for logprobs, > 0.
            shared_tokens: [sequences] int32, how many tokens at each sequence's start are computed
                as those of the sequence before, which they equal; None: all are computed. Not with
                context or sequence parallelism, nor in Transformer Engine's attention.

        Returns:
            logprobs [1, T] float32 on the last stage, or without labels logits [1, T, ids] float32,
            to which the temperature is not applied. On other stages hidden states [T, 1, width], T
            split over context-parallel ranks and under sequence parallelism, without shared tokens.
        """
        text = self.hf_config.text
        split = split_row(cu_seqlens, self.groups.context, shared_tokens)
        embedded = self._embed(input_ids, vision, split) if self.pre_process else None
        hidden = self.language_model.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=layers.text_angles(
                split.take(position_ids, dim=-1), text.head_dim, text.rope_theta, text.mrope_section
            ),
            packed_seq_params=pack_row(split, is_causal=True),
        )
        if not self.post_process:
            return hidden
        group = self.groups.tensor
        if self.share_embeddings_and_output_weights:
            weight = self.language_model.shared_embedding_or_output_weight()
        else:
            weight = self.language_model.output_layer.weight
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group.process_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group.process_group)
        hidden = split.spread(hidden)
        if labels is None:
            return split.join(full_logits(hidden, weight, group, text.vocab_size))
        logprobs = label_logprobs(
            hidden,
            weight,
            split.take_spread(labels),
            group=group,
            vocab_size=text.vocab_size,
            wanted=None if wanted is None else split.take_spread(wanted),
            temperature=temperature,
            chunk_tokens=self.logprob_chunk_tokens,
        )
        return split.join(logprobs)

    def _embed(
        self, input_ids: torch.Tensor, vision: VisionInputs | None, split: RowSplit
    ) -> torch.Tensor:
        """Return this rank's share [T, 1, width], image features included, split if SP."""
        own_ids = split.take(input_ids, dim=1)
        embedded = self.language_model.embedding(input_ids=own_ids, position_ids=None)
        is_image = input_ids[0] == self.hf_config.image_token_id
        num_pads = int(is_image.sum())
        if vision is not None:
            assert self.vision_model is not None
            features = encode_by_turns(self.vision_model, vision, self.groups.images)
            numbers = feature_numbers(vision, self.hf_config.vision.spatial_merge_size)
            if len(numbers) != num_pads:
                raise DataError(
                    f"the row has {num_pads} image-pad tokens, its images have "
                    f"{len(numbers)} features: expand each image to as many pads as it has "
                    "merged tokens and never sample the pad"
                )
            places = torch.nonzero(split.take(is_image, dim=0))[:, 0]
            pads = split.take(is_image.cumsum(0) - 1, dim=0)[places]  # numbered over the row
            features = features.index_select(0, numbers.to(pads.device)[pads]).unsqueeze(1)
            embedded = embedded.index_copy(0, places, features.to(embedded.dtype))
        elif num_pads:
            raise DataError(f"the row has {num_pads} image-pad tokens, but no images were given")
        if self.config.sequence_parallel:
            size = self.groups.tensor.size
            if len(embedded) % size:
                raise DataError(
                    f"a row of {len(embedded)} tokens cannot be split over {size} "
                    "sequence-parallel ranks; pad rows to a multiple"
                )
            group = self.groups.tensor.process_group
            embedded = scatter_to_sequence_parallel_region(embedded, group=group)
        if torch.is_grad_enabled() and not embedded.requires_grad:
            # Recomputation and other stages require an input with a gradient; a frozen embedding
            # has none.
            recomputes = self.config.recompute_granularity is not None
            embedded.requires_grad_(recomputes or not self.post_process)
        return embedded


def build_model(
    hf_config: HFConfig, groups: Groups, model: ModelConfig, parallel: ParallelConfig
) -> list[Qwen25VL]:
    """Build this rank's share of the model, one chunk per virtual stage.

    Weights are NaN until they are loaded, padding rows 0. `groups` gives the numbers of ranks,
    `model` dtype, kernels, recomputation and FP8, `parallel` the rest of the layout. Raises
    ConfigError if the layout does not divide the model, or the kernels cannot run here.
    """
    check_layout(hf_config, parallel)
    if model.spec == "transformer_engine":
        layers.require_transformer_engine()
    config = text_transformer_config(hf_config, groups, model, parallel)
    with cpu.megatron_mode():
        if not get_cuda_rng_tracker().is_initialized():
            model_parallel_cuda_manual_seed(1)
        chunks = [
            Qwen25VL(config, hf_config, groups, model, number) for number in range(parallel.virtual)
        ]
    vocab_size = hf_config.text.vocab_size
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.detach().fill_(float("nan"))  # one that is not loaded is noticed
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                padding = vocabulary_rows(vocab_size, len(parameter), groups.tensor.rank)[1]
                parameter.detach()[padding:].zero_()
    return chunks
