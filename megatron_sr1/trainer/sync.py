"""The engine beside the actor: its start, the weight sync, and the check that both agree.

The canary compares engine and actor on a fixed response to a fixed image; the engine scores it by
prefill alone. The image is the same in every step, so that an embedding of it that survived a sync
is noticed (vLLM keys its encoder cache by the image, whatever the weights). Keys and values of text
that survived one are not: scored prompts are computed as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.checkpoint.hf import check_tensors, save_hf
from megatron_sr1.checkpoint.hf_files import HFSource
from megatron_sr1.config.run import Config
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.shards import first_with_image
from megatron_sr1.errors import EngineError
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.records import Completion, PackedBatch, Prompt, Rollout, TrainSample
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer.actor import Actor, load_actor_model
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.step import sample_logprobs


def start_engine(config: Config, groups: Groups, processor: Processor) -> Engine:
    """Start the colocated rollout engine with the weights of `model.path`; collective."""
    has_lora = config.rollout.lora == "engine" and config.stage != "eval"
    return Engine(
        engine_directory(config, groups),
        config.rollout,
        processor,
        device_kind=groups.device.type,
        dtype=config.model.dtype,
        seed=config.seed,
        timeout_seconds=config.launch.collective_timeout_seconds,
        adapter=config.adapter if has_lora else None,
    )


def engine_directory(config: Config, groups: Groups) -> Path:
    """Return a Hugging Face directory with the weights of `model.path`.

    A Megatron checkpoint is exported into the run directory, once.

    Raises:
        CheckpointError: the weights are not those that config.json describes.
    """
    source = resolve_model(*config.model.at)
    if source.kind == "huggingface":
        check_tensors(HFSource(source.weights), read_hf_config(source.hf_files))
        return source.weights
    name = hashlib.blake2b(str(source.weights.resolve()).encode(), digest_size=6).hexdigest()
    target = Path(config.output) / "engine_start" / name
    if not (target / "config.json").is_file():
        chunks, hf_config, _ = load_actor_model(config, groups)
        save_hf(chunks, hf_config, groups, source.hf_files, target)
    dist.barrier(group=groups.world.process_group)
    return target


def sync(context: Context, actor: Actor, engine: Engine, again: bool = False) -> None:
    """Wake the engine and stream the actor's weights into it, with the step as their version.

    With `rollout.lora=engine` these are the adapters alone. `again` says that the engine's weights
    came from this actor: frozen ones are not sent again.
    """
    with context.phase("sync"):
        left_out = actor.frozen if again and engine.keeps_weights else frozenset[str]()
        actor.offload(context.config.rollout.make_room)
        engine.wake()
        if context.config.rollout.lora == "engine":
            return engine.sync_adapters(actor.adapter_tensors(), context.step)
        engine.sync(actor.weights(left_out), context.step, whole=not left_out)


_Made = tuple[Prompt, tuple[int, ...], TrainSample, Sequence[PackedBatch]]


class Canary:
    """A sample of the training set that stays the same for the whole run."""

    def __init__(self, samples: Samples, bound_nats: float) -> None:
        """Choose the first usable sample with an image; raise ConfigError if there is none.

        `bound_nats` is the largest |engine - actor| of a token, > 0.
        """

        def num_images(index: int) -> int:
            # Text-only samples are skipped before their prompts are made.
            return samples.example(index).num_images and len(samples.prompt(index).image_grid_thw)

        self._samples, self._bound = samples, bound_nats
        self._index = first_with_image(samples.reader.sizes, num_images)
        self._made: _Made | None = None

    def _make(self, groups: Groups) -> _Made:
        """Return what stays the same: prompt, response, and both as the actor's rows."""
        prompt = self._samples.prompt(self._index)
        lead, answer = self._samples.gold_answer(prompt)
        response = (*lead, *answer)
        given = Completion(response, (0.0,) * len(response), "", "given")
        sample = self._samples.train_sample(
            Rollout(self._index, 0, prompt.token_ids, given, None, None, weight_version=-1)
        )
        return prompt, response, sample, self._samples.pack([sample], groups)

    def check(self, context: Context, actor: Actor, engine: Engine) -> dict[str, float]:
        """Compare after a sync; collective over all ranks.

        Returns:
            `mismatch/canary_abs_max`, nats.

        Raises:
            EngineError: the difference is beyond the bound.
        """
        with context.phase("canary"):
            if self._made is None:
                self._made = self._make(context.groups)
            prompt, response, sample, batches = self._made
            logprobs = engine.logprobs(prompt.token_ids, response, prompt.vision)
            (actor_logprobs,) = sample_logprobs(actor, [sample], batches, temperature=1.0)
        worst = float(np.abs(np.array(logprobs) - actor_logprobs[-len(response) :]).max())
        if not worst <= self._bound:
            raise EngineError(
                f"canary: engine and actor disagree by {worst:.2g} nats on a fixed response to a "
                f"fixed image, at most {self._bound:.2g} (rollout.canary_bound): the engine does "
                "not hold the actor's weights, or kept what it computed with earlier ones"
            )
        return {"mismatch/canary_abs_max": worst}
