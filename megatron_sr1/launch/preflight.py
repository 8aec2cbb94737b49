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
            f"model.path={path}: no such folder; give a Hugging Face directory or a checkpoint"
        )
    is_published = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    is_ours = (path / "latest").exists() or (path / ".metadata").exists()
    if not is_published and not is_ours and not any(path.glob("step_*")):
        raise CheckpointError(
            f"model.path={path} is no checkpoint: expected a folder with config.json and "
            "*.safetensors (Hugging Face), or one that a run or tools/convert_checkpoint.py wrote"
        )


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
    if not Path(folder).is_dir():
        raise DataError(f"{key}={folder}: no such folder ({advice})")
    if not any(Path(folder).glob("*.tar")):
        raise DataError(f"{key}={folder} holds no *.tar shard ({advice})")
