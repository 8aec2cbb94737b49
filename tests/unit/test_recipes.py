"""docs/recipes.md, the heads of the recipes and the resolved recipes say the same.

And what docs/from_easyr1.md says of our side is true: its keys are set to its values, and its files
exist.
"""

import re
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.fields import settings
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import Config
from megatron_sr1.planning.estimates import estimate, estimates
from megatron_sr1.planning.layout import configured
from megatron_sr1.planning.workload import planned_run
from megatron_sr1.runtime.gpus import find_gpu
from tools.engine_steps import read_published

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples").glob("qwen25vl_*.yaml"))
SETTING = re.compile(r"`([a-z0-9_.]+)=([^`]*)`")
DIFFERENCE = re.compile(r"^# {3}([a-z0-9_.]+)=(.+), there (.+)$", re.MULTILINE)
NUMBER = re.compile(r"[0-9][0-9.]*(?:e-?[0-9]+)?")
FILE = re.compile(r"`((?:examples|tools)/[\w./]+)`")
FLAG = re.compile("--[a-z-]+")


class Row(NamedTuple):
    """A row of a table of docs/recipes.md; `reason` is empty if ours is upstream's."""

    setting: str
    upstream: str
    ours: dict[str, str]
    reason: str


def cells(name):
    """Yield (section, cells) for each row of a page's tables, their heads left out."""
    for section in (ROOT / "docs" / name).read_text().split("\n## ")[1:]:
        for line in [line for line in section.splitlines() if line.startswith("| ")][1:]:
            yield section.splitlines()[0], [cell.strip() for cell in line[1:-1].split(" | ")]


TABLES = {section: [] for section, _ in cells("recipes.md")}
for section, row in cells("recipes.md"):
    TABLES[section].append(Row(row[0], row[1], dict(SETTING.findall(row[2])), row[3]))
THEIRS = [row[-1] for _, row in cells("from_easyr1.md")]
GRPO, ENGINE, LORA, COLD_START = TABLES
HARDWARE = {"3b_lora_1gpu": (1, "rtx4090"), "7b_lora": (2, "h100"), "72b_lora_8gpus": (8, "h100")}
DEFAULTS = {key: value for key, _, value in settings(Config())}


def rows_of(path):
    """Return the rows that are about a recipe."""
    if path.stem.endswith("cold_start"):
        return TABLES[COLD_START]
    rows = TABLES[GRPO] + (TABLES[ENGINE] if re.search("_(3b|7b)", path.stem) else [])
    if "_lora" not in path.stem:
        return rows
    replaced = {key for row in TABLES[LORA] for key in row.ours}
    replaced |= {"rollout.gpu_memory_utilization"} if path.stem.endswith("1gpu") else set()
    return TABLES[LORA] + [row for row in rows if not replaced & row.ours.keys()]


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


@pytest.mark.parametrize("name", HARDWARE)
def test_a_recipe_with_adapters_fits_the_hardware_that_it_names(name):
    num_gpus, gpu = HARDWARE[name]
    config = load_config(ROOT / "examples" / f"qwen25vl_{name}.yaml")
    hf_config = read_published(name.partition("_")[0])
    run = planned_run(config, hf_config, find_gpu(gpu))
    own = estimate(run, configured(config, num_gpus))
    assert own.fits and own.memory.static.gradients > 0
    full = planned_run(replace(config, adapter=AdapterConfig()), hf_config, run.gpu)
    assert not any(each.fits for each in estimates(full, num_gpus))


def test_rows_without_a_reason_have_upstreams_numbers():
    for row in (row for rows in TABLES.values() for row in rows if not row.reason):
        there = {float(n) for n in NUMBER.findall(row.upstream.replace(",", ""))}
        for key, value in row.ours.items():
            assert not NUMBER.fullmatch(value) or float(value) in there, f"{key}: {row}"


@pytest.mark.parametrize("ours", [cell for cell in THEIRS if SETTING.search(cell)])
def test_what_is_said_to_replace_a_key_of_easyr1_is_accepted(ours):
    for alternative in ours.split(";"):
        given = SETTING.findall(alternative)
        if any(str(DEFAULTS.get(key)) != str(yaml.safe_load(value)) for key, value in given):
            load_config(None, ["model.path=DIR", *(f"{key}={value}" for key, value in given)])


def test_files_that_are_said_to_replace_those_of_easyr1_exist():
    named = [name for cell in THEIRS for name in FILE.findall(cell)]
    assert len(named) > 10
    assert all((ROOT / name).exists() for name in named)


def test_flags_that_are_said_to_replace_keys_of_easyr1_exist():
    named = {flag for cell in THEIRS for flag in FLAG.findall(cell)}
    sources = [
        (ROOT / name).read_text() for name in ("tools/make_shards.py", "megatron_sr1/parser.py")
    ]
    assert len(named) > 4
    assert not [flag for flag in named if not any(f'"{flag}"' in text for text in sources)]
