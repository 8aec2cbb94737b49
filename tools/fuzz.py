"""Fuzz what reads foreign bytes: parsing, packing, shards, examples, images.

    python tools/fuzz.py --minutes 60 --seed 1 --findings runs/fuzz

Each target of tests/hostile/targets.py gets random inputs in turn from hypothesis, which shrinks
those that fail. A finding is written to a file, and the target continues with another seed. The
exit status is 1 if there are findings. A case that does not return within its time limit is a
finding, and ends the run.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis.errors import HypothesisException

from tests.hostile.targets import TARGETS

ROUND_CASES = 200
HANGS_SECONDS = 120


class Findings:
    """Failures, each kind once, as files in a directory."""

    def __init__(self, directory: Path) -> None:
        """Create the directory."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.kinds = directory, set[str]()

    def add(self, target: str, seed: int, case: Any, error: BaseException) -> None:
        """Store a failing case unless one like it is known."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "hypothesis" not in f[0]]
        last = frames[-1]
        kind = f"{target}: {type(error).__name__} in {last.name} line {last.lineno}"
        if kind in self.kinds:
            return
        self.kinds.add(kind)
        shown = "".join(traceback.format_exception(error))
        path = self.directory / f"{target}-{len(self.kinds):03d}.txt"
        path.write_text(f"{kind}\nseed {seed}\ncase {case!r}\n\n{shown}", errors="backslashreplace")
        print(f"finding: {kind}; see {path}", flush=True)


def fuzz_round(target: str, seed: int, findings: Findings) -> int:
    """Run one target on fresh cases; return how many ran, those of shrinking included."""
    strategy, check = TARGETS[target]
    count, last = 0, None

    @with_seed(seed)
    @settings(
        max_examples=ROUND_CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def run(case: Any) -> None:
        nonlocal count, last
        count, last = count + 1, case
        faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
        check(case)

    try:
        run()
    except HypothesisException:
        raise
    except Exception as error:  # any exception of a target is a finding
        findings.add(target, seed, last, error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return count


def fuzz(targets: list[str], seconds: float, seed: int, findings: Findings) -> dict[str, int]:
    """Run rounds of all targets until the time is up; return the number of cases by target."""
    counts = dict.fromkeys(targets, 0)
    started = reported = time.monotonic()
    rounds = ((number, target) for number in itertools.count() for target in targets)
    for number, target in rounds:
        now = time.monotonic()
        if now - started >= seconds:
            break
        if now - reported > 60:
            reported = now
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            minutes = (now - started) / 60
            print(f"{minutes:.0f} min: {shown}; {len(findings.kinds)} findings", flush=True)
        counts[target] += fuzz_round(target, seed * 1_000_000 + number, findings)
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"), metavar="DIR")
    parser.add_argument("--targets", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    options = parser.parse_args(arguments)
    findings = Findings(options.findings)
    started = time.monotonic()
    counts = fuzz(options.targets, options.minutes * 60, options.seed, findings)
    for target, count in counts.items():
        print(f"{target}: {count} executions")
    minutes = (time.monotonic() - started) / 60
    print(f"{len(findings.kinds)} findings in {minutes:.1f} min, seed {options.seed}")
    return 1 if findings.kinds else 0


if __name__ == "__main__":
    sys.exit(main())
