"""runtime/logs.py: which lines of libraries reach the terminal."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.runtime.logs import EXPECTED

PROGRAM = """
import logging, os, sys, warnings
from megatron_sr1.runtime.logs import EXPECTED, configure_logging, silence_native_warnings
for _ in range(2):  # the demo's process may do so again
    configure_logging(sys.argv[1])
silence_native_warnings(sys.argv[1])
for name, parts in EXPECTED.items():
    for part in parts:
        logging.getLogger(name).warning("library: %s!", part)
    logging.getLogger(name).warning("matters: %s", name)
warnings.warn("library: an old name", FutureWarning)
warnings.warn("library: apex is not installed", UserWarning)
logging.getLogger("megatron_sr1.trainer").info("ours")
names = "TORCH_CPP_LOG_LEVEL", "HF_HUB_DISABLE_PROGRESS_BARS"
print(*(os.environ.get(name, "unset") for name in names))
"""


def run(level: str, **variables: str) -> tuple[str, str]:
    names = "TORCH_CPP_LOG_LEVEL", "HF_HUB_DISABLE_PROGRESS_BARS", "RANK"
    environment = {k: v for k, v in os.environ.items() if k not in names} | variables
    command = [sys.executable, "-c", PROGRAM, level]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_library_messages_that_nobody_can_act_on_are_dropped_and_only_those():
    variables, lines = run("info")
    assert "library:" not in lines
    assert all(f"matters: {name}" in lines for name in EXPECTED)
    assert "ours" in lines
    assert variables == "ERROR 1"


def test_level_debug_shows_library_messages():
    variables, lines = run("debug")
    parts = [part for parts in EXPECTED.values() for part in parts]
    assert all(f"library: {part}!" in lines for part in parts)
    assert "library: an old name" in lines and "library: apex" in lines
    assert variables == "unset unset"


def test_variables_that_the_user_has_set_are_kept():
    assert run("info", TORCH_CPP_LOG_LEVEL="INFO")[0] == "INFO 1"


@pytest.mark.parametrize(
    ("logger", "part"), [(logger, part) for logger, parts in EXPECTED.items() for part in parts]
)
def test_the_libraries_still_write_these_messages(logger, part):
    library, *modules = logger.split(".")
    spec = importlib.util.find_spec(library)  # does not import it
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(next(iter(spec.submodule_search_locations)), *modules).with_suffix(".py")
    assert part in source.read_text(encoding="utf-8")
