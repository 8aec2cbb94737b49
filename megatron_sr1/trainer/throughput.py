"""Throughput of a step: tokens and operations a second and MFU, by phase, under `perf/…`.

In: what each rank worked on, and the step's times. Out: metrics; docs/observing.md tells them.

Source: MFU as in PaLM (arXiv 2204.02311, appendix B): the operations that the model needs, whatever
was recomputed or padded, over those of the devices' peak in that time. Operations are counted by
model/flops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_sr1.checkpoint.mapping import is_tower_frozen
from megatron_sr1.model import flops
from megatron_sr1.model.flops import Work
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.records import Prompt, Rollout, TrainSample
from megatron_sr1.runtime.device import Device
from megatron_sr1.runtime.gpus import peak_of

PHASES = {
    "rollout": ("pass1", "pass2"),
    "old_logprobs": ("old_logprobs",),
    "reference": ("reference",),
    "update": ("update",),
}
"""What is told -> the timed phases that do it; the two passes run in one another."""
TRAINED = 3
"""Forward and backward pass of a weight that learns, in forward passes."""
Grids = Sequence[tuple[int, int, int]]
Readings = Mapping[tuple[int, str], tuple[int, ...]]
"""(example's index, description) -> token ids of the pass-2 prompt; "" is the question alone."""


class Throughput:
    """Counts a step's work, and makes metrics of it.

    Args:
        hf_config: shape of the model.
        freeze: patterns of parameters that do not learn.
        num_ranks: of the run.
        peak_flops: of a rank's device, operations a second; None: not known, no MFU.
    """

    def __init__(
        self, hf_config: HFConfig, freeze: Sequence[str], num_ranks: int, peak_flops: float | None
    ) -> None:
        """Nothing is counted yet."""
        self._hf_config, self._num_ranks, self._peak = hf_config, num_ranks, peak_flops
        self._tower_factor = 1 if is_tower_frozen(hf_config, freeze) else TRAINED
        self._forget()

    def count_rollouts(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], readings: Readings
    ) -> None:
        """Add an engine replica's two passes; on one of its ranks."""
        work, tokens = rollout_work(self._hf_config, prompts, rollouts, readings)
        self._add("rollout", work.total, tokens)

    def count_samples(self, phase: str, samples: Sequence[TrainSample]) -> None:
        """Add sequences that the actor went through; on one of the ranks that share them.

        Args:
            phase: update, which learns from them, or a phase that only goes forward.
            samples: one without targets is there to keep a rank busy, and not counted.
        """
        learns = phase == "update"
        for sample in samples:
            if not sample.loss_mask.any():
                continue
            tokens = len(sample.token_ids)
            text = flops.text(self._hf_config, tokens, int(sample.loss_mask.sum())).total
            tower = tower_work(self._hf_config, sample.image_grid_thw).total
            if learns:
                text, tower = TRAINED * text, self._tower_factor * tower
            self._add(phase, text + tower, tokens)

    def take(
        self,
        times: Mapping[str, float],
        sum_over_ranks: Callable[[Mapping[str, float]], dict[str, float]],
    ) -> dict[str, float]:
        """Metrics of the step that ends; collective over all ranks.

        Args:
            times: `time/…_seconds` of the step.
            sum_over_ranks: gives sums over the world.
        """
        total = sum_over_ranks(self._counted)
        self._forget()
        told: dict[str, float] = {}
        for phase, timed in PHASES.items():
            seconds = sum(times.get(f"time/{name}_seconds", 0.0) for name in timed)
            told |= self._rates(phase, total[f"{phase}/work"], total[f"{phase}/tokens"], seconds)
        work = sum(total[f"{phase}/work"] for phase in PHASES)
        trained = total["update/tokens"]
        return told | self._rates("step", work, trained, times["time/step_seconds"])

    def _rates(self, phase: str, work: float, tokens: float, seconds: float) -> dict[str, float]:
        if not tokens or seconds <= 0:
            return {}
        each = work / seconds / self._num_ranks
        told = {
            f"perf/{phase}_tokens_per_second": tokens / seconds,
            f"perf/{phase}_tflops_per_rank": each / 1e12,
        }
        return told if self._peak is None else told | {f"perf/{phase}_mfu": each / self._peak}

    def _add(self, phase: str, work: float, tokens: int) -> None:
        self._counted[f"{phase}/work"] += work
        self._counted[f"{phase}/tokens"] += tokens

    def _forget(self) -> None:
        self._counted = {f"{phase}/{kind}": 0.0 for phase in PHASES for kind in ("work", "tokens")}


def tower_work(hf_config: HFConfig, grids: Grids) -> Work:
    """Forward pass of the vision tower over images.

    Args:
        hf_config: shape of the model.
        grids: per image (t, h, w) in patches.
    """
    work = Work()
    for t, h, w in grids:
        work += flops.vision(hf_config, t * h * w, h * w)
    return work


def rollout_work(
    hf_config: HFConfig,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    readings: Readings,
) -> tuple[Work, int]:
    """What both passes take, and the tokens that they sample.

    A prompt and its images are gone through once for all its responses, and so is a description for
    all its readings: an engine that does it again loses time, and gains no MFU.

    Args:
        hf_config: shape of the model.
        prompts: of pass 1.
        rollouts: of these prompts.
        readings: prompts of pass 2.
    """
    work, num_sampled = Work(), 0
    for prompt in prompts:
        work += tower_work(hf_config, prompt.image_grid_thw)
        work += flops.text(hf_config, len(prompt.token_ids), 0)
    sampled = [(len(r.prompt_token_ids), r.completion) for r in rollouts]
    read = {readings[r.index, r.description or ""]: r.reading for r in rollouts if r.reading}
    read |= {readings[r.index, ""]: r.question_only for r in rollouts if r.question_only}
    for token_ids, reading in read.items():
        work += flops.text(hf_config, len(token_ids), 0)
        sampled += [(len(token_ids), answer) for answer in reading.answers]
    for before, completion in sampled:
        tokens = len(completion.token_ids)
        work += flops.text(hf_config, tokens, tokens, before)
        num_sampled += tokens
    return work, num_sampled


def peak_flops(configured_tflops: float, device: Device) -> float | None:
    """Operations a second that a device can do, None where nobody says.

    Args:
        configured_tflops: 10^12 operations a second; 0: the GPU's name says.
        device: of this rank.
    """
    if configured_tflops:
        return configured_tflops * 1e12
    return peak_of(torch.cuda.get_device_name(device.index)) if device.kind == "cuda" else None
