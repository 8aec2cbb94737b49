"""Reading the configuration: YAML files and overrides over the defaults, by OmegaConf.

YAML files hold differences from the defaults, or from the file that they name as `base`;
`group.key=value` overrides come last. An unknown key or an impossible
value is a `ConfigError` that names the nearest valid one. Tags that would make objects are refused
by the parser, and of OmegaConf's interpolations only `${oc.env:NAME}` is read.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megatron_sr1.config import Config
from megatron_sr1.config_checks import keys, validate
from megatron_sr1.errors import ConfigError

BASE = "base"
"""Key of a file that names the one it builds on."""
MAX_YAML_BYTES = 2**18
RENAMED = {"reward.max_ungraded": "reward.max_ungraded_share, a share of each step's prompts"}
"""Old key -> the new one and what it takes; an old one is refused by that name."""
_ENVIRONMENT = re.compile(r"\$\{oc\.env:[A-Za-z_][A-Za-z0-9_]*(,[^${}]*)?\}")


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Resolve a YAML file and `group.key=value` overrides over the defaults.

    Args:
        path: YAML file with differences from the defaults, or from another file that it names as
            `base`, a path beside it; None for none.
        overrides: dotted assignments, later ones win.

    Returns:
        the validated configuration.

    Raises:
        ConfigError: file absent or not a mapping, unknown key, wrong type or impossible value.
    """
    config = OmegaConf.structured(Config)
    layers: list[tuple[str, Any]] = []
    if path is not None:
        layers += _read_layers(Path(path))
    for text in overrides or []:
        layers.append((ascii(text)[1:-1][:200], _read_override(text)))
    for name, layer in layers:
        _check_interpolations(layer, name)
        try:
            config = OmegaConf.merge(config, layer)
        except ConfigKeyError as error:
            raise ConfigError(f"{name}: {_unknown(error.full_key or str(error.key))}") from None
        except OmegaConfBaseException as error:
            where = "" if error.full_key is None else f"key {error.full_key!r}: "
            raise ConfigError(f"{name}: {where}{_reason(error)}") from None
    try:
        resolved = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{path or 'configuration'}: {error.full_key} is not set; give it in the file or as "
            f"{error.full_key}=VALUE"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'configuration'}: {_reason(error)}") from None
    assert isinstance(resolved, Config)
    validate(resolved)
    return resolved


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dictionary of a configuration, for config.json."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def _read_layers(path: Path) -> list[tuple[str, DictConfig]]:
    """A file and the ones it builds on, the first base in front."""
    layers: list[tuple[str, DictConfig]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ConfigError(f"{path}: builds on itself; of {BASE} each file names another")
        seen.append(path.resolve())
        layer = _read_yaml(path)
        base = layer.pop(BASE, None)
        layers.insert(0, (str(path), layer))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise ConfigError(f"{path}: {BASE} is {base!r}; expected the path of a YAML file")
        path = path.parent / base


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes, at most {MAX_YAML_BYTES}")
    try:
        read = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors share no base with OmegaConf's
        raise ConfigError(f"{path}: not readable as YAML: {_reason(error)}") from None
    if not isinstance(read, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of groups at the top, got a list or a value")
    return read


def _read_override(text: str) -> DictConfig:
    key, mark, value = text.partition("=")
    if not mark:
        raise ConfigError(f"override {text!r}: expected group.key=value, as seed=2")
    try:
        layer = OmegaConf.from_dotlist([text])
        if not value:  # "data.eval=" empties a text; OmegaConf alone would read a null
            OmegaConf.update(layer, key, "")
    except Exception as error:  # of yaml, of OmegaConf, of the encoding
        raise ConfigError(f"override {text[:200]!a}: {_reason(error)}") from None
    return layer


def _check_interpolations(layer: DictConfig, name: str) -> None:
    """Values from the environment are read; other keys' would multiply without a bound."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from (str(key), *texts(inner))
        elif isinstance(value, list):
            for inner in value:
                yield from texts(inner)
        else:
            yield str(value)

    for text in texts(OmegaConf.to_container(layer)):
        if "${" in _ENVIRONMENT.sub("", text):
            raise ConfigError(
                f"{name}: {text[:80]!a}: of interpolations only ${{oc.env:NAME}} and "
                "${oc.env:NAME,default} are read; write the value"
            )


def _reason(error: Exception) -> str:
    """An error in one line; of yaml's, what is wrong and where."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark is not None:
        return f"{' '.join(str(problem).split())}, line {mark.line + 1}"[:300]
    lines = str(error).splitlines() or [type(error).__name__]
    return ascii(lines[0])[1:-1][:300] if not lines[0].isprintable() else lines[0][:300]


def _unknown(key: str) -> str:
    if key in RENAMED:
        return f"{key!r} is no longer a key; the new one is {RENAMED[key]}"
    near = difflib.get_close_matches(key, keys(), n=1, cutoff=0.0)
    return f"unknown key {key!r}; the nearest is {near[0]!r}"
