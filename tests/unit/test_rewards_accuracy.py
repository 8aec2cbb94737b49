r"""Verdicts on boxed answers, and the process behind them."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from megatron_sr1.errors import GradingError
from megatron_sr1.rewards.accuracy import is_right, same_answer
from megatron_sr1.rewards.options import question_options
from megatron_sr1.rewards.worker import MathWorker
from tests.grading_cases import CASES, LOWER, MATHS, PARENS, PLAIN, Q


@pytest.fixture(scope="module")
def worker():
    worker = MathWorker(60.0)
    yield worker
    worker.close()


def never(gold: str, answer: str) -> bool:
    raise AssertionError(f"algebra was asked about {gold!r} and {answer!r}")


def test_the_table_holds_150_distinct_cases():
    assert len({case[:3] for case in CASES}) == len(CASES) >= 150


@pytest.mark.parametrize(("gold", "answer", "question", "verdict", "reason"), CASES)
def test_verdict(worker, gold, answer, question, verdict, reason):
    response = f"<think> so </think> \\boxed{{{answer}}}"
    compare = lambda g, a: worker.equal(g, a, "sample")  # noqa: E731
    if answer.count("{") != answer.count("}"):
        assert same_answer(answer, gold, question, compare) is verdict, reason
    assert is_right(response, gold, question, compare) is verdict, reason


@pytest.mark.parametrize("gold", ["5", "None", "A", "yes"])
def test_an_answer_out_of_its_box_is_wrong(gold):
    for response in (gold, f"The answer is {gold}", f"\\boxed{{{gold}", "\\boxed{}", ""):
        assert not is_right(response, gold, PLAIN, never), response


def test_the_last_box_decides():
    assert is_right(r"\boxed{4} no, \boxed{5}", "5", PLAIN, never)
    assert not is_right(r"\boxed{5} no, \boxed{4}", "5", PLAIN, never)
    assert not is_right(r"\boxed{5} no, \boxed{4", "5", PLAIN, never)


def test_numbers_words_and_labels_never_meet_algebra():
    plain = re.compile(r"[\w\s.%'\"()-]+")
    count = 0
    for gold, answer, question, verdict, _ in CASES:
        has_product = re.search(r"\d[a-z]|_", answer)
        if plain.fullmatch(gold) and plain.fullmatch(answer) and not has_product:
            if question is not MATHS:
                assert same_answer(answer, gold, question, never) is verdict, (gold, answer)
                count += 1
    assert count > 80


def test_512_verdicts_on_numbers_take_milliseconds():
    started = time.process_time()
    for number in range(512):
        same_answer(str(number % 28), "14", "<image>What is the sum?", never)
    # About 20 ms on an idle core; the bound leaves room for slow machines.
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("gold", ["", "  ", "$$", "\\boxed{}"])
def test_a_sample_without_gold_is_an_error_and_no_verdict(gold):
    with pytest.raises(GradingError, match="gold answer"):
        same_answer("5", gold, PLAIN, never)


def test_options_are_read_in_all_their_spellings():
    animals = {"A": "cat", "B": "dog", "C": "red fox", "D": "None of the above"}
    assert question_options(Q) == animals
    assert question_options(PARENS) == {"A": "3", "B": "4", "C": "12", "D": "1/2"}
    assert question_options(LOWER) == {"A": "left", "B": "right", "C": "both"}
    assert list(question_options(MATHS)) == ["A", "B", "C", "D"]
    assert question_options("Pick: A) x, y B) z\nAnswer briefly.") == {"A": "x, y", "B": "z"}
    assert question_options("[A] one [B] two") == {"A": "one", "B": "two"}


@pytest.mark.parametrize(
    "question", ["Is the U.S.A. or A. B. shown", "Where is A?", "What is f(a)?", PLAIN, ""]
)
def test_a_question_without_options_has_none_or_no_text(question):
    assert not any(len(text) > 9 for text in question_options(question).values())


HANG = "import sys; print('{\"ready\": true}', flush=True); sys.stdin.readline(); "


def started_with(script: str, seconds: float = 1.0) -> MathWorker:
    return MathWorker(seconds, (sys.executable, "-c", script))


def test_a_grader_that_hangs_is_killed_named_and_replaced():
    worker = started_with(HANG + "import time; time.sleep(600)")
    for _ in range(2):
        with pytest.raises(GradingError, match=r"shard 3 sample 7: .*'1'.*more than 1 s"):
            worker.equal("1", "2", "shard 3 sample 7")
        assert worker.pid is None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (HANG + "sys.exit(3)", r"exit status 3"),
        (HANG + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"exit status -9"),
        (HANG + 'print(\'{"error": "TypeError: x"}\', flush=True)', r"broke: TypeError: x"),
        (HANG + "print('nonsense', flush=True)", r"grader ended"),
        ("raise SystemExit(4)", r"exit status 4"),
        ("print('{\"error\": 1}', flush=True)", r"started with"),
    ],
)
def test_a_grader_that_breaks_raises_and_names_the_sample(script, message):
    with pytest.raises(GradingError, match=rf"(?s)sample 7: .*{message}"):
        started_with(script, 30.0).equal("1", "2", "sample 7")


def test_a_real_grader_killed_in_between_is_replaced(worker):
    assert worker.equal(r"\sqrt{18}", r"3\sqrt{2}", "s")
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(GradingError, match="sample 8"):
        worker.equal(r"\sqrt{50}", r"5\sqrt{2}", "sample 8")
    assert worker.equal(r"\sqrt{50}", r"5\sqrt{2}", "sample 8")


PARENT = """
import os, sys, threading
from megatron_sr1.rewards.worker import MathWorker
threading.Thread(target=threading.Event().wait, daemon=True).start()
worker = MathWorker(60.0)
assert worker.equal("x+1", "1+x", "s")
print(worker.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_grader_dies_with_its_parent_also_one_with_threads():
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    ran = subprocess.run(
        [sys.executable, "-c", PARENT], env=os.environ | ranks, capture_output=True, timeout=300
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    pid = int(ran.stdout)
    for _ in range(300):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().split()[2] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} outlived its parent by 30 s")


def test_the_kernel_timer_ends_a_busy_grader_that_nobody_waits_for():
    script = (
        "import sys\nfrom megatron_sr1.rewards import mathematics\n"
        "def busy(gold, answer):\n    while True: pass\n"
        "mathematics.equal = busy\nmathematics.serve(sys.stdout)\n"
    )
    asked = b'{"gold": "1", "answer": "2", "seconds": 0.1}\n'
    ran = subprocess.run([sys.executable, "-c", script], input=asked, timeout=60)
    assert ran.returncode == -signal.SIGALRM


def test_answers_are_remembered_but_failures_are_not():
    worker = started_with(HANG + "print('{\"equal\": true}', flush=True)", 30.0)
    assert worker.equal("1", "2", "s")
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.equal("1", "2", "s")
    with pytest.raises(GradingError):
        worker.equal("1", "3", "s")
    worker.close()
