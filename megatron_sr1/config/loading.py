"""Read the configuration: YAML files and overrides over the defaults, with OmegaConf.

A YAML file has differences from the defaults, or from the file that it names as `base`;
`group.key=value` overrides come last. An unknown key or an impossible value is a `ConfigError` that
names the nearest valid one. The parser refuses tags that would create objects.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, BooleanNode, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from megatron_sr1.config.fields import accepted
from megatron_sr1.config.rules import validate
from megatron_sr1.config.run import Config, keys
from megatron_sr1.errors import ConfigError

BASE = "base"
"""Key of a file that names the one it builds on."""
MAX_YAML_BYTES = 2**18
MAX_SHOWN = 200
"""Characters of a key or value that a message quotes."""
NODES: dict[Any, Any] = {int: IntegerNode, float: FloatNode, bool: BooleanNode}
WORDS: dict[Any, tuple[str, Any, str]] = {
    int: ("an integer", 1, "integers"),
    float: ("a number", 0.5, "numbers"),
    bool: ("true or false", True, "booleans"),
    str: ("a string", "name", "strings"),
}
"""Type of a field -> its name, an example, its plural."""
NEAR = 0.6
"""Least similarity of an unknown key, and of its last part, to a key that is suggested."""
RENAMED = {
    "reward.max_ungraded": "reward.max_ungraded_share, a share of each step's prompts",
    "data.eval": "evaluation.sets.NAME.path, with a name of your choice for the set",
    "data.eval_limit": "evaluation.max_samples",
    "data.prompt_style": "data.pass1_template and data.pass2_template, each full or brief",
    "logging.wandb_samples": "logging.samples",
    "logging.wandb_tables_every": "logging.samples_every",
    "rollout.pass2_order": "data.pass2_template, such as full_description_first",
}
"""Old key -> the new one and what it takes; using an old one is an error that names the new one."""
ALTERNATIVES: tuple[dict[str, Any], ...] = (
    {"optimizer.num_steps": None, "optimizer.num_epochs": None},
    {"optimizer.warmup_steps": 0, "optimizer.warmup_ratio": None},
    {"data.train": "", "data.mixture": {}},
)
"""Keys of which only one may be set, with the value of those that are not: the later one counts,
and a file, or the overrides together, may set only one."""
NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]*")
"""Of a group that the user names; it becomes part of file names and of metrics' names."""
_ENVIRONMENT = re.compile(r"\$\{oc\.env:[A-Za-z_][A-Za-z0-9_]*(,[^${}]*)?\}")


def load_config(
    path: str | Path | None, overrides: list[str] | None = None, has_model: bool = True
) -> Config:
    """Resolve a YAML file, if given, and `group.key=value` overrides; validate the result.

    Without `has_model`, model.path need not be set.

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown or a value wrong.
    """
    config = OmegaConf.structured(Config)
    if not has_model:
        config.model.path = ""
    layers = [] if path is None else _read_layers(Path(path))
    num_files, given = len(layers), dict[str, tuple[int, str]]()
    layers += [(ascii(text)[1:-1][:200], _read_override(text)) for text in overrides or []]
    name = source = str(path or "configuration")
    try:
        for number, (name, layer) in enumerate(layers):
            _check_types(layer, Config(), name)
            _unset_alternatives(config, layer, (min(number, num_files), name), given)
            _clear_named(config, layer)
            config.merge_with(layer)
        name = source
        resolved = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key, advice = error.full_key, "give it in the file or as"
        raise ConfigError(f"{name}: {key} is not set; {advice} {key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise _unusable(name, error) from None
    assert isinstance(resolved, Config)
    validate(resolved)
    return resolved


def _read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[Any, Any]]]:
    """Read a file, on which those `above` build, after the ones that it builds on."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: builds on itself; {BASE} must name another file")
    layer = _read_yaml(path)
    base = layer.pop(BASE, None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: {BASE} is {base!r}; expected the path of a YAML file")
    bases = [] if base is None else _read_layers(path.parent / base, (*above, path.resolve()))
    return [*bases, (str(path), layer)]


def _read_yaml(path: Path) -> dict[Any, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; expected a YAML file, such as {path}/run.yaml")
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes, at most {MAX_YAML_BYTES}")
    try:
        read = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors share no base with OmegaConf's
        raise ConfigError(f"{path}: not readable as YAML: {_reason(error)}") from None
    plain = _plain(read, str(path))
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: expected a mapping of groups at the top, got a list or a value")
    return plain


def _read_override(text: str) -> dict[Any, Any]:
    key, mark, value = text.partition("=")
    if not mark:
        raise ConfigError(f"override {text!r}: expected group.key=value, such as seed=2")
    try:
        layer = OmegaConf.from_dotlist([text])
        # "data.train=" sets an empty text, where OmegaConf alone would read null, and
        # "model.revision=0123" that text, which YAML reads as an octal number.
        if not value or re.fullmatch("0[0-9]+", value):
            OmegaConf.update(layer, key, value)
    except Exception as error:  # of yaml, of OmegaConf, of the encoding
        raise ConfigError(f"override {text[:200]!a}: {_reason(error)}") from None
    return _plain(layer, ascii(text)[1:-1][:200])


def _plain(layer: Any, name: str) -> Any:
    """Return a layer as dictionaries, with environment variables filled in.

    All other interpolations are refused: other keys could multiply endlessly.
    """
    text = _ENVIRONMENT.sub("", str(OmegaConf.to_container(layer)))
    start = text.find("${")
    if start >= 0:
        read = "of interpolations only ${oc.env:NAME} and ${oc.env:NAME,default} are read"
        raise ConfigError(f"{name}: {text[start : start + 80]!a}: {read}; write the value")
    try:
        return OmegaConf.to_container(layer, resolve=True)
    except OmegaConfBaseException as error:
        raise _unusable(name, error) from None


def _check_types(layer: dict[Any, Any], group: Any, name: str, prefix: str = "") -> None:
    """Check that keys are known and that values have their types, before OmegaConf does.

    YAML reads an unquoted `off` as false; for a field with the choice "off", false means that.
    """
    known, kinds = {each.name: each for each in fields(group)}, get_type_hints(type(group))
    for key, value in layer.items():
        if key not in known:
            raise ConfigError(f"{name}: {_unknown(prefix + _first_key(key, value))}")
        default, kind = getattr(group, key), known[key].metadata.get("named")
        if value == MISSING:
            continue
        if kind is not None and not value:
            layer[key] = {}
        elif kind is not None:
            _check_named(value, kind, name, prefix + key)
        elif "any_keys" in known[key].metadata:
            layer[key] = value or {}
            _check_keywords(layer[key], f"{name}: {prefix}{key}")
        elif is_dataclass(default) and isinstance(value, dict):
            _check_types(value, default, name, f"{prefix}{key}.")
        elif value is False and "off" in known[key].metadata.get("choices", ()):
            layer[key] = "off"
        elif is_dataclass(default) or not _fits(value, kinds[key]):
            shown = json.dumps(value, default=str)[:MAX_SHOWN]
            expected = _expected(known[key], kinds[key], default, value)
            raise ConfigError(f"{name}: {prefix}{key} is {shown}; expected {expected}")


def _check_named(groups: Any, kind: type, name: str, key: str) -> None:
    """Check groups of settings whose names the user chose."""
    expected = f"a mapping, for example {{{fields(kind)[0].name}: DIR}}"
    for one, group in groups.items() if isinstance(groups, dict) else [("", groups)]:
        where = f"{name}: {key}.{one}".rstrip(".")
        if not isinstance(groups, dict):
            expected = f"a mapping of names, each with {expected}"
        elif not NAME.fullmatch(str(one)):
            raise ConfigError(f"{where}: expected a name of letters, digits, _ and - only")
        if not isinstance(group, dict):
            shown = json.dumps(group, default=str)[:MAX_SHOWN]
            raise ConfigError(f"{where} is {shown}; expected {expected}")
        _check_types(group, kind(), name, f"{key}.{one}.")


def _check_keywords(value: Any, where: str) -> None:
    """Check a mapping of keyword arguments, which is saved as JSON with the run."""
    shown = json.dumps(value, default=str)[:MAX_SHOWN]
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {shown}; expected a mapping, for example {{tolerance: 0.1}}")
    for key in value:
        if not (isinstance(key, str) and key.isidentifier()):
            raise ConfigError(f"{where} has the name {key!r}; expected one of a Python parameter")
    try:
        json.dumps(value)
    except TypeError as error:
        raise ConfigError(f"{where} is {shown}: {error}; expected numbers and texts") from None


def _clear_named(config: Any, layer: dict[Any, Any]) -> None:
    """Remove the named groups of earlier layers where a layer has none: `evaluation.sets=`."""
    for key, value in layer.items():
        if value == {} and OmegaConf.get_type(config[key]) is dict:
            config[key] = {}
        elif isinstance(value, dict) and is_dataclass(OmegaConf.get_type(config[key])):
            _clear_named(config[key], value)


def _unset_alternatives(
    config: Any, layer: dict[Any, Any], source: tuple[int, str], given: dict[str, tuple[int, str]]
) -> None:
    """Unset the alternatives of the keys that a layer sets.

    `given` has the source of each key that was set; all overrides have the same number.
    """
    for unset in ALTERNATIVES:
        for key in unset:
            group, _, last = key.partition(".")
            keys_of_group = layer.get(group)
            if not isinstance(keys_of_group, dict) or not keys_of_group.get(last):
                continue
            for other in unset.keys() - {key}:
                if given.get(other, (-1, ""))[0] == source[0]:
                    raise ConfigError(f"{source[1]}: {key} excludes {other}; set one of them")
                OmegaConf.update(config, other, unset[other], merge=False)
            given[key] = source


def _first_key(key: Any, value: Any) -> str:
    """Return the dotted key of the first setting at or below a key."""
    while isinstance(value, dict) and value:
        inner, value = next(iter(value.items()))
        key = f"{key}.{inner}"
    return str(key)[:MAX_SHOWN]


def _fits(value: Any, kind: Any) -> bool:
    """Return True if a value has a field's type or can be read as one."""
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return isinstance(value, list) and all(_fits(one, item) for one in value)
    if type(None) in get_args(kind):
        return value is None or _fits(value, get_args(kind)[0])
    if kind is str:
        return isinstance(value, (str, int)) and not isinstance(value, bool)
    if value is None or (kind is bool and isinstance(value, int) and value not in (0, 1)):
        return False
    try:
        NODES[kind](value)
    except (ValidationError, OverflowError):
        return False
    return True


def _expected(setting: Field[Any], kind: Any, default: Any, value: Any) -> str:
    """Describe what a field accepts, with an example that is close to the wrong value."""
    if is_dataclass(default):
        unset: tuple[Any, ...] = (MISSING, "", {})
        inner = next(e for e in fields(default) if getattr(default, e.name) not in unset)
        return f"a mapping, for example {{{inner.name}: {getattr(default, inner.name)}}}"
    if "choices" in setting.metadata:
        return accepted(setting)
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        is_item = _fits(value, item) and len(str(value)) < MAX_SHOWN
        example = [value] if is_item else [WORDS[item][1]]
        return f"a list of {WORDS[item][2]}, for example {json.dumps(example)}"
    optional = get_args(kind)
    word, example, _ = WORDS[optional[0] if optional else kind]
    word = f"{word} or null" if optional else word
    is_example = default not in (MISSING, "", None)
    return f"{word}, for example {json.dumps(default if is_example else example)}"


def _unusable(name: str, error: OmegaConfBaseException) -> ConfigError:
    where = "" if error.full_key is None else f"key {error.full_key!r}: "
    return ConfigError(f"{name}: {where}{_reason(error)}")


def _reason(error: Exception) -> str:
    """Return an error in one line; for an error of yaml, with the number of the line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark is not None:
        return f"{' '.join(str(problem).split())}, line {mark.line + 1}"[:300]
    lines = str(error).splitlines() or [type(error).__name__]
    return ascii(lines[0])[1:-1][:300] if not lines[0].isprintable() else lines[0][:300]


def _unknown(key: str) -> str:
    """Suggest the key that was probably meant: of another group, or with a similar spelling."""
    if key in RENAMED:
        return f"{key!r} is no longer a key; the new one is {RENAMED[key]}"
    group, _, last = key.rpartition(".")
    leaves = {known: known.rpartition(".")[2] for known in keys()}
    near = [known for known, leaf in leaves.items() if leaf == last]
    near += [
        known
        for known in difflib.get_close_matches(key, leaves, n=3, cutoff=NEAR)
        if difflib.SequenceMatcher(None, last, leaves[known]).ratio() >= NEAR
    ]
    if near:
        return f"unknown key {key!r}; the nearest is {near[0]!r}"
    inside = [known.removeprefix(f"{group}.") for known in keys() if known.startswith(f"{group}.")]
    names = inside or list(dict.fromkeys(known.partition(".")[0] for known in keys()))
    where = f"{group} has" if inside else "expected one of"
    return f"unknown key {key!r} and none like it; {where} {', '.join(names)}"
