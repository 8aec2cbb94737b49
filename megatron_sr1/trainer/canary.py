"""The canary: after a sync, engine and actor must agree on a fixed response to a fixed image.

In: the training set. Out: how far the two are apart, in nats, and an error beyond the bound. Both
score the same tokens, the engine by prefill alone. The image is the same at each step, so that an
embedding of it that outlived a sync shows (vLLM keys its encoder cache by the image, whatever the
weights). Not seen: keys and values of text that outlived one; scored prompts are computed whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sr1.data.shards import NUM_SEARCHED
from megatron_sr1.errors import ConfigError, DataError, EngineError
from megatron_sr1.records import TrainSample
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.step import sample_logprobs


class Canary:
    """A sample of the training set that stays the same for the whole run.

    Args:
        samples: the training set; its first sample with an image that can be used is taken.
        bound_nats: largest |engine - actor| of a token, > 0.

    Raises:
        ConfigError: none of the first samples has an image.
    """

    def __init__(self, samples: Samples, bound_nats: float) -> None:
        """Choose the sample."""
        self._samples, self._bound = samples, bound_nats
        self._index = _first_with_image(samples)

    def check(self, context: Context, actor: Actor, engine: Engine) -> dict[str, float]:
        """Compare; collective over all ranks, between sync and rollout.

        Returns:
            `mismatch/canary_abs_max`, nats.

        Raises:
            EngineError: beyond the bound.
        """
        prompt = self._samples.prompt(self._index)
        lead, answer = self._samples.gold_answer(prompt)
        response = (*lead, *answer)
        with context.phase("canary"):
            said = engine.logprobs(prompt.engine_token_ids, response, prompt.images)
            token_ids = np.array((*prompt.token_ids, *response), np.int64)
            sample = TrainSample(
                index=self._index,
                num_images=prompt.example.num_images,
                token_ids=token_ids,
                loss_mask=np.arange(len(token_ids)) >= len(prompt.token_ids),
                image_grid_thw=prompt.image_grid_thw,
            )
            batches = context.pack([sample], self._samples)
            (meant,) = sample_logprobs(actor, [sample], batches, temperature=1.0)
        return {"mismatch/canary_abs_max": self._worst(said, meant[-len(response) :])}

    def _worst(self, said: Sequence[float], meant: np.ndarray) -> float:
        worst = float(np.abs(np.array(said) - meant).max())
        if not worst <= self._bound:
            raise EngineError(
                f"canary: engine and actor disagree by {worst:.2g} nats on a fixed response to a "
                f"fixed image, at most {self._bound:.2g} (rollout.canary_bound): the engine does "
                "not hold the actor's weights, or kept what it computed with earlier ones"
            )
        return worst


def _first_with_image(samples: Samples) -> int:
    for index in range(min(len(samples), NUM_SEARCHED)):
        if not samples.example(index).num_images:
            continue
        try:
            samples.prompt(index)
        except DataError:
            continue
        return index
    raise ConfigError(
        f"rollout.canary_bound needs a sample with an image among the first {NUM_SEARCHED} of "
        "data.train; set it to 0"
    )
