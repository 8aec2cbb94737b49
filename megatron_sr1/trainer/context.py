"""What a stage carries along: configuration, groups, data order, time, sinks, checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sr1.config.loading import save_config
from megatron_sr1.config.run import Config
from megatron_sr1.data.loader import Loader
from megatron_sr1.data.packing import Size, pack_samples, plan_ranks
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import DataError, GradingError
from megatron_sr1.model.flops import patch_cost
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.row_split import sequence_multiple
from megatron_sr1.model.transformer_config import fp8_row_multiple
from megatron_sr1.observability.metrics import MetricsFile
from megatron_sr1.observability.profiling import (
    STEPS_BETWEEN_TRIMS,
    PeakMemory,
    PhaseTimer,
    StepProfiler,
    trim_host_memory,
)
from megatron_sr1.observability.sinks import Sink, make_sinks
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime import failure, signals
from megatron_sr1.runtime.files import write_text
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.optimizer import schedule_change, schedule_facts
from megatron_sr1.trainer.resume import RunCheckpoints
from megatron_sr1.trainer.samples import Samples
from megatron_sr1.trainer.throughput import Throughput, peak_flops

log = logging.getLogger(__name__)
UNGRADED_FLOOD = 0.05
"""Share of a step's prompts left out by the grader above which the log warns of it."""


class Context:
    """State of one stage on one rank.

    Args:
        config: of the run.
        groups: the layout.
        processor: tokenizer and image processor.
        num_samples: size of the training set; 0 where nothing is trained.

    Attributes:
        step: steps done.
        throughput: counts a step's work; there once `start` has run.
        is_leaving: a rank was asked to leave; the run is saved, and goes on when started again.
    """

    def __init__(
        self, config: Config, groups: Groups, processor: Processor, num_samples: int
    ) -> None:
        """Touch no file yet: `start` or `open` does."""
        self.config, self.groups, self.processor = config, groups, processor
        self.run_dir = Path(config.output)
        self.step = 0
        self.is_leaving = False
        self.timer, self._memory = PhaseTimer(), PeakMemory()
        rank, logged = groups.world.rank, config.logging
        self.throughput: Throughput
        self._profiler = StepProfiler(
            logged.profile_steps if rank in logged.profile_ranks else (),
            config.optimizer.num_steps,
            self.run_dir,
            rank,
        )
        self.skipped = 0
        self.ungraded = 0  # prompts, over the run
        self._newly_skipped = 0
        self._checkpoints = RunCheckpoints(config)
        self._started = time.monotonic()
        self._sinks: list[Sink] = []
        self._metrics: MetricsFile | None = None
        if num_samples:
            data = config.data
            self.loader = Loader(num_samples, data.prompts_per_step, config.seed, data.shuffle)

    @cached_property
    def _patch_cost(self) -> float:
        """Of an image's patch, in text tokens."""
        return patch_cost(read_hf_config(self.processor.model_dir))

    @property
    def is_writer(self) -> bool:
        """True on the one rank that writes the run's files."""
        return self.groups.world.rank == 0

    @property
    def has_steps_left(self) -> bool:
        """True while there are steps left to do now."""
        return self.step < self.config.optimizer.num_steps and not self.is_leaving

    @property
    def checkpoints(self) -> Path:
        """Directory of the run's checkpoints."""
        return self._checkpoints.directory

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, note its memory, and end the run if it outlasts its deadline."""
        launch = self.config.launch
        seconds = (
            launch.setup_deadline_seconds if name == "setup" else launch.phase_deadline_seconds
        )
        with (
            self.timer.phase(name),
            self._memory.phase(name),
            torch.profiler.record_function(name),
            failure.deadline(name, seconds),
        ):
            yield

    def pack(self, chosen: Sequence[TrainSample], samples: Samples) -> list[PackedBatch]:
        """Micro-batches of this rank's samples within the token budget."""
        parallel = self.config.parallel
        share_multiple = parallel.tensor if parallel.sequence else 1
        if self.config.model.fp8:
            fp8_multiple = fp8_row_multiple(self.config.model.fp8_recipe)
            share_multiple = max(share_multiple, fp8_multiple) * parallel.tensor
        multiple = sequence_multiple(parallel.context)
        return pack_samples(
            chosen,
            self.config.data.row_budget,
            samples.vision if self.groups.is_first_stage else None,
            image_pad_id=self.processor.image_pad_id,
            merge_size=self.processor.merge_size,
            patch_cost=self._patch_cost,
            sequence_multiple=multiple,
            pad_multiple=multiple * share_multiple,
        )

    def share(self, sizes: Sequence[Size]) -> list[int]:
        """Which samples of an update this rank learns from, by what they cost.

        Args:
            sizes: of all of them, the same on all ranks.
        """
        data = self.groups.data
        return plan_ranks(sizes, data.size, self._patch_cost)[data.rank]

    def skip(self, error: DataError) -> None:
        """Name and count a bad sample; whether there are too many is judged with the step."""
        self._newly_skipped += 1
        log.warning("skipped: %s", error)

    def count_skipped(self, speaks: bool) -> None:
        """Add up the samples skipped since the last call; collective over all ranks.

        Args:
            speaks: True on one of the ranks that read the same samples.

        Raises:
            DataError: there are too many; all ranks raise.
        """
        newly = {"skipped": float(self._newly_skipped if speaks else 0)}
        self.skipped += round(self.sum_over_ranks(newly)["skipped"])
        self._newly_skipped = 0
        limit = self.config.data.max_skipped
        if self.skipped > limit:
            raise DataError(
                f"{self.skipped} samples skipped, at most {limit} (data.max_skipped); the warnings "
                "above name them"
            )

    def count_ungraded(self, newly: Mapping[int, str], num_prompts: int) -> float:
        """Add up prompts of a step that the grader left out, and warn where they are many.

        Args:
            newly: index of each prompt -> which limit it met; equal on all ranks.
            num_prompts: of the step.

        Returns:
            their share of the step's prompts.

        Raises:
            GradingError: the share is more than `reward.max_ungraded_share`; all ranks raise.
        """
        self.ungraded += len(newly)
        share, limit = len(newly) / num_prompts, self.config.reward.max_ungraded_share
        examples = "; ".join(list(newly.values())[:3])
        what = f"{len(newly)} of {num_prompts} prompts of this step could not be graded"
        if share > limit:
            raise GradingError(
                f"{what}, at most a share of {limit:g} may (reward.max_ungraded_share): {examples}"
            )
        if share > UNGRADED_FLOOD and self.is_writer:
            log.warning(
                "%s and are left out; reward.max_ungraded_share would stop the run: %s",
                what,
                examples,
            )
        return share

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the world, equal on all ranks; all ranks have the same names."""
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        if self.groups.world.size > 1:
            total = total.to(self.groups.device.torch)
            dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def save_lines(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a jsonl file of the run, whole or not at all; on the writer only."""
        if not self.is_writer:
            return
        target = self.run_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def record_rollouts(self, lines: Sequence[Mapping[str, Any]], samples: Samples) -> None:
        """Save the rollouts of the step under way, if wanted, and show them; on the writer only."""
        step = self.step + 1
        if self.config.logging.rollouts:
            self.save_lines(f"rollouts/step_{step}.jsonl", lines)
        with failure.deadline("log", self.config.launch.phase_deadline_seconds):
            for sink in self._sinks:
                sink.show(step, lines, samples.images)

    def start(self, actor: Actor) -> None:
        """Resume from the latest checkpoint if there is one and it is wanted, then open sinks.

        Raises:
            ConfigError: the checkpoint is of another stage, was trained from another model, or is
                not to be resumed from.
            CheckpointError: it is damaged.
        """
        state = self._checkpoints.resume(actor)
        if state is not None:
            self.step, self.skipped = state["step"], state["skipped"]
            self.ungraded = state.get("ungraded", 0)
            self.loader.load_state_dict(state["loader"])
            change = schedule_change(state.get("schedule"), self._schedule(actor))
            if change and self.is_writer:
                log.warning("the learning-rate schedule is not the checkpoint's: %s", change)
            log.info("resumed from step %d in %s", self.step, self.checkpoints)
        self.open()
        self.throughput = Throughput(
            actor.hf_config,
            self.config.model.freeze,
            self.groups.world.size,
            peak_flops(self.config.logging.peak_tflops, self.groups.device),
        )
        if self.is_writer:
            self._metrics = MetricsFile(self.run_dir / "metrics.jsonl")
            self._metrics.keep_until(self.config.stage, self.step)
            self._sinks = make_sinks(self.config, self.run_dir, self.step)
        self._profiler.begin(self.step + 1)

    def _schedule(self, actor: Actor) -> dict[str, Any]:
        """What the place in the learning-rate schedule means."""
        return schedule_facts(self.config, actor.optimizer, actor.scheduler, self.step)

    def open(self) -> None:
        """Make the run directory and write the resolved configuration; on the writer only."""
        if self.is_writer:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.run_dir / "config.json")

    def finish_step(
        self,
        stage: str,
        values: Mapping[str, float],
        actor: Actor,
        rate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Count the step, tell the sinks, save a checkpoint where one is due or a rank is to leave.

        The line comes first: a kill between the two loses a line that is written again, never one
        that is not. So the time of a save stands in the next step's line.

        Args:
            stage: for the line.
            values: of the step, for the line.
            actor: to be saved.
            rate: evaluates the actor before a save that is due, for `checkpoint.keep_best`.
        """
        self.step += 1
        if self.step % STEPS_BETWEEN_TRIMS == 0:
            trim_host_memory()
        every, last = self.config.checkpoint.every_steps, self.config.optimizer.num_steps
        is_due = self.step == last or bool(every and self.step % every == 0)
        with failure.deadline("profile", self.config.launch.phase_deadline_seconds):
            self._profiler.end(self.step)
        rated = rate() if rate is not None and is_due else {}
        values = {**values, **{f"evaluation/{name}": value for name, value in rated.items()}}
        times = self.timer.take()
        with failure.deadline("perf", self.config.launch.phase_deadline_seconds):
            rates = self.throughput.take(times, self.sum_over_ranks)
        if self._metrics is not None:
            told = {**values, "data/skipped": self.skipped, **times, **rates, **self._memory.take()}
            self._metrics.append(self.step, stage, told)
            with failure.deadline("log", self.config.launch.phase_deadline_seconds):
                for sink in self._sinks:
                    sink.log(self.step, told)
        if self._save_and_poll_stop(actor, rated, is_due):
            self._leave()
        else:
            self._profiler.begin(self.step + 1)

    def _save_and_poll_stop(self, actor: Actor, rates: Mapping[str, float], is_due: bool) -> bool:
        """Save where it is due and publish what has been written.

        Returns:
            True if any rank has received a request to stop.
        """
        saves = self._checkpoints.saves
        with failure.deadline("ask", self.config.launch.phase_deadline_seconds):
            states = {"asked": signals.stop_requested(), "writing": saves.is_writing}
            totals = self.sum_over_ranks({name: float(is_so) for name, is_so in states.items()})
        asked = totals["asked"] > 0
        if saves and not totals["writing"]:
            with self.phase("save"):
                saves.finish_oldest()
        if asked or is_due:
            with self.phase("save"):
                self._save(actor, rates)
        if asked or self.step == self.config.optimizer.num_steps:
            with self.phase("save"):
                saves.finish_all()
        return asked

    def _leave(self) -> None:
        """After the save: the stage's loop ends, and whoever started the job learns of it."""
        self.is_leaving = True
        if self.is_writer:
            log.info(
                "asked to leave: saved step %d of %d; started again, the run goes on from there",
                self.step,
                self.config.optimizer.num_steps,
            )
            signals.mark_unfinished()

    def _save(self, actor: Actor, rates: Mapping[str, float]) -> None:
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "ungraded": self.ungraded,
            "loader": self.loader.state_dict(),
            "schedule": self._schedule(actor),
        }
        self._checkpoints.save(actor, self.step, state, rates)

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()
