"""Fields of the configuration whose metadata has their range or their accepted values.

The checks (`check_setting`), messages and docs/configuration.md all read them from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any

from megatron_sr1.errors import ConfigError

LARGEST_INTEGER = 2**63 - 1
UNSET: Any = "???"
"""Default of a setting that must be given: OmegaConf's `MISSING`, which only `loading` imports, so
that a program that fills in the dataclasses itself runs without that package."""


def number(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a field for a finite number within a range, or for a list of such numbers.

    `at_least` and `at_most` are accepted values, `above` and `below` are not.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(default: Any, *choices: Any) -> Any:
    """Return a field that takes one of a few values."""
    return field(default=default, metadata={"choices": choices})


def named(kind: type) -> Any:
    """Return a field for groups of settings that the user names: a mapping of names to `kind`."""
    return field(default_factory=dict, metadata={"named": kind})


def any_keys() -> Any:
    """Return a field for a mapping whose keys the user chooses, to values of any type."""
    return field(default_factory=dict, metadata={"any_keys": True})


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield each setting of a configuration: its dotted key, its field, its value."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from settings(value, f"{prefix}{each.name}.")
        elif "named" in each.metadata:
            for name, group in value.items():
                yield from settings(group, f"{prefix}{each.name}.{name}.")
        else:
            yield prefix + each.name, each, value


def accepted(setting: Field[Any]) -> str:
    """Describe the accepted values of a field; "" if any value is accepted."""
    limits = setting.metadata
    if "choices" in limits:
        return " | ".join("null" if one is None else str(one) for one in limits["choices"])
    if "at_least" in limits and "at_most" in limits:
        return f"{limits['at_least']} to {limits['at_most']}"
    words = {"above": "more than {}", "below": "less than {}", "at_most": "at most {}"}
    words = {"at_least": "{} or more"} | words
    return " and ".join(words[name].format(limits[name]) for name in words if name in limits)


def check_setting(key: str, setting: Field[Any], value: Any) -> None:
    """Check a value, or each value of a list, against its field's metadata."""
    expected = ("numbers, each " if isinstance(value, list) else "") + accepted(setting)
    has_example = setting.default not in (MISSING, None)
    if has_example and "choices" not in setting.metadata:
        expected += f", for example {setting.default}"
    for one in value if isinstance(value, list) else [value]:
        if not _is_accepted(one, setting.metadata):
            raise ConfigError(f"{key} is {value!r}; expected {expected}")
        if type(one) is int and one > LARGEST_INTEGER:
            raise ConfigError(f"{key} is {value}; expected at most {LARGEST_INTEGER}")


def _is_accepted(value: Any, limits: Mapping[str, Any]) -> bool:
    if "choices" in limits:
        return value in limits["choices"]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return True
    return (
        math.isfinite(value)
        and limits.get("at_least", value) <= value <= limits.get("at_most", value)
        and limits.get("above", -math.inf) < value < limits.get("below", math.inf)
    )
