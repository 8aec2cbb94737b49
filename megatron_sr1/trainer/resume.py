"""Checkpoints of a run: what it resumes from, its saves, and requests to stop it.

A run resumes only what was trained in the same stage and from the same model: the KL reference is
read from `model.path`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint.folders import fingerprint, latest_step
from megatron_sr1.checkpoint.loading import load_checkpoint
from megatron_sr1.checkpoint.saving import EVALUATION, SaveQueue
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.runtime import failure, signals
from megatron_sr1.runtime.collectives import sum_over_ranks
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.optimizer import schedule_change, schedule_facts

log = logging.getLogger(__name__)
FINGERPRINT = "fingerprint of model.path's weights"
Phase = Callable[[str], AbstractContextManager[None]]


class RunCheckpoints:
    """Checkpoints of a run, in `directory`."""

    def __init__(self, config: Config, phase: Phase) -> None:
        """Touch no file yet; `phase` times a named phase of a step."""
        self._config, self._phase = config, phase
        self.directory = Path(config.output) / "checkpoints"
        self._saves = SaveQueue(self.directory, config.checkpoint)
        self._origin: dict[str, str] = {}

    def resume(self, actor: Actor) -> dict[str, Any] | None:
        """Load the latest checkpoint into the actor; collective over all ranks.

        Returns:
            the state that was saved with it; None if there is no checkpoint.

        Raises:
            ConfigError: the checkpoint is of another stage, or was trained from another model.
            CheckpointError: it is damaged.
        """
        self._origin = {
            "stage": self._config.stage,
            "model.path": self._config.model.path,
            FINGERPRINT: fingerprint(actor.source),
        }
        if latest_step(self.directory) is None:
            return None
        verify = self._config.checkpoint.verify
        state = load_checkpoint(self.directory, actor.trained, verify=verify)
        self._check_origin(state)
        change = schedule_change(state.get("schedule"), self._schedule(actor, state["step"]))
        if change and actor.groups.world.rank == 0:
            log.warning("the learning-rate schedule is not the checkpoint's: %s", change)
        log.info("resumed from step %d in %s", state["step"], self.directory)
        return state

    def _check_origin(self, state: Mapping[str, Any]) -> None:
        for key, value in self._origin.items():
            if key not in state and key == FINGERPRINT:
                log.warning("%s: saved without the %s; taken as the same", self.directory, key)
            elif state.get(key) != value:
                raise ConfigError(
                    f"{self.directory} has {key}={state.get(key)}, now it is {value}; give the "
                    "former, or another output"
                )

    def _schedule(self, actor: Actor, step: int) -> dict[str, Any]:
        return schedule_facts(self._config, actor.optimizer, actor.scheduler, step)

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint is saved after this step in any case."""
        every = self._config.checkpoint.every_steps
        return step == self._config.optimizer.num_steps or bool(every and step % every == 0)

    def finish_step(
        self, actor: Actor, state: Mapping[str, Any], rates: Mapping[str, float]
    ) -> bool:
        """Save if a checkpoint is due or a stop is requested, and publish finished saves.

        Collective over all ranks.

        Args:
            actor: to be saved.
            state: JSON values that `resume` returns; `step` is the step that is finished.
            rates: result of the actor's evaluation, if there was one.

        Returns:
            True if a stop is requested on any rank.
        """
        step = state["step"]
        flags = {"stop": signals.stop_requested(), "writing": self._saves.is_writing}
        with failure.deadline("ask", self._config.launch.phase_deadline_seconds):
            totals = sum_over_ranks(actor.groups, flags)
        stop = totals["stop"] > 0
        if self._saves and not totals["writing"]:
            with self._phase("save"):
                self._saves.finish_oldest()
        if stop or self.is_due(step):
            with self._phase("save"):
                rated = {EVALUATION: dict(rates)} if rates else {}
                schedule = self._schedule(actor, step)
                saved = {**state, "schedule": schedule, **rated, **self._origin}
                self._saves.add(step, actor.trained, saved, actor.source.hf_files)
        if stop or step == self._config.optimizer.num_steps:
            with self._phase("save"):
                self._saves.finish_all()
        return stop
