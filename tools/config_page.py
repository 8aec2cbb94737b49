"""Write docs/configuration.md: every configuration key with its type, default, range and meaning.

In: the dataclasses of megatron_sr1/config, their metadata and attribute docstrings. Run it after a
change of any of them; a test compares the page with them.
"""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from megatron_sr1.config.fields import accepted
from megatron_sr1.config.run import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

For whoever writes the YAML file of a run, or overrides a key of it on the command line. A file sets
keys by group (`seed: 2`, `optimizer: {num_steps: 50}`) and may name another file as its `base`; an
override is `optimizer.num_steps=50`. All other keys have the defaults below. A value that depends
on the machine may be `${oc.env:NAME}` or `${oc.env:NAME,default}`. Unknown keys and impossible
values are refused; `megatron-sr1 train CONFIG --dry-run` checks a configuration without running it.
Of two keys that exclude each other, such as `data.train` and `data.mixture`, the one that is set
later counts (the base, the file, the overrides); a file, or the overrides together, may set one.

This page is generated: `python tools/config_page.py` writes it.
"""


def page() -> str:
    """Return the page: a table of the keys outside groups, then one per group."""
    parts = [HEAD, *_section("The run", "", Config())]
    for group in fields(Config):
        value = getattr(Config(), group.name)
        if is_dataclass(value):
            parts += _section(f"`{group.name}`", f"{group.name}.", value)
            for each in fields(value):
                prefix, inner = f"{group.name}.{each.name}", getattr(value, each.name)
                if "named" in each.metadata:
                    prefix, inner = f"{prefix}.NAME", each.metadata["named"]()
                if is_dataclass(inner):
                    parts += _section(f"`{prefix}`", f"{prefix}.", inner)
    return "\n".join(parts)


def _section(title: str, prefix: str, group: Any) -> list[str]:
    texts = _attribute_docstrings(type(group))
    lines = [f"## {title}", "", inspect.cleandoc(type(group).__doc__ or ""), ""]
    lines += ["| key | type | default | accepted | meaning |", "|---|---|---|---|---|"]
    for each in fields(group):
        value = getattr(group, each.name)
        if not is_dataclass(value):
            kind = str(each.type).removesuffix(" | None")  # `null` is among the accepted values
            cells = [f"`{prefix}{each.name}`", f"`{kind}`", _default(value), _accepted(each)]
            lines.append(f"| {' | '.join([*cells, texts[each.name]])} |")
    return [*lines, ""]


def _attribute_docstrings(group: type) -> dict[str, str]:
    """Return the string below each field of a dataclass, on one line; they exist in its source."""
    (base,) = group.__bases__
    inherited = _attribute_docstrings(base) if is_dataclass(base) else {}
    (node,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(node, ast.ClassDef)
    return inherited | {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _default(value: Any) -> str:
    """Return a default as YAML would have it."""
    if value == MISSING:
        return "must be set"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _accepted(setting: Field[Any]) -> str:
    if "choices" in setting.metadata:
        return ", ".join(f"`{name}`" for name in accepted(setting).split(" | "))
    return accepted(setting)


if __name__ == "__main__":
    PAGE.write_text(page())
