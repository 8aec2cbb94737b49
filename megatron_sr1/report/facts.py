"""What a run was started with: its command, versions, and the settings that are not defaults.

In: `config.json` and `start.json` of a run directory; older runs lack the second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sr1.config.fields import settings
from megatron_sr1.config.run import Config
from megatron_sr1.report import page
from megatron_sr1.runtime.start import START_FILE


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of a configuration by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {}
        found |= inner or {prefix + name: value}
    return found


def chosen_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that are not the defaults of this version."""
    defaults = {key: value for key, _, value in settings(Config())}
    unknown = object()
    found = flat(config).items()
    return {k: v for k, v in found if v != {} and defaults.get(k, unknown) != v}


def setup_section(run_dir: Path) -> str:
    """Return the section on how a run was started; "" if nothing is known."""
    config, start = (read_json(run_dir / name) for name in ("config.json", START_FILE))
    versions = ", ".join(f"{name} {value}" for name, value in start.get("versions", {}).items())
    facts = {
        "command": start.get("command"),
        "started": start.get("time"),
        "ranks": start.get("ranks"),
        "seed": config.get("seed"),
        "versions": versions,
    }
    rows = [[name, str(value)] for name, value in facts.items() if value not in (None, "")]
    chosen = [[key, shown(value)] for key, value in chosen_settings(config).items()]
    whole = [[key, shown(value)] for key, value in flat(config).items()]
    return page.section(
        "Configuration",
        "",
        page.table([], rows, "words"),
        page.folded("Settings that are not defaults", page.table([], chosen, "words")),
        page.folded("All settings", page.table([], whole, "words")),
    )


def shown(value: Any) -> str:
    """Return the value of a setting as text."""
    return value if isinstance(value, str) else json.dumps(value)
