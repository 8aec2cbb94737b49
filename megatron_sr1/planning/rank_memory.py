"""All that a rank holds: while it learns, and while the engine samples.

In: the actor, a rank of its pipeline, the engine's replica. Out: bytes by kind, at the worst moment
of the pipeline's schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.planning import activations
from megatron_sr1.planning.actor_time import Actor
from megatron_sr1.planning.costs import ENGINE_RESERVED_BYTES, RESERVED_BYTES
from megatron_sr1.planning.engine_time import Replica
from megatron_sr1.planning.schedule import in_flight
from megatron_sr1.planning.static_memory import StaticMemory, static_memory
from megatron_sr1.planning.workload import pixels_per_token, row_tokens


@dataclass(frozen=True)
class Memory:
    """What a rank holds, bytes, by kind; the fullest stage's.

    Attributes:
        static: weights, gradients, optimizer state.
        text: activations of the language model, of all micro-batches in flight.
        vision: those of the tower.
        recomputed: of the layer that is being computed again.
        logits: of a chunk, with the output layer's gradient.
        engine_weights: while the engine is awake.
        cache: keys and values, while the engine is awake.
        training: all that is there during an update.
        rollout: all that is there while the engine samples.
    """

    static: StaticMemory
    text: float
    vision: float
    recomputed: float
    logits: float
    engine_weights: float
    cache: float
    training: float
    rollout: float

    @property
    def most(self) -> float:
        """At the worst moment."""
        return max(self.training, self.rollout)


def rank_memory(actor: Actor, pipeline_rank: int, replica: Replica | None) -> Memory:
    """Of one rank.

    Args:
        actor: on its cluster.
        pipeline_rank: from 0.
        replica: of the engine; None where nothing is sampled.
    """
    config, hf_config, layout = actor.config, actor.hf_config, actor.layout
    static = static_memory(config, hf_config, layout, pipeline_rank)
    tokens = row_tokens(config) / layout.context
    text, vision = _activations(actor, pipeline_rank, tokens)
    logits = 0.0
    if pipeline_rank == layout.pipeline - 1:
        text += tokens * activations.text_ends_bytes(hf_config, layout, actor.kernels)
        chunk = config.model.logprob_chunk_tokens
        logits = activations.logits_bytes(hf_config, layout, actor.kernels, chunk)
    recomputed = tokens * activations.recomputed_bytes(hf_config, layout, actor.kernels)
    training = static.device + text + vision + logits + recomputed + RESERVED_BYTES
    rollout = engine_weights = cache = 0.0
    if replica is not None:
        engine_weights, cache = replica.weight_bytes, max(replica.cache_bytes, 0.0)
        rollout = static.device + RESERVED_BYTES
        rollout += max(replica.memory_bytes, engine_weights + ENGINE_RESERVED_BYTES)
        training += replica.memory_bytes if config.rollout.sleep_level == 0 else 0.0
    return Memory(
        static, text, vision, recomputed, logits, engine_weights, cache, training, rollout
    )


def _activations(actor: Actor, pipeline_rank: int, tokens: float) -> tuple[float, float]:
    """Of the layers and of the tower, of all micro-batches in flight."""
    hf_config, layout, kernels = actor.hf_config, actor.layout, actor.kernels
    layers = layout.layers(hf_config.text.num_layers)
    layer = tokens * activations.text_layer_bytes(hf_config, layout, kernels, layout.recompute)
    text = [layer * len(layers[stage]) for stage in layout.stages(pipeline_rank)]
    vision = [0.0] * len(text)
    if pipeline_rank == 0 and actor.trains_tower:
        per_patch = activations.vision_bytes(hf_config, layout, kernels, layout.recompute)
        vision[0] = _patches(actor) * per_patch
    held = [sum(both) for both in zip(text, vision, strict=True)]
    numbers = in_flight(layout, pipeline_rank, held)
    in_all = sum(n * size for n, size in zip(numbers, text, strict=True))
    return in_all, numbers[0] * vision[0]


def _patches(actor: Actor) -> float:
    """That a rank encodes of a full row: its share, but at least the largest image, as a whole."""
    config, work = actor.config, actor.work
    if not work.image_tokens:
        return 0.0
    row = row_tokens(config)
    largest = min(config.data.max_pixels / pixels_per_token(actor.hf_config), row)
    expected = row * work.image_tokens / work.sequence_tokens
    return max(expected / actor.layout.images, largest) * work.patches_per_token
