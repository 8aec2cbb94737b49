"""The loss of held-out conversations, while supervised fine-tuning trains on others."""

from __future__ import annotations

from megatron_sr1.data.processor import Processor
from megatron_sr1.runtime.groups import sum_over_ranks
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.step import sample_logprobs


class HeldOutLoss:
    """Measures the actor's loss on one set of conversations.

    Attributes:
        name: of the set in `evaluation.sets`.
    """

    def __init__(self, context: Context, actor: Actor, samples: Samples, name: str) -> None:
        """Select the first conversations of `samples`, as many as configured."""
        self.name = name
        self._context, self._actor, self._samples = context, actor, samples
        limit = context.config.evaluation.setting(name, "max_samples")
        self._indices = range(len(samples))[: limit or None]

    def evaluate(self) -> dict[str, float]:
        """Return `loss`, the mean negative log-likelihood of all target tokens, nats; collective.

        `skipped` counts the conversations that could not be used, each time anew.
        """
        context, samples, groups = self._context, self._samples, self._context.groups
        chunk, data = context.config.evaluation.chunk_prompts, groups.data
        of_training, context.skipped = context.skipped, 0
        sums = {"loss": 0.0, "tokens": 0.0}
        with context.phase("evaluate"):
            for start in range(0, len(self._indices), chunk):
                own = self._indices[start : start + chunk][data.rank :: data.size]
                read = context.read_usable(samples.conversation, own, groups.is_replica_leader)
                context.count_skipped()
                if read:
                    batches = samples.pack(read, groups)
                    rows = sample_logprobs(self._actor, read, batches, temperature=1.0)
                    if groups.is_replica_leader:
                        sums["loss"] -= sum(float(row.sum()) for row in rows)
                        sums["tokens"] += sum(int(sample.loss_mask.sum()) for sample in read)
                samples.forget()
            sums = sum_over_ranks(groups, sums)
        skipped, context.skipped = context.skipped, of_training
        return {"loss": sums["loss"] / max(sums["tokens"], 1.0), "skipped": skipped}


def make_losses(context: Context, actor: Actor, processor: Processor) -> list[HeldOutLoss]:
    """Open those of `evaluation.sets` whose first sample has an assistant turn to predict."""
    found = []
    for name, each in context.config.evaluation.sets.items():
        samples = Samples(context.config, each.path, processor)
        if any(turn.role == "assistant" for turn in samples.example(0).messages):
            found.append(HeldOutLoss(context, actor, samples, name))
    return found
