"""README and guides: every command is run or marked, and what they name exists.

A ```bash block is run, in the order of its page, in a folder like a checkout after `make demo`
(with less data and a model of random weights), unless its first line is one of

    # needs a GPU | # needs a cluster | # needs data | # needs an account
    # tested by FILE and FILE
    # minutes     run by the slow test
    # fails       run, and must fail

docs/slurm.md says above each of its blocks which test of its own runs it.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_sr1.config.run import keys
from megatron_sr1.demo.digits import make_digits

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = ("# needs a GPU", "# needs a cluster", "# needs data", "# needs an account")
NOT_RUN = (*NEEDS, "# tested by ")
SLOW, FAILS = "# minutes", "# fails"
OWN_TEST = ("slurm.md",)
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GROUPS = sorted({key.split(".")[0] for key in keys() if "." in key})
KEY = re.compile(rf"`(?:--?\S+ )*((?:{'|'.join(GROUPS)})(?:\.[A-Za-z0-9_]+)+)")
NAMED = re.compile(r"`((?:docs|examples|megatron_sr1|tests|tools|\.ci)/[\w./*-]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def is_setting(key: str) -> bool:
    """Return True for a key or a group of the configuration, whatever the user names in it."""
    parts = key.split(".")
    known = (each.split(".") for each in keys())
    return any(
        len(parts) <= len(each) and all(b in (a, "NAME") for a, b in zip(parts, each, strict=False))
        for each in known
    )


def blocks(page: Path) -> list[str]:
    return [] if page.name in OWN_TEST else BLOCK.findall(page.read_text())


def has(*marks: str):
    return lambda block: block.startswith(marks)


def pages_with(wanted) -> list[Path]:
    return [page for page in PAGES if any(map(wanted, blocks(page)))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder, 1, num_train=32, num_eval=16, num_cold_start=48)
    return folder


@pytest.fixture
def checkout(tmp_path, data, tiny_model):
    """A folder in which the commands of a page can be run."""
    for name in (".venv", "examples", "megatron_sr1", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs" / "demo" / "cold_start").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "cold_start" / "hf").symlink_to(tiny_model)
    (tmp_path / "runs" / "demo" / "data").symlink_to(data)
    (tmp_path / ".exported").touch()
    return tmp_path


def run(block: str, folder: Path) -> None:
    """Run a block with what earlier blocks of its page exported, as in one terminal."""
    path = os.pathsep.join((str(ROOT / ".venv" / "bin"), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f". ./.exported\n{block}\nexport -p > .exported"],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    failed = done.returncode != 0
    assert failed == block.startswith(FAILS), f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "page", pages_with(lambda block: not has(*NOT_RUN, SLOW)(block)), ids=lambda page: page.name
)
def test_commands_run(page, checkout):
    for block in blocks(page):
        if not has(*NOT_RUN, SLOW)(block):
            run(block, checkout)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(has(SLOW)), ids=lambda page: page.name)
def test_commands_that_take_minutes_run(page, checkout):
    for block in blocks(page):
        if not has(*NOT_RUN)(block):
            run(block, checkout)


def test_what_another_test_is_said_to_run_is_there():
    for page in PAGES:
        for block in filter(has("# tested by "), blocks(page)):
            named = block.splitlines()[0].removeprefix("# tested by ").split(" and ")
            for name in named:
                assert (ROOT / name).is_file(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_settings_and_links_that_are_named_exist(page):
    text = page.read_text()
    for name in NAMED.findall(text):
        assert list(ROOT.glob(name.rstrip("/"))), f"{page.name} names {name}"
    for key in KEY.findall(text):
        assert is_setting(key) or key.endswith((".md", ".py", ".html")), f"{page.name} names {key}"
    if page.name == "README.md":  # links of the guides are Sphinx's to check
        for link in LINK.findall(text):
            assert (ROOT / link).exists(), f"{page.name} links to {link}"
