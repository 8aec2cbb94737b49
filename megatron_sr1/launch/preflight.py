"""Check the paths of a configuration before any rank starts: one clear line, at once."""

from __future__ import annotations

from pathlib import Path

from megatron_sr1.config import Config
from megatron_sr1.errors import CheckpointError, ConfigError, DataError


def check_paths(config: Config, has_model: bool = True) -> None:
    """Check that model, data and output can be what the stage needs.

    Args:
        config: of the run.
        has_model: false where another run will have written the model by then.

    Raises:
        CheckpointError: model.path is absent or holds no checkpoint.
        DataError: a shard folder that the stage needs is not named, absent or without shards.
        ConfigError: output names a file, or reward.function an absent one.
    """
    if has_model:
        _check_model(Path(config.model.path))
    if config.stage in ("sft", "grpo"):
        _check_shards("data.train", config.data.train, needed=True)
    _check_shards("data.eval", config.data.eval, needed=config.stage == "eval")
    _check_function(config.reward.function)
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise ConfigError(f"output={config.output} is a file; name a folder for the run")


def _check_model(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(
            f"model.path={path}: {_absent(path)}; give a Hugging Face directory or a checkpoint"
        )
    is_published = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    is_ours = (path / "latest").exists() or (path / ".metadata").exists()
    if not is_published and not is_ours and not any(path.glob("step_*")):
        raise CheckpointError(
            f"model.path={path} is no checkpoint: expected a folder with config.json and "
            "*.safetensors (Hugging Face), or one that a run or tools/convert_checkpoint.py wrote"
            f"{_seen(path)}"
        )


def _absent(path: Path) -> str:
    """Say that a folder is not there, where it was looked for, and what would have made it."""
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    made = ", which make demo makes" if path.parts[:2] == ("runs", "demo") else ""
    return f"no such folder{where}{made}"


def _seen(path: Path) -> str:
    """What was taken for a checkpoint, and what it may have been mistaken for."""
    if path.is_file():
        return f"; this is a file, try {path.parent}"
    for name in ("hf", "checkpoints"):
        if (path / name).is_dir():
            return f"; this is a run, try {path / name}"
    if (path / "config.json").is_file():
        weights = ", ".join(sorted(p.name for p in path.glob("*.bin"))[:3])
        held = f"weights in {weights} only, which are not read" if weights else "no weights"
        return f"; this has config.json and {held}"
    if any(path.glob("*.tar")):
        return "; this has shards: a folder for data.train"
    return ""


def _check_function(named: str) -> None:
    file = named.rpartition(":")[0]
    if named and not Path(file).is_file():
        raise ConfigError(
            f"reward.function={named}: no file {file or named}; expected FILE.py:NAME"
        )


def _check_shards(key: str, folder: str, needed: bool) -> None:
    advice = "tools/make_shards.py writes shards"
    if not folder:
        if needed:
            raise DataError(f"{key} is not set; name a folder of webdataset shards ({advice})")
        return
    path = Path(folder)
    if path.is_file():
        raise DataError(f"{key}={folder} is a file; name the folder of its shards ({advice})")
    if not path.is_dir():
        raise DataError(f"{key}={folder}: {_absent(path)} ({advice})")
    if not any(path.glob("*.tar")):
        below = sorted({str(shard.parent) for shard in path.glob("*/*.tar")})
        nearest = f"; there are some in {', '.join(below[:5])}" if below else f" ({advice})"
        raise DataError(f"{key}={folder} holds no *.tar shard{nearest}")
