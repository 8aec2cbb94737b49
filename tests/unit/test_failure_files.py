"""Of failures that come at once, one stands."""

import json
import threading

from megatron_sr1.runtime.failure_files import FAILURE_FILE, Launch


def test_a_rank_waits_for_the_words_of_the_one_that_was_first(tmp_path):
    first, second = Launch(tmp_path), Launch(tmp_path)
    written = first.record(1, "no answer", 2)
    text = (tmp_path / FAILURE_FILE).read_text()
    assert json.loads(text) == written
    (tmp_path / FAILURE_FILE).write_text("")  # made, and not written yet
    timer = threading.Timer(0.2, (tmp_path / FAILURE_FILE).write_text, [text])
    timer.start()
    assert second.record(0, "no answer", 2)["rank"] == 1
    timer.join()
