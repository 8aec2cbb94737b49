"""What the checks share: device, a model of published widths with few layers, samples, an actor.

The model is made here, so nothing is downloaded: widths, heads and vocabulary are those of
Qwen2.5-VL-3B on a GPU, and small ones on a CPU, where only the code is tried. Its weights are
random, of such a size that activations are of order one, and are bfloat16 numbers, so that float32
and bfloat16 actors start from the same values.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sr1.config.run import Config, ModelConfig, ParallelConfig
from megatron_sr1.data.packing import pack_samples
from megatron_sr1.demo.digits import corpus_texts
from megatron_sr1.demo.tiny_model import rope, write_random_model
from megatron_sr1.model.flops import patch_cost
from megatron_sr1.model.hf_config import HFConfig, read_hf_config
from megatron_sr1.records import PackedBatch, TrainSample, VisionInputs
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import Groups, make_groups
from megatron_sr1.trainer.actor import Actor, load_actor_model, make_actor

GIB = 2**30
FIRST_TEXT_ID, TEXT_IDS = 8, 151643
"""Ids of text: after the special ids of our own vocabulary, before those of the published one."""
LEARNING_RATE = 3e-4
"""High enough that a few updates of bfloat16 weights lower the loss of their batch."""
IMAGELESS = 4
"""Every fourth sample has no image."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the work.

    Attributes:
        text, vision: transformers' settings of both parts.
        num_samples: sequences of an update.
        prompt_tokens, response_tokens: of a sequence, without its image; the mean.
        grid: height and width of an image, patches.
        pack_tokens: limit of a row.
        num_steps: updates that are timed.
        num_requests, sampled_tokens: requests to the engine, tokens of each.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    num_samples: int
    prompt_tokens: int
    response_tokens: int
    grid: tuple[int, int]
    pack_tokens: int
    num_steps: int
    num_requests: int
    sampled_tokens: int


PUBLISHED = Sizes(
    text={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope(1e6, 16, 24, 24),
        "tie_word_embeddings": True,
    },
    vision={
        "depth": 8,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [3, 7],
    },
    num_samples=24,
    prompt_tokens=300,
    response_tokens=700,
    grid=(34, 36),
    pack_tokens=8192,
    num_steps=5,
    num_requests=256,
    sampled_tokens=256,
)
SMALL = Sizes(
    text={
        **PUBLISHED.text,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_parameters": rope(1e4, 4, 6, 6),
    },
    vision={
        **PUBLISHED.vision,
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    },
    num_samples=4,
    prompt_tokens=20,
    response_tokens=30,
    grid=(12, 12),
    pack_tokens=512,
    num_steps=2,
    num_requests=8,
    sampled_tokens=16,
)


@dataclass
class Bench:
    """What a process of checks works with; parts are made when first used.

    Attributes:
        kind: cuda or cpu.
        directory: where files go.
        model: a Hugging Face directory, or None for one that is made.
        known: values that a check leaves for later ones of its process.
    """

    kind: str
    directory: Path
    model: Path | None = None
    known: dict[str, float] = field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        """Return the sizes for the device."""
        return PUBLISHED if self.kind == "cuda" else SMALL

    @cached_property
    def device(self) -> torch.device:
        """Select the device and start torch.distributed, as a world of one rank."""
        device = select_device(self.kind)
        start_distributed(device)
        return device

    @cached_property
    def groups(self) -> Groups:
        """Return the groups of one rank."""
        return make_groups(ParallelConfig(), self.device)

    @cached_property
    def model_dir(self) -> Path:
        """Return the model's directory; make it if no earlier process has."""
        target = self.model or self.directory / "model"
        if not (target / "config.json").is_file():
            write_random_model(
                target,
                corpus_texts(),
                self.sizes.text,
                self.sizes.vision,
                seed=1,
                device=str(self.device),
                change=lambda model: randomise(model).to(torch.bfloat16),
            )
        return target

    @cached_property
    def hf_config(self) -> HFConfig:
        """Return the model's shape."""
        return read_hf_config(self.model_dir)

    def samples(self, number: int | None = None, seed: int = 0) -> list[TrainSample]:
        """Return random sequences, most of them with an image; the responses are their targets."""
        rng = np.random.default_rng(seed)
        sizes, config = self.sizes, self.hf_config
        highest = min(config.text.vocab_size, TEXT_IDS)
        found = []
        for index in range(number or sizes.num_samples):
            lengths = [
                round(n * rng.uniform(0.5, 1.5))
                for n in (sizes.prompt_tokens, sizes.response_tokens)
            ]
            prompt, response = (rng.integers(FIRST_TEXT_ID, highest, n) for n in lengths)
            grids: tuple[tuple[int, int, int], ...] = ()
            marked = np.empty(0, np.int64)
            if index % IMAGELESS != IMAGELESS - 1:
                grids = ((1, *sizes.grid),)
                raw, merge = config.raw, config.vision.spatial_merge_size
                pads = [config.image_token_id] * (sizes.grid[0] * sizes.grid[1] // merge**2)
                marks = raw["vision_start_token_id"], raw["vision_end_token_id"]
                marked = np.array([marks[0], *pads, marks[1]])
            token_ids = np.concatenate([marked, prompt, response]).astype(np.int64)
            mask = np.arange(len(token_ids)) >= len(token_ids) - len(response)
            found.append(TrainSample(index, len(grids), token_ids, mask, grids))
        return found

    def vision(self, index: int) -> VisionInputs:
        """Return the random pixels of a sample's image."""
        generator = torch.Generator().manual_seed(index)
        height, width = self.sizes.grid
        pixels = torch.randn(height * width, self.hf_config.vision.patch_dim, generator=generator)
        return VisionInputs(pixels, torch.tensor([(1, height, width)]))

    def rows(
        self,
        samples: Sequence[TrainSample],
        budget: int | None = None,
        vision: Callable[[int], VisionInputs] | None = None,
    ) -> Sequence[PackedBatch]:
        """Pack samples, with rows of a length that every FP8 recipe takes.

        Budget and pixels are by default those of the bench's sizes and of its samples.
        """
        return pack_samples(
            samples,
            budget or self.sizes.pack_tokens,
            vision or self.vision,
            image_pad_id=self.hf_config.image_token_id,
            merge_size=self.hf_config.vision.spatial_merge_size,
            patch_cost=patch_cost(self.hf_config),
            pad_multiple=128,
        )

    def config(self, *settings: str) -> Config:
        """Return the configuration of an SFT run on the samples, with settings `group.key=value`.

        It is made without OmegaConf, which need not be installed.
        """
        config, sizes = Config(stage="sft"), self.sizes
        config.model = ModelConfig(path=str(self.model_dir))
        config.optimizer.num_steps, config.optimizer.learning_rate = 100, LEARNING_RATE
        side = self.hf_config.vision.patch_size
        config.data.min_pixels = config.data.max_pixels = sizes.grid[0] * sizes.grid[1] * side**2
        config.data.prompts_per_step = sizes.num_samples
        config.data.pack_tokens = config.data.max_prompt_tokens = sizes.pack_tokens
        for setting in settings:
            key, text = setting.split("=")
            group, name = key.split(".")
            is_text = isinstance(getattr(getattr(config, group), name), str | None)
            setattr(getattr(config, group), name, text if is_text else json.loads(text))
        return config

    def actor(self, config: Config) -> Actor:
        """Load the model for training."""
        chunks, hf_config, source = load_actor_model(config, self.groups)
        return make_actor(config, chunks, hf_config, source, self.groups, config.num_updates)

    def release(self) -> None:
        """Free the memory of models that nobody uses any more; raise if the device is unusable."""
        gc.collect()
        self.synchronize()
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], calls: int = 1, rounds: int = 3) -> float:
        """Return the seconds of a call: the median over rounds of `calls` calls each.

        The device is waited for after each round; warm up before.
        """
        found = []
        for _ in range(rounds):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                work()
            self.synchronize()
            found.append((time.perf_counter() - started) / calls)
        return statistics.median(found)


@torch.no_grad()
def randomise(model: Any) -> Any:
    """Draw weights that make activations of order one, norms and biases near their usual values."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            scale = 0.5 if "embed_tokens" in name or "lm_head" in name else 1.0
            parameter.copy_(scale * noise / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(1 + 0.1 * noise)
    return model
