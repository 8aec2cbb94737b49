"""Files by which ranks see each other: the first failure is kept, and locks show who is alive."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_sr1.runtime.failure_files import FAILURE_FILE, Failure, Launch, Presence

ROOT = Path(__file__).resolve().parents[2]
RANK_1 = """
import sys
from pathlib import Path
from megatron_sr1.runtime.failure_files import Presence
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


def test_a_rank_that_was_seen_and_killed_is_reported(rank_1, tmp_path):
    presence = Presence(tmp_path, 0, 2)
    assert presence.gone() is None
    rank_1.kill()
    rank_1.wait()
    assert presence.gone() == 1


def test_a_rank_that_was_never_seen_is_not_taken_for_dead(rank_1, tmp_path):
    """Its lock may be one that does not reach us; so ranks look once they have met."""
    presence = Presence(tmp_path, 0, 2)
    rank_1.kill()
    rank_1.wait()
    assert presence.gone() is None


def test_a_normal_end_is_not_a_death(rank_1, tmp_path):
    presence = Presence(tmp_path, 0, 2)
    assert presence.gone() is None
    rank_1.communicate()
    assert presence.gone() is None


def test_a_rank_waits_for_the_file_of_the_rank_that_failed_first(tmp_path):
    first, second = Launch(tmp_path), Launch(tmp_path)
    written = first.record(Failure(1, "no answer", 2))
    text = (tmp_path / FAILURE_FILE).read_text()
    assert json.loads(text) == written._asdict()
    (tmp_path / FAILURE_FILE).write_text("")  # made, and not written yet
    timer = threading.Timer(0.2, (tmp_path / FAILURE_FILE).write_text, [text])
    timer.start()
    assert second.record(Failure(0, "no answer", 2)).rank == 1
    timer.join()
