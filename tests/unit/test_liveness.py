"""Which ranks are there, by locks that the kernel drops."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.runtime.liveness import Presence

ROOT = Path(__file__).resolve().parents[2]
RANK_1 = """
import sys
from pathlib import Path
from megatron_sr1.runtime.liveness import Presence
presence = Presence(Path(sys.argv[1]), 1, 2)
print("there", flush=True)
sys.stdin.read()
presence.leave()
"""


@pytest.fixture
def rank_1(tmp_path):
    """Another process that is rank 1 of 2."""
    process = subprocess.Popen(
        [sys.executable, "-c", RANK_1, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout.readline() == b"there\n"
    yield process
    process.kill()
    process.wait()


def test_a_rank_that_was_seen_and_killed_is_gone(rank_1, tmp_path):
    presence = Presence(tmp_path, 0, 2)
    assert presence.gone() is None
    rank_1.kill()
    rank_1.wait()
    assert presence.gone() == 1


def test_a_rank_that_was_never_seen_is_not_taken_for_gone(rank_1, tmp_path):
    """Its lock may be one that does not reach us; so ranks look once they have met."""
    presence = Presence(tmp_path, 0, 2)
    rank_1.kill()
    rank_1.wait()
    assert presence.gone() is None


def test_a_good_end_is_not_a_loss(rank_1, tmp_path):
    presence = Presence(tmp_path, 0, 2)
    assert presence.gone() is None
    rank_1.communicate()
    assert presence.gone() is None
