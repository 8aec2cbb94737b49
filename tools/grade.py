"""Grade the answers in a file: tools/grade.py FILE.jsonl [--output FILE].

Input lines are `{"response": str, "gold": str, "question": str}`, or have `"answer"`, the content
of the box, in place of `"response"`; the question, whose options the grader reads, is optional. The
output has the same lines, with `"right"`, true or false, and `"because"`: the rule that decided,
`uncomparable:` with the exception that the answer raised, or `ungraded:` with the limit that it
reached, in which case a run leaves it out of its step. The exit status is 2 if a line cannot be
used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sr1.errors import DataError, GradingError, GradingLimit, SR1Error
from megatron_sr1.rewards.grader import GRADERS, Grader, Verdict
from megatron_sr1.rewards.response import find_answer

EXPECTED = 'expected {"response" or "answer": text, "gold": text, "question": text or left out}'


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the content of each line; a DataError names what cannot be used."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    for number, text in enumerate(lines, 1):
        if text.strip():
            where = f"{path} line {number}"
            yield where, parse_line(text, where)


def parse_line(text: bytes, where: str) -> dict[str, Any]:
    """Read and check a line; raise a DataError if it is not JSON or has other fields."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON: {error}"[:300]) from None
    if not isinstance(line, dict):
        raise DataError(f"{where}: a {type(line).__name__}; {EXPECTED}")
    if ("response" in line) == ("answer" in line):
        found = "both" if "response" in line else "neither"
        raise DataError(f"{where}: {found} of response and answer; {EXPECTED}")
    if "gold" not in line:
        raise DataError(f"{where}: no gold; {EXPECTED}")
    for name in ("response", "answer", "gold", "question"):
        if name in line and not isinstance(line[name], str):
            raise DataError(f"{where}: {name} is a {type(line[name]).__name__}; {EXPECTED}")
    return line


def grade(line: dict[str, Any], where: str, grader: Grader) -> Verdict:
    """Judge a line; raise a DataError if its gold answer cannot be compared with itself."""
    answer = find_answer(line["response"]) if "response" in line else line["answer"].strip() or None
    try:
        return grader.judge(answer, line["gold"], line.get("question", ""), where)
    except GradingLimit as error:
        return Verdict(False, f"ungraded: {str(error).removeprefix(f'{where}: ')}")
    except GradingError as error:
        raise DataError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


def main(arguments: list[str] | None = None) -> int:
    """Grade a file; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--grader", choices=GRADERS, default=GRADERS[0], help="as reward.grader")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds per comparison")
    options = parser.parse_args(arguments)
    if options.timeout <= 0:
        parser.error(f"--timeout is {options.timeout:g}; expected more than 0")
    grader = Grader(options.grader, options.timeout)
    try:
        lines = list(read_lines(options.file))  # before anything is graded
        output = open(options.output, "w") if options.output else sys.stdout
        for where, line in lines:
            verdict = grade(line, where, grader)
            line |= {"right": verdict.right, "because": verdict.because}
            print(json.dumps(line), file=output, flush=True)
        if options.output:
            output.close()
    except SR1Error as error:
        print(f"grade.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        grader.worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
