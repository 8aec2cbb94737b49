"""Throughput of a step by phase: tokens and operations per second and MFU, under `perf/…`.

Source: MFU as in PaLM (arXiv 2204.02311, appendix B): the operations that the model needs, whatever
was recomputed or padded, over the peak of the devices in that time. model/flops.py counts the
operations, docs/observing.md describes the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_sr1.checkpoint.mapping import TOWER, adapter_entries, is_tower_frozen
from megatron_sr1.config.run import Config
from megatron_sr1.model import flops
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.records import Prompt, Rollout, TrainSample
from megatron_sr1.runtime.gpus import peak_of
from megatron_sr1.runtime.groups import Groups

PHASES = {
    "rollout": ("pass1", "pass2"),
    "old_logprobs": ("old_logprobs",),
    "reference": ("reference",),
    "update": ("update",),
}
"""Name in the metrics -> the timed phases; the two passes are interleaved."""
TRAINED, FROZEN = 3, 2
"""Forward and backward pass of a weight that learns, in forward passes; of a frozen one that passes
gradients on to adapters, whose own operations are few and not counted."""
Readings = Mapping[tuple[int, str], tuple[int, ...]]
"""(example's index, description) -> token ids of the pass-2 prompt; "" is the question alone."""


class Throughput:
    """Counts a step's work, and converts it to metrics.

    Attributes:
        counted: this rank's part of the step so far; all ranks have the same names.
    """

    def __init__(self, config: Config, hf_config: HFConfig, groups: Groups) -> None:
        """Start the first step."""
        self._hf_config, self._groups = hf_config, groups
        self._peak = peak_flops(config.logging.peak_tflops, groups.device)
        self._shares_prompts = config.shares_prompts
        self._text_factor = TRAINED
        self._tower_factor = 1 if is_tower_frozen(hf_config, config.model.freeze) else TRAINED
        if config.adapter.rank:
            pairs = adapter_entries(hf_config, config.adapter.targets, config.adapter.rank)
            in_tower = any(a.name.startswith(TOWER) for a, _ in pairs.values())
            self._text_factor, self._tower_factor = FROZEN, FROZEN if in_tower else 1
        self._reset()

    def count_rollouts(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], readings: Readings
    ) -> None:
        """Add both passes of an engine replica; the rollouts are none but on its leader.

        A prompt with its images is computed once for all its responses, and so is a description for
        all its readings: an engine that repeats them loses time and gains no MFU.
        """
        tower = sum(self._tower(p.image_grid_thw) for p in prompts)
        prefills = [(len(p.token_ids), 0, 0) for p in prompts]
        sampled = [(len(r.prompt_token_ids), r.completion) for r in rollouts]
        read = {(r.index, r.description or ""): r.reading for r in rollouts if r.reading}
        read |= {(r.index, ""): r.question_only for r in rollouts if r.question_only}
        # An endpoint's readings are no work of the engine, and not among `readings`.
        own = {readings[key]: reading for key, reading in read.items() if key in readings}
        for token_ids, reading in own.items():
            prefills.append((len(token_ids), 0, 0))
            sampled += [(len(token_ids), answer) for answer in reading.answers]
        counts = [(len(c.token_ids), len(c.token_ids), before) for before, c in sampled]
        self._add("rollout", tower + self._text(prefills + counts), sum(n for n, _, _ in counts))

    def count_samples(self, phase: str, samples: Sequence[TrainSample]) -> None:
        """Add sequences that the actor processed, once for the ranks that share them.

        All phases but update are forward passes. Samples without targets are not counted: they
        only keep a rank busy. Where rows compute a prompt once, it is counted once.
        """
        counted, counts, tower, num_tokens = set[int](), [], 0.0, 0
        for sample in samples if self._groups.is_replica_leader else ():
            num_targets = int(sample.loss_mask.sum())
            if not num_targets:
                continue
            num_tokens += (tokens := len(sample.token_ids))
            if sample.index in counted:
                before = sample.num_prompt_tokens
                counts.append((tokens - before, num_targets, before))
            else:
                counts.append((tokens, num_targets, 0))
                tower += self._tower(sample.image_grid_thw)
            if self._shares_prompts:
                counted.add(sample.index)
        factors = (self._text_factor, self._tower_factor) if phase == "update" else (1, 1)
        self._add(phase, factors[0] * self._text(counts) + factors[1] * tower, num_tokens)

    def take(self, times: Mapping[str, float], total: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a step with these `time/…_seconds`, and start the next one.

        `total` has the sums of `counted` over all ranks.
        """
        self._reset()
        metrics: dict[str, float] = {}
        for phase, timed in PHASES.items():
            seconds = sum(times.get(f"time/{name}_seconds", 0.0) for name in timed)
            metrics |= self._rates(phase, total[f"{phase}/work"], total[f"{phase}/tokens"], seconds)
        work = sum(total[f"{phase}/work"] for phase in PHASES)
        trained = total["update/tokens"]
        return metrics | self._rates("step", work, trained, times["time/step_seconds"])

    def _rates(self, phase: str, work: float, tokens: float, seconds: float) -> dict[str, float]:
        if not tokens or seconds <= 0:
            return {}
        per_rank = work / seconds / self._groups.world.size
        rates = {
            f"perf/{phase}_tokens_per_second": tokens / seconds,
            f"perf/{phase}_tflops_per_rank": per_rank / 1e12,
        }
        return rates if self._peak is None else rates | {f"perf/{phase}_mfu": per_rank / self._peak}

    def _text(self, counts: Sequence[tuple[int, int, int]]) -> float:
        """Return the operations of sequences, by the arguments of `flops.text` for each."""
        each = np.array(counts, np.float64).reshape(-1, 3).T
        return float(np.sum(flops.text(self._hf_config, *each).total))

    def _tower(self, grids: Sequence[tuple[int, int, int]]) -> float:
        return sum(flops.vision(self._hf_config, t * h * w, h * w).total for t, h, w in grids)

    def _add(self, phase: str, work: float, tokens: int) -> None:
        self.counted[f"{phase}/work"] += work
        self.counted[f"{phase}/tokens"] += tokens

    def _reset(self) -> None:
        self.counted = {f"{phase}/{kind}": 0.0 for phase in PHASES for kind in ("work", "tokens")}


def peak_flops(configured_tflops: float, device: torch.device) -> float | None:
    """Return the operations per second of a rank's device, by default by its name, if known."""
    if configured_tflops:
        return configured_tflops * 1e12
    return peak_of(torch.cuda.get_device_name(device.index)) if device.type == "cuda" else None
