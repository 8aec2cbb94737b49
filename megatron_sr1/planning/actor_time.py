"""Time of the actor's phases: logprobs (forward passes) and updates.

The slowest rank of the pipeline sets the time of a micro-batch, and the schedule adds its bubble.
On a rank the products, the memory traffic of the activations and the collectives of its layers, the
tower and the logits add up: none of them overlap here. An update ends with the gradient reduction
over data-parallel ranks and the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_sr1.checkpoint.mapping import TOWER
from megatron_sr1.model import flops
from megatron_sr1.planning import costs
from megatron_sr1.planning.activations import activations_of
from megatron_sr1.planning.adapters import DTYPE_BYTES
from megatron_sr1.planning.layout import Layout, balanced_stages, num_slots
from megatron_sr1.planning.memory import StaticMemory
from megatron_sr1.planning.workload import PlannedRun, num_parameters
from megatron_sr1.runtime.gpus import GPUS_PER_NODE, Gpu


@dataclass(frozen=True)
class PartCost:
    """Cost of one micro-batch in a part of a stage: a layer, the tower or the logits.

    Attributes:
        work: operations of the forward pass, all ranks together.
        ranks: number of ranks that share the part.
        recomputed: operations that the backward pass repeats.
        traffic: activations of a forward pass without recomputation, bytes.
        collective_seconds: time of one pass's collectives.
        is_repeated: recomputation repeats the traffic and the collectives too.
        is_trained: there is a backward pass.
        adapters: operations of adapters in the forward pass, if they are trained in place of the
            weights.
    """

    work: flops.Work
    ranks: int
    recomputed: flops.Work
    traffic: float = 0.0
    collective_seconds: float = 0.0
    is_repeated: bool = False
    is_trained: bool = True
    adapters: flops.Work | None = None

    def seconds(self, gpu: Gpu, with_backward: bool) -> float:
        """Return the time of the forward pass, or of forward and backward pass.

        A forward pass writes and reads the activations; a backward pass reads them, and writes and
        reads as many bytes of gradients.
        """
        moving, collectives = costs.memory_seconds(self.traffic, gpu), self.collective_seconds
        added = self.adapters or flops.Work()
        if not (with_backward and self.is_trained):
            forward = self.work + added
            return costs.compute_seconds(forward, gpu) / self.ranks + 2 * moving + collectives
        backward = flops.backward(self.work, is_frozen=self.adapters is not None)
        everything = self.work + backward + self.recomputed + added + flops.backward(added)
        everything += added if self.is_repeated else flops.Work()
        forwards = 2 if self.is_repeated else 1
        computing = costs.compute_seconds(everything, gpu) / self.ranks
        return computing + (2 * forwards + 3) * moving + (forwards + 1) * collectives


@dataclass(frozen=True)
class ActorCost:
    """Times of a run's actor in one layout."""

    run: PlannedRun
    layout: Layout

    @property
    def tokens(self) -> float:
        """Tokens of a rank's share of a row."""
        return self.run.row_tokens / self.layout.context

    @property
    def row_bytes(self) -> float:
        """Hidden states of the share, not split over tensor-parallel ranks."""
        return self.tokens * self.run.hf_config.text.hidden_size * self.run.dtype_bytes

    @property
    def patches(self) -> float:
        """Patches of a row that a rank encodes: its share, but at least one whole image."""
        row = self.run.row_tokens * self.run.image_patches / self.run.sequence_tokens
        return max(row / self.layout.images, self.run.image_patches)

    def text_layer(self) -> PartCost:
        """Return the cost of a decoder layer; adapters count as the mean over the layers."""
        run, layout, tokens = self.run, self.layout, self.tokens
        share = 1 / run.hf_config.text.num_layers
        layer = flops.text_layer(run.hf_config, tokens, run.sequence_tokens * flops.CAUSAL_SHARE)
        mlp = flops.text_mlp(run.hf_config, tokens)
        return PartCost(
            layer,
            layout.tensor,
            {"none": flops.Work(), "selective": mlp, "full": layer}[layout.recompute],
            tokens * activations_of(run, layout).text_layer("none"),
            self._all_reduces_seconds(self.row_bytes, layout.tensor) + self._context_seconds(),
            is_repeated=layout.recompute == "full",
            adapters=run.adapters.work(False, tokens).times(share) if run.adapters else None,
        )

    def tower(self) -> PartCost:
        """Return the cost of the tower; any recomputation repeats it."""
        run, layout, patches = self.run, self.layout, self.patches
        vision = run.hf_config.vision
        whole = flops.vision(run.hf_config, patches, run.image_patches)
        is_repeated = layout.recompute != "none"
        hidden_bytes = patches * (vision.hidden_size * run.dtype_bytes)
        collectives = vision.depth * self._all_reduces_seconds(hidden_bytes, layout.tower)
        features = run.image_tokens / run.sequence_tokens * self.row_bytes * layout.context
        collectives += costs.gather_seconds(features, layout.images, run.gpu.link_rate)
        return PartCost(
            whole,
            layout.tower,
            whole if is_repeated else flops.Work(),
            patches * activations_of(run, layout).vision("none"),
            collectives,
            is_repeated,
            is_trained=run.trains_tower,
            adapters=run.adapters.work(True, patches) if run.adapters else None,
        )

    def logits(self) -> PartCost:
        """Return the cost of the output layer; the backward pass recomputes its logits."""
        head = flops.head(self.run.hf_config, self.tokens)
        adapters = flops.Work() if self.run.adapters else None  # frozen, without any of its own
        return PartCost(head, self.layout.tensor, head, adapters=adapters)

    def rank_seconds(self, pipeline_rank: int, with_backward: bool) -> float:
        """Return the time of a micro-batch in all stages of a rank."""
        layout, gpu = self.layout, self.run.gpu
        stages = layout.layers(self.run.hf_config.text.num_layers)
        layer, seconds = self.text_layer().seconds(gpu, with_backward), 0.0
        for stage in layout.stages(pipeline_rank):
            seconds += len(stages[stage]) * layer
            if stage == 0 and self.run.image_tokens:
                seconds += self.tower().seconds(gpu, with_backward)
            if stage == len(stages) - 1:
                seconds += self.logits().seconds(gpu, with_backward)
            else:
                seconds += self._send_seconds() * (2 if with_backward else 1)
        return seconds

    def balanced(self) -> Layout:
        """Return the layout with the layers per stage that minimize the slowest rank's time."""
        if self.layout.pipeline == 1:
            return self.layout
        gpu, num_layers = self.run.gpu, self.run.hf_config.text.num_layers
        first = self.tower().seconds(gpu, True) if self.run.image_tokens else 0.0
        layer, last = (part.seconds(gpu, True) for part in (self.text_layer(), self.logits()))
        split = balanced_stages(self.layout, num_layers, first, layer, last)
        return replace(self.layout, stage_layers=split if len(set(split)) > 1 else ())

    def forward_seconds(self) -> float:
        """Return the time to compute the logprobs of all sequences of a step."""
        return self._pipeline_seconds(self.run.num_sequences, with_backward=False)

    def update_seconds(self, held: StaticMemory) -> float:
        """Return the time of all updates of a step on ranks that hold `held`."""
        num_updates = self.run.config.updates_per_step
        once = self._pipeline_seconds(self.run.num_sequences / num_updates, with_backward=True)
        return num_updates * (once + self._reduce_seconds(held) + self._optimizer_seconds(held))

    def update_flops(self) -> float:
        """Return the operations of a step's updates.

        A tower without trained parameters has no backward pass; frozen weights have half of one.
        """
        run = self.run
        text, tower = text_work(run), tower_work(run)
        learning = text + tower if run.trains_tower else text
        total = text.total + tower.total + 2 * learning.total
        if run.adapters is None:
            return total
        return total - learning.dense + 3 * adapters_work(run).total

    def _pipeline_seconds(self, sequences: float, with_backward: bool) -> float:
        """Time of `sequences` over all data-parallel ranks, at least one row each."""
        tokens = sequences * self.run.sequence_tokens / self.layout.data
        rows = max(1.0, tokens / self.run.row_tokens)
        slowest = max(self.rank_seconds(rank, with_backward) for rank in self.layout.ends)
        return slowest * num_slots(self.layout, rows)

    def _all_reduces_seconds(self, num_bytes: float, ranks: int) -> float:
        """Time of a layer's two all-reduces, or of the equivalent under sequence parallelism."""
        return 2 * costs.gather_seconds(2 * num_bytes, ranks, self.run.gpu.link_rate)

    def _context_seconds(self) -> float:
        """Time to gather a layer's keys and values over context-parallel ranks."""
        text, layout = self.run.hf_config.text, self.layout
        width = 2 * text.num_key_value_heads * text.head_dim / layout.tensor
        num_bytes = self.run.row_tokens * width * self.run.dtype_bytes
        return costs.gather_seconds(num_bytes, layout.context, self.run.gpu.link_rate)

    def _send_seconds(self) -> float:
        """Time to send hidden states to the next stage, on another node if there is one."""
        layout, gpu = self.layout, self.run.gpu
        rate = gpu.network_rate if layout.num_ranks > GPUS_PER_NODE else gpu.link_rate
        return costs.transfer_seconds(self.row_bytes / layout.sequence_split, rate)

    def _reduce_seconds(self, held: StaticMemory) -> float:
        """Time to reduce gradients over the ranks that share the state, and to gather weights."""
        run, layout, gpu = self.run, self.layout, self.run.gpu
        # Ranks are ordered tensor, context, data; pipeline comes last.
        spans_nodes = layout.tensor * layout.num_sharing > GPUS_PER_NODE
        rate = gpu.network_rate if spans_nodes else gpu.link_rate
        sharded = run.config.parallel.distributed_optimizer
        moved = (held.gradients, held.trained) if sharded else (2 * held.gradients,)
        seconds = sum(costs.gather_seconds(size, layout.num_sharing, rate) for size in moved)
        if layout.tower != layout.tensor and run.trains_tower:  # each rank holds the whole tower
            gradient_bytes = DTYPE_BYTES[run.config.optimizer.gradients]
            numel = num_parameters(run.hf_config, TOWER)
            numel = run.adapters.tower_numel if run.adapters else numel
            tower = gradient_bytes * numel
            seconds += costs.gather_seconds(2 * tower, layout.tensor, gpu.link_rate)
        return seconds

    def _optimizer_seconds(self, held: StaticMemory) -> float:
        """Time to read gradients and to update the state, which may cross PCIe both ways."""
        config, gpu, state = self.run.config, self.run.gpu, held.optimizer + held.host
        seconds = costs.memory_seconds(2 * state + held.gradients, gpu)
        moves_all = self.run.has_rollouts and config.rollout.make_room == "optimizer"
        moved = state if moves_all else held.host
        return seconds + costs.transfer_seconds(2 * moved, gpu.host_rate)


def text_work(run: PlannedRun) -> flops.Work:
    """Return the language model's operations in a forward pass over a step's sequences."""
    tokens = run.sequence_tokens
    return flops.text(run.hf_config, tokens, tokens).times(run.num_sequences)


def tower_work(run: PlannedRun) -> flops.Work:
    """Return the same of the tower."""
    patches = run.image_patches
    return flops.vision(run.hf_config, patches, patches).times(run.num_sequences)


def adapters_work(run: PlannedRun) -> flops.Work:
    """Return the same of the adapters."""
    if run.adapters is None:
        return flops.Work()
    once = run.adapters.work(False, run.sequence_tokens)
    return (once + run.adapters.work(True, run.image_patches)).times(run.num_sequences)


def forward_work(run: PlannedRun) -> flops.Work:
    """Return the operations of a forward pass over a step's sequences."""
    return text_work(run) + tower_work(run) + adapters_work(run)
