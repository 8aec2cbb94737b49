"""The model that `ask` asks, with the settings of the run that it belongs to; free of torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError

GROUPS = ("seed", "model", "data", "rollout", "reward")
"""Settings of a run that its answers depend on."""
OF_TRAINING = {
    "model": ("path", "revision", "commit"),
    "data": ("train", "mixture"),
    "rollout": ("tensor_parallel",),
}
"""Those among them that another model, or one process without training data, does not have."""
SETTINGS_FILE = "settings.json"


def find_run(model: str) -> tuple[str, Path | None]:
    """Return the path of a model's weights, and the configuration of the run that it belongs to.

    Args:
        model: a run directory, whose hf/ is taken, or else its checkpoints; hf/ or a checkpoint of
            a run; any other model directory, or a name on the hub, which belong to no run.

    Raises:
        ConfigError: the run directory holds no model.
    """
    path = Path(model)
    if not path.is_dir():
        return model, None  # a hub name, or an error of `resolve_model`
    if _is_of_run(path / "config.json"):
        for name in ("hf", "checkpoints"):
            if (path / name).is_dir():
                return str(path / name), path / "config.json"
        inside = ", ".join(str(found) for found in sorted(path.glob("*/hf")))
        advice = f"name one of {inside}" if inside else "give the directory of a model"
        raise ConfigError(f"{path} is a run without hf/ and checkpoints/; {advice}")
    for parent in path.resolve().parents[:2]:
        if _is_of_run(parent / "config.json"):
            return model, parent / "config.json"
    return model, None


def _is_of_run(path: Path) -> bool:
    """Return True for a run's config.json, False for a model's, another's, or none."""
    try:
        return path.is_file() and "stage" in json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False


def ask_config(
    model: str,
    overrides: Sequence[str],
    directory: Path,
    number: int = 1,
    temperature: float | None = None,
) -> Config:
    """Return the configuration to ask a model with, in one process.

    Args:
        model: as for `find_run`.
        overrides: `group.key=value`, which come last.
        directory: an empty one, for the files of the session.
        number: responses to a question.
        temperature: of pass 1; None: greedy for one response, 1 for several.

    Raises:
        ConfigError: of the run's configuration or an override, or for several greedy responses.
        CheckpointError: there is no such model.
    """
    path, run_config = find_run(model)
    resolve_model(path)
    found: dict[str, Any] = {} if run_config is None else json.loads(run_config.read_text())
    settings = {name: found[name] for name in GROUPS if name in found}
    for group, names in OF_TRAINING.items():
        for name in names:
            settings.get(group, {}).pop(name, None)
    (directory / SETTINGS_FILE).write_text(json.dumps(settings))
    if temperature is None:
        temperature = 0.0 if number == 1 else 1.0
    own = ["stage=eval", f"output={directory}", "launch.num_processes=1", "logging.level=warning"]
    own += [f"evaluation.samples_per_prompt={number}", f"evaluation.temperature={temperature}"]
    file = directory / SETTINGS_FILE
    try:
        config = load_config(file, [*own, *overrides], has_model=False)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(file), str(run_config or "ask"))) from None
    parallel, rollout, evaluation = config.parallel, config.rollout, config.evaluation
    ranks = config.launch.num_processes
    if max(rollout.tensor_parallel, parallel.replica_size, ranks) > 1:
        raise ConfigError("ask runs in one process; leave parallel, tensor_parallel and ranks at 1")
    if evaluation.samples_per_prompt > 1 and evaluation.temperature == 0:
        raise ConfigError(
            f"--n {evaluation.samples_per_prompt} at temperature 0: greedy responses are all the "
            "same; set --temperature above 0"
        )
    asked = replace(
        rollout,
        samples_per_prompt=evaluation.samples_per_prompt,
        temperature=evaluation.temperature,
        # A likelihood is that of a gold answer, which there is none of.
        pass2_mode=rollout.pass2_mode.replace("likelihood", "generate"),
        pass2_samples=1,
    )
    return replace(config, model=replace(config.model, path=path), rollout=asked)
