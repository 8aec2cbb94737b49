"""Check the trainer on the GPUs of this machine: one command, one table (docs/gpu.md).

Prints a row for each number, with its limit and what it means if it fails, and writes the table as
JSON after every row. Needs torch, transformers and megatron-core; vLLM and Transformer Engine are
checked where they are installed. Nothing is downloaded: a model of published widths with few layers
is made here. Without a GPU the same code runs with a small model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_sr1.gpu_checks.registry import CHECKS  # noqa: E402
from megatron_sr1.gpu_checks.rows import Row  # noqa: E402
from megatron_sr1.gpu_checks.runner import Runner  # noqa: E402


def show(row: Row) -> None:
    """Print a row at once, also into a pipe."""
    print(row.line(), flush=True)


def main() -> int:
    """Run the checks; the exit status is 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    names = [check.name for check in CHECKS]
    add("--minutes", type=float, default=8.0, help="time limit; later checks are left out")
    add("--model", type=Path, help="Hugging Face directory of a Qwen2.5-VL, in place of our own")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--only", action="append", default=[], choices=names, metavar="CHECK",
        help=f"this check, repeatable: {', '.join(names)}")  # fmt: skip
    add("--output", type=Path, default=Path("gpu_check.json"))
    arguments = parser.parse_args()
    kind = arguments.device
    if kind == "auto":  # as torch would find out, without CUDA in this process
        nodes = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]
        kind = "cuda" if nodes and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu"
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    arguments.output.with_suffix(".log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as directory:
        runner = Runner(kind, Path(directory), arguments.output, arguments.minutes, show)
        runner.model = arguments.model
        rows = runner.run(arguments.only)
    counts = Counter(row.status for row in rows)
    print(", ".join(f"{number} {status}" for status, number in counts.items()))
    print(f"table: {arguments.output}, log: {arguments.output.with_suffix('.log')}")
    return int(any(row.is_bad for row in rows))


if __name__ == "__main__":
    sys.exit(main())
