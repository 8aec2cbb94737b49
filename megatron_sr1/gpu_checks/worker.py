"""A process that runs checks one after the other and reports their rows; started by runner.py.

Messages go to a pipe as lines of JSON: `{"begin": name}`, then rows, then `{"end": name}`. What
libraries print goes to the log. A check that raises is a row; after an error that leaves CUDA
unusable this process exits, and another does the rest.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sr1.gpu_checks.registry import Check
from megatron_sr1.gpu_checks.rows import ERROR, Row
from megatron_sr1.runtime.signals import end_with

MAX_NOTE = 300
"""Characters of an error's message that a row quotes."""


def run_check(check: Check, bench: Any, take: Callable[[Row], None]) -> None:
    """Run a check and hand over its rows; an exception becomes a row."""
    started = time.monotonic()

    def hand_over(row: Row) -> None:
        take(replace(row, check=check.name, seconds=round(time.monotonic() - started, 2)))

    try:
        module, name = check.function.split(":")
        if "." not in module:
            module = f"megatron_sr1.gpu_checks.{module}"
        function = getattr(importlib.import_module(module), name)
        for row in function(bench, *check.arguments):
            hand_over(row)
    except Exception as error:  # whatever a library raises: the other checks go on
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        note = f"{type(error).__name__}: {first}"[:MAX_NOTE]
        hand_over(Row("ran to its end", ERROR, meaning=check.meaning, note=note))


def main() -> None:
    """Run the checks that the arguments name: pipe, process id of the parent, and JSON."""
    pipe, parent, text = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    end_with(parent)
    os.set_inheritable(pipe, False)
    order = json.loads(text)
    registry = importlib.import_module(order["registry"])
    checks = {check.name: check for check in registry.CHECKS}
    model = Path(order["model"]) if order["model"] else None
    bench = registry.make_bench(order["kind"], Path(order["directory"]), model)
    with os.fdopen(pipe, "w") as out:

        def send(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        for name in order["names"]:
            send({"begin": name})
            run_check(checks[name], bench, lambda row: send({"row": row.as_json()}))
            with contextlib.suppress(RuntimeError):
                bench.release()
                send({"end": name})
                continue
            break  # CUDA is unusable in this process
    # Libraries' threads and process groups need not be ended in order.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
