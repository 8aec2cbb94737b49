"""Checkpoints of a run: what it resumes from, and the saves that are being written.

In: the actor, and the JSON state of a stage. Out: a resumed actor with its state, or checkpoints
under `DIR/checkpoints`. A run resumes only what was trained in the same stage and from the same
model: the KL reference is read from `model.path`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint.folders import fingerprint, latest_step
from megatron_sr1.checkpoint.loading import load_checkpoint
from megatron_sr1.checkpoint.saving import EVALUATION, Keep, SaveQueue
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.trainer.actor import Actor

log = logging.getLogger(__name__)
FINGERPRINT = "fingerprint of model.path's weights"


class RunCheckpoints:
    """Checkpoints of a run.

    Args:
        config: of the run.

    Attributes:
        directory: where they are.
        saves: those that are being written.
    """

    def __init__(self, config: Config) -> None:
        """Touch no file yet."""
        self._config, saved = config, config.checkpoint
        self.directory = Path(config.output) / "checkpoints"
        keep = Keep(saved.keep_last, saved.keep_best, saved.best_by)
        limit = saved.max_in_flight if saved.asynchronous else 0
        self.saves = SaveQueue(self.directory, keep, limit)
        self._origin: dict[str, str] = {}

    def resume(self, actor: Actor) -> dict[str, Any] | None:
        """Load the latest checkpoint into the actor; collective over all ranks.

        Returns:
            The state that was saved with it, or None if there is no checkpoint.

        Raises:
            ConfigError: the checkpoint is of another stage, was trained from another model, or is
                not to be resumed from.
            CheckpointError: it is damaged.
        """
        self._origin = {
            "stage": self._config.stage,
            "model.path": self._config.model.path,
            FINGERPRINT: fingerprint(actor.source),
        }
        found = latest_step(self.directory)
        if found is None:
            return None
        if not self._config.checkpoint.resume:
            raise ConfigError(
                f"{self.directory} holds a run up to step {found}, and checkpoint.resume=false "
                "would write over it; give another output"
            )
        verify = self._config.checkpoint.verify
        state = load_checkpoint(self.directory, actor.trained, verify=verify)
        self._check_origin(state)
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

    def save(
        self, actor: Actor, step: int, state: Mapping[str, Any], rates: Mapping[str, float]
    ) -> None:
        """Save, or begin to, everything that a resumed run needs; collective over all ranks.

        Args:
            actor: to be saved.
            step: number of the checkpoint.
            state: JSON values that `resume` returns.
            rates: what an evaluation of the actor gave; empty where there was none.
        """
        rated = {EVALUATION: dict(rates)} if rates else {}
        state = {**state, **rated, **self._origin}
        self.saves.add(step, actor.trained, state, actor.source.hf_files)
