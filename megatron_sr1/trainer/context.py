"""A run's state on one rank: steps, phases, counts of bad samples, metrics and checkpoints.

A run resumes only what was trained in the same stage and from the same model: the KL reference is
read from `model.path`.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_sr1.checkpoint.folders import (
    ADAPTER,
    FINGERPRINT,
    fingerprint,
    latest_step,
    read_state,
)
from megatron_sr1.checkpoint.loading import load_checkpoint
from megatron_sr1.checkpoint.saving import EVALUATION, SaveQueue
from megatron_sr1.config.run import Config
from megatron_sr1.data.loader import Loader
from megatron_sr1.errors import ConfigError, DataError, GradingError
from megatron_sr1.observability.metrics import MetricsFile
from megatron_sr1.observability.profiling import (
    STEPS_BETWEEN_TRIMS,
    StepMeter,
    StepProfiler,
    trim_host_memory,
)
from megatron_sr1.observability.sinks import Images, Sink, make_sinks
from megatron_sr1.rewards.score import cross
from megatron_sr1.runtime import failure, signals
from megatron_sr1.runtime.chat import PHASE_SHARE, ChatClient
from megatron_sr1.runtime.files import write_text
from megatron_sr1.runtime.groups import Groups, sum_over_ranks
from megatron_sr1.runtime.host_memory import frozen_objects, no_collection
from megatron_sr1.runtime.start import START_FILE, start_facts
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.optimizer import schedule_change, schedule_facts
from megatron_sr1.trainer.throughput import Throughput

T = TypeVar("T")
Evaluate = Callable[[bool], dict[str, dict[str, float]]]
"""Evaluates the actor; returns the rates of each set. The argument says that it is the last time.
Collective over all ranks."""
log = logging.getLogger(__name__)
READER = "rollout.endpoint"
UNGRADED_WARNING_SHARE = 0.05
"""Share of a step's prompts left out by the grader above which the log warns."""


class Context:
    """State of one stage on one rank.

    Attributes:
        checkpoints: directory of the run's checkpoints.
        step: finished steps.
        loader: order of the training set; only if there is one.
        throughput: counts a step's work; exists after `start`.
        skipped: unusable samples of the run.
        ungraded: prompts of the run that the grader left out.
        is_leaving: a stop was requested on some rank, and the run is saved; it can be resumed.
        exit_status: of the command, once the stage has written everything.
    """

    def __init__(self, config: Config, groups: Groups, *sizes: int) -> None:
        """Touch no file yet: `start` or `open` does.

        `sizes` are the numbers of samples of the training sets; none, or 0, without training.

        Raises:
            ConfigError: the key of `rollout.endpoint` is missing.
        """
        self.config, self.groups = config, groups
        self.run_dir = Path(config.output)
        self.step = self.skipped = self.ungraded = self.exit_status = 0
        self._left_out = 0  # by this rank as a leader, and not yet among `skipped`
        self.is_leaving = False
        endpoint = config.endpoints().get(READER)
        self._reader = None if endpoint is None else ChatClient(READER, endpoint)
        self.meter = StepMeter()
        self.throughput: Throughput
        rank, logged = groups.world.rank, config.logging
        profiled = logged.profile_steps if rank in logged.profile_ranks else ()
        num_steps = config.optimizer.num_steps or 0
        self._profiler = StepProfiler(profiled, num_steps, self.run_dir, rank)
        self.checkpoints = self.run_dir / "checkpoints"
        self._saves = SaveQueue(self.checkpoints, config.checkpoint)
        self._counts: dict[str, float] = {}
        self._origin: dict[str, Any] = {}
        self._sinks: list[Sink] = []
        self._metrics: MetricsFile | None = None
        if any(sizes):
            data = config.data
            order = (config.seed, data.shuffle, data.shares)
            self.loader = Loader(sizes, data.prompts_per_step, *order)

    @property
    def is_writer(self) -> bool:
        """True on the one rank that writes the run's files."""
        return self.groups.world.rank == 0

    @property
    def has_steps_left(self) -> bool:
        """True while the loop has steps to do."""
        return self.step < self.config.num_steps and not self.is_leaving

    def steps(self) -> Iterator[None]:
        """Yield at the start of each step that is left; garbage is collected between them."""
        with no_collection(), frozen_objects():
            while self.has_steps_left:
                yield

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, record its memory, and abort the run if it exceeds its deadline."""
        profiled = torch.profiler.record_function(name)
        with self.meter.phase(name), profiled, self._deadline(name):
            yield

    def _deadline(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Abort the run if a block exceeds the deadline of a phase, without timing it."""
        limits = self.config.launch
        is_setup = name == "setup"
        seconds = limits.setup_deadline_seconds if is_setup else limits.phase_deadline_seconds
        return failure.deadline(name, seconds)

    def count(self, values: Mapping[str, float]) -> None:
        """Add to metrics of the current step that are summed over the ranks, each of which counts.

        All ranks have the same names.
        """
        for name, value in values.items():
            self._counts[name] = self._counts.get(name, 0.0) + value

    def read_usable(
        self, read: Callable[[int], T], indices: Iterable[int], is_replica_leader: bool
    ) -> list[T]:
        """Read samples; log and leave out the unusable ones, which `count_skipped` adds up.

        One of the ranks that read the same samples is their leader and counts.
        """
        found = []
        for index in indices:
            try:
                found.append(read(index))
            except DataError as error:
                self._left_out += is_replica_leader
                log.warning("skipped: %s", error)
        return found

    def count_skipped(self) -> None:
        """Add up the samples that all ranks have left out; collective over them.

        Raises:
            DataError: too many samples of the run are unusable; all ranks raise.
        """
        newly = sum_over_ranks(self.groups, {"skipped": float(self._left_out)})
        self.skipped, self._left_out = self.skipped + round(newly["skipped"]), 0
        limit = self.config.data.max_skipped
        if self.skipped > limit:
            raise DataError(
                f"{self.skipped} samples skipped, at most {limit} (data.max_skipped); the warnings "
                "above name them"
            )

    def count_ungraded(self, newly: Mapping[int, str], num_prompts: int) -> float:
        """Add up prompts that the grader left out, and return their share of a step's prompts.

        `newly` holds the limit that each prompt met, by its index, equal on all ranks.

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
        if share > UNGRADED_WARNING_SHARE and self.is_writer:
            warning = "%s and are left out; reward.max_ungraded_share would stop the run: %s"
            log.warning(warning, what, examples)
        return share

    def save_lines(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a jsonl file of the run as a whole; only on the writer."""
        if not self.is_writer:
            return
        target = self.run_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    @contextlib.contextmanager
    def beside(self, work: Callable[[], T]) -> Iterator[Future[T]]:
        """Call `work` in a thread while a block computes, which takes the result at its end.

        Collectives of the thread use `Groups.background`. A block that raises does not wait for it.
        """
        pool = ThreadPoolExecutor(1, "beside")
        try:
            yield pool.submit(work)
        finally:
            pool.shutdown(wait=False)

    def record_rollouts(self, lines: Sequence[Mapping[str, Any]], images: Images) -> None:
        """Save the current step's rollouts, if configured, and show them; only on the writer."""
        step = self.step + 1
        if self.config.logging.rollouts:
            self.save_lines(f"rollouts/step_{step}.jsonl", lines)
        rewards = [line["reward"] for line in lines]
        cells = cross((reward["accuracy"], reward["self_reward"]) for reward in rewards)
        for sink in self._sinks:
            sink.show(step, lines, images, cells)

    def show_answers(self, name: str, lines: Sequence[Mapping[str, Any]], images: Images) -> None:
        """Show the first answers to a held-out set; only on the writer."""
        with self._deadline("log"):
            for sink in self._sinks:
                sink.show_answers(name, lines, images)

    def start(self, actor: Actor) -> None:
        """Resume the latest checkpoint, if there is one, then open metrics and sinks.

        Collective over all ranks.

        Raises:
            ConfigError: the checkpoint is of another stage, of other adapters, or was trained from
                another model.
            CheckpointError: it is damaged.
        """
        self._origin = {
            "stage": self.config.stage,
            "model.path": self.config.model.path,
            FINGERPRINT: fingerprint(actor.source),
            ADAPTER: adapter_facts(self.config),
        }
        if latest_step(self.checkpoints) is not None:
            self._resume(actor)
        self.open()
        self.throughput = Throughput(self.config, actor.hf_config, self.groups)
        if self.is_writer:
            self._metrics = MetricsFile(self.run_dir / "metrics.jsonl")
            # An evaluation at the start is step 0, and is done again without a checkpoint.
            self._metrics.keep_until(self.config.stage, self.step or -1)
            self._sinks = make_sinks(self.config, self.run_dir, self.step)
        self._profiler.begin(self.step + 1)

    def _resume(self, actor: Actor) -> None:
        step, verify = latest_step(self.checkpoints), self.config.checkpoint.verify
        state = read_state(self.checkpoints / f"step_{step}")["state"]
        for key, value in self._origin.items():
            if key not in state and key == FINGERPRINT:
                log.warning("%s: saved without the %s; taken as the same", self.checkpoints, key)
            elif state.get(key) != value:
                raise ConfigError(
                    f"{self.checkpoints} was saved with {key}={state.get(key)}, this run has "
                    f"{value}; use the saved value or another output directory"
                )
        load_checkpoint(self.checkpoints, actor.trained, verify=verify)
        self.step, self.skipped = state["step"], state["skipped"]
        self.ungraded = state.get("ungraded", 0)
        self.loader.load_state_dict(state["loader"])
        schedule = schedule_facts(self.config, actor.optimizer, actor.scheduler, self.step)
        change = schedule_change(state.get("schedule"), schedule)
        if change and self.is_writer:
            log.warning("the learning-rate schedule is not the checkpoint's: %s", change)
        log.info("resumed from step %d in %s", self.step, self.checkpoints)

    def open(self) -> None:
        """Write the resolved configuration, and how the run was started; only on the writer."""
        if self.is_writer:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(self.config), indent=2) + "\n"
            write_text(self.run_dir / "config.json", text)
            facts = json.dumps(start_facts(self.groups.world.size), indent=2) + "\n"
            write_text(self.run_dir / START_FILE, facts)

    def evaluate_at_start(self, evaluate: Evaluate | None) -> None:
        """Log an evaluation before the first step as step 0, if configured.

        Its time is in the line of step 1, with that of the setup.
        """
        if evaluate is not None and self.config.evaluation.at_start and self.step == 0:
            self._log(flat(evaluate(False)))

    def _log(self, line: Mapping[str, float]) -> None:
        """Write the metrics of the current step; only on the writer."""
        if self._metrics is not None:
            self._metrics.append(self.step, self.config.stage, line)
            with self._deadline("log"):
                for sink in self._sinks:
                    sink.log(self.step, line)

    def finish_step(
        self, values: Mapping[str, float], actor: Actor, evaluate: Evaluate | None = None
    ) -> None:
        """Count the step, log its metrics, and save a checkpoint if one is due or a rank must stop.

        Metrics come first: a kill between the two loses a line that is written again, never one
        that is not. So the time of a save is in the next step's line.

        `evaluate` is called every `evaluation.every_steps`, after the last step, and before a save
        that is due with `checkpoint.keep_best`.
        """
        self.step += 1
        with self._deadline("profile"):
            self._profiler.end(self.step)
        every, is_last = self.config.checkpoint.every_steps, not self.has_steps_left
        is_due = is_last or bool(every and self.step % every == 0)
        found: dict[str, dict[str, float]] = {}
        if evaluate is not None and (is_last or self._is_evaluated(is_due)):
            found = evaluate(is_last)
        if found or self.step % STEPS_BETWEEN_TRIMS == 0:
            trim_host_memory()
        times, memory = self.meter.take()
        flags = {"stop": signals.stop_requested(), "writing": self._saves.is_writing}
        with self._deadline("ask"):
            work = self.throughput.counted
            totals = sum_over_ranks(self.groups, {**flags, **work, **self._counts})
        counts = {name: totals[name] for name in self._counts}
        perf = self.throughput.take(times, totals)
        self._counts.clear()
        skipped = {"data/skipped": self.skipped}
        self._log({**values, **counts, **flat(found), **skipped, **times, **perf, **memory})
        stop = totals["stop"] > 0
        if self._saves and not totals["writing"]:
            with self.phase("save"):
                self._saves.finish_oldest()
        if stop or is_due:
            with self.phase("save"):
                self._save(actor, next(iter(found.values()), {}))
        if stop or is_last:
            with self.phase("save"):
                self._saves.finish_all()
        if not stop:
            return self._profiler.begin(self.step + 1)
        self.is_leaving = True
        if self.is_writer:
            message = "stop requested: saved step %d of %d; the same command continues from there"
            log.info(message, self.step, self.config.num_steps)
            signals.mark_unfinished()  # for the launcher

    def _is_evaluated(self, is_saved: bool) -> bool:
        every, keep_best = self.config.evaluation.every_steps, self.config.checkpoint.keep_best
        return bool(every and self.step % every == 0) or bool(keep_best and is_saved)

    def _save(self, actor: Actor, rated: Mapping[str, float]) -> None:
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "ungraded": self.ungraded,
            "loader": self.loader.state_dict(),
            "schedule": schedule_facts(self.config, actor.optimizer, actor.scheduler, self.step),
            **({EVALUATION: dict(rated)} if rated else {}),
            **self._origin,
        }
        self._saves.add(self.step, actor.trained, state, actor.source.hf_files)

    def reader(self, is_replica_leader: bool) -> ChatClient | None:
        """Return what reads descriptions at `rollout.endpoint`, ready for a phase's requests.

        None without that endpoint, and on a replica's other ranks.
        """
        if self._reader is None or not is_replica_leader:
            return None
        self._reader.begin(PHASE_SHARE * self.config.launch.phase_deadline_seconds)
        return self._reader

    def close(self) -> None:
        """Close the sinks, and the connection to an endpoint."""
        if self._reader is not None:
            self._reader.close()
        for sink in self._sinks:
            sink.close()


def adapter_facts(config: Config) -> dict[str, Any] | None:
    """Describe the adapters of a run, as JSON values; a resumed run must have the same."""
    adapter = config.adapter
    names = ("rank", "alpha", "scaling", "targets")
    facts = {name: getattr(adapter, name) for name in names} | {"dtype": config.trained_dtype}
    return facts if adapter.rank else None


def flat(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the rates of all sets under their names in metrics.jsonl."""
    return {f"evaluation/{s}/{name}": value for s, r in found.items() for name, value in r.items()}
