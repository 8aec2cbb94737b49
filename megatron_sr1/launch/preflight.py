"""Check the paths of a configuration before any rank starts, with one clear error message.

A model that is named on the hub is downloaded first, and its commit fixed.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.config.run import Config, LaunchConfig
from megatron_sr1.errors import CheckpointError, ConfigError, DataError
from megatron_sr1.runtime.hub import is_hub_name, model_directory

LONGEST_NAME = 255
"""Maximum length of a file name on Linux, bytes."""


def fix_commit(config: Config, weights: bool = True) -> Config:
    """Return the configuration with the commit of a model on the hub, which is downloaded.

    A run that is started again keeps the commit of its config.json. A local model needs none.
    """
    model = config.model
    if not is_hub_name(model.path):
        return config
    model = replace(model, commit=model.commit or _saved_commit(config))
    try:
        commit = model_directory(*model.at, weights).name
    except ConfigError as error:
        absent = _absent(Path(model.path))
        problem = f"{absent}, and as a name on the hub: {error}"
        raise CheckpointError(f"model.path={model.path}: {problem}") from None
    return replace(config, model=replace(model, commit=commit))


def _saved_commit(config: Config) -> str:
    """Return the commit of the same model that the run directory's config.json has, or ""."""
    try:
        saved = json.loads((Path(config.output) / "config.json").read_text())["model"]
        same = all(saved[key] == getattr(config.model, key) for key in ("path", "revision"))
        return str(saved["commit"]) if same and config.checkpoint.resume else ""
    except (OSError, ValueError, LookupError, TypeError):  # none, or not written by a run
        return ""


def needed_paths(config: Config, has_model: bool = True) -> dict[str, str]:
    """Return the paths of model and data that the stage needs, by configuration key."""
    named = {"model.path": config.model.path if has_model else "", **_data_paths(config)}
    return {key: path for key, path in named.items() if path}


def _data_paths(config: Config) -> dict[str, str]:
    named = dict(config.data.paths) if config.stage != "eval" else {}
    sets = config.evaluation.sets.items()
    return named | {f"evaluation.sets.{name}.path": each.path for name, each in sets}


def absent_paths(config: Config) -> dict[str, str]:
    """Return those of the needed paths that do not exist; a hub name does once it is fixed."""
    found = {key: path for key, path in needed_paths(config).items() if not Path(path).exists()}
    if config.model.commit and is_hub_name(config.model.path):
        del found["model.path"]
    return found


def check_paths(config: Config, has_model: bool = True, is_dry_run: bool = False) -> None:
    """Check that model, data, reward function and output are usable, or raise an SR1Error.

    Without `has_model`, an earlier run will have written the model by then. For `is_dry_run` model
    and data need not exist, and a config.json alone is accepted as a model.
    """
    absent = absent_paths(config) if is_dry_run else {}
    if has_model and "model.path" not in absent:
        config = fix_commit(config, weights=not is_dry_run)
        path = model_directory(*config.model.at, weights=not is_dry_run)
        if not (is_dry_run and (path / "config.json").is_file()):
            _check_model(path)
    for key, directory in _data_paths(config).items():
        if key not in absent:
            _check_shards(key, directory)
    if config.stage == "eval" and not config.evaluation.sets:
        problem = "evaluation.sets is empty; name a set of questions: evaluation.sets.NAME.path=DIR"
        raise DataError(f"{problem} (tools/make_shards.py writes its shards)")
    for key, function in config.functions().items():
        file = function.rpartition(":")[0]
        if not Path(file).is_file():
            problem = f"no file {file or function}; expected FILE.py:NAME"
            raise ConfigError(f"{key}={function}: {problem}")
    check_output(config.output)


def check_output(output: str) -> None:
    """Check, without creating it, that a run directory can be created or written to."""
    path = Path(output).absolute()
    if "\0" in output or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise ConfigError(f"output={output[:80]!r}… is not a valid directory name")
    there = next(part for part in (path, *path.parents) if os.path.lexists(part))
    if not there.is_dir():
        below = "" if there == path else f" lies below {there}, which"
        raise ConfigError(f"output={output}{below} is a file; name a directory for the run")
    if not os.access(there, os.W_OK | os.X_OK):
        problem = "cannot be written to (read-only, or another user's); name another directory"
        raise ConfigError(f"output={output}: {there} {problem}")


def crowded(launch: LaunchConfig, num_ranks: int) -> str:
    """Return a warning if this machine has fewer cores than ranks, otherwise ""."""
    cores = len(os.sched_getaffinity(0))
    if launch.device == "cuda" or num_ranks <= cores:
        return ""
    return (
        f"launch.num_processes={num_ranks}, but this machine has {cores} cores: the ranks wait "
        f"for one another; {cores} or fewer are faster"
    )


def _check_model(path: Path) -> None:
    if not path.exists():
        advice = "give a Hugging Face or a checkpoint directory"
        raise CheckpointError(f"model.path={path}: {_absent(path)}; {advice}")
    try:
        resolve_model(path)
    except CheckpointError as error:
        raise CheckpointError(f"model.path={error}{_seen(path)}") from None


def _absent(path: Path) -> str:
    """Say that a directory does not exist, where it was expected, and what would create it."""
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    made = ", which make demo creates" if path.parts[:2] == ("runs", "demo") else ""
    return f"no such directory{where}{made}"


def _seen(path: Path) -> str:
    """Describe what the path holds instead of a checkpoint, with the likely intended path."""
    if path.is_file():
        return f"; this is a file, try {path.parent}"
    for name in ("hf", "checkpoints"):
        if (path / name).is_dir():
            return f"; this is a run, try {path / name}"
    if (path / "config.json").is_file():
        weights = ", ".join(sorted(p.name for p in path.glob("*.bin"))[:3])
        held = f"weights in {weights} only, which are not read" if weights else "no weights"
        return f"; this has config.json and {held}"
    return "; this has shards: a directory for data.train" if any(path.glob("*.tar")) else ""


def _check_shards(key: str, given: str) -> None:
    path, advice = Path(given), "tools/make_shards.py writes shards"
    if not given:
        several = ", or several in data.mixture" if key == "data.train" else ""
        named = f"name a directory of webdataset shards{several}"
        raise DataError(f"{key} is not set; {named} ({advice})")
    if path.is_file():
        raise DataError(f"{key}={path} is a file; name the directory of its shards ({advice})")
    if not path.is_dir():
        raise DataError(f"{key}={path}: {_absent(path)} ({advice})")
    if not any(path.glob("*.tar")):
        below = sorted({str(shard.parent) for shard in path.glob("*/*.tar")})
        nearest = f"; there are some in {', '.join(below[:5])}" if below else f" ({advice})"
        raise DataError(f"{key}={path} holds no *.tar shard{nearest}")
