"""docs/recipes.md, the heads of the recipes and the resolved recipes say the same."""

import re
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from megatron_sr1.config.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples").glob("qwen25vl_*.yaml"))
SETTING = re.compile(r"`([a-z0-9_.]+)=([^`]*)`")
DIFFERENCE = re.compile(r"^# {3}([a-z0-9_.]+)=(.+), there (.+)$", re.MULTILINE)
NUMBER = re.compile(r"[0-9][0-9.]*(?:e-?[0-9]+)?")


class Row(NamedTuple):
    """A row of a table of docs/recipes.md; `reason` is empty if ours is upstream's."""

    setting: str
    upstream: str
    ours: dict[str, str]
    reason: str


def tables(page):
    """Return the rows of each section's table by the section's title."""
    found = {}
    for section in page.read_text().split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        rows = [Row(c[0], c[1], dict(SETTING.findall(c[2])), c[3].strip("| ")) for c in cells]
        found[section.splitlines()[0]] = rows
    return found


TABLES = tables(ROOT / "docs" / "recipes.md")
GRPO, ENGINE, COLD_START = TABLES


def rows_of(path):
    """Return the rows that are about a recipe."""
    if path.stem.endswith("cold_start"):
        return TABLES[COLD_START]
    return TABLES[GRPO] + (TABLES[ENGINE] if re.search("_(3b|7b)", path.stem) else [])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_has_the_values_of_its_table(path):
    config = load_config(path)
    for row in rows_of(path):
        assert row.ours, f"{row.setting}: no key"
        for key, value in row.ours.items():
            resolved, said = attrgetter(key)(config), yaml.safe_load(value)
            assert str(resolved) == str(said) or resolved == float(said), f"{key}: {row}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_head_lists_what_differs_from_upstream_and_nothing_else(path):
    head = path.read_text().split("\nstage:")[0]
    listed = {key: (value, there) for key, value, there in DIFFERENCE.findall(head)}
    if "\nbase: " in head and not path.stem.endswith("cold_start"):
        base = re.search("^base: (.+)$", head, re.MULTILINE)[1]
        assert not listed and f"As {base}, whose head lists what differs" in head
        return
    expected = {key: (value, row.upstream) for row in rows_of(path) if row.reason
                for key, value in row.ours.items()}  # fmt: skip
    assert listed.keys() == expected.keys()
    for key, (value, there) in listed.items():
        assert value == expected[key][0] and there in expected[key][1], key


def test_rows_without_a_reason_have_upstreams_numbers():
    for row in (row for rows in TABLES.values() for row in rows if not row.reason):
        there = {float(n) for n in NUMBER.findall(row.upstream.replace(",", ""))}
        for key, value in row.ours.items():
            assert not NUMBER.fullmatch(value) or float(value) in there, f"{key}: {row}"
