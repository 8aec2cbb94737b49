"""Print how far each layout is from one process: loss, gradients, weights after two updates.

One checkpoint and one batch (text alone, one image, several of unequal sizes, a sample longer than
the others together) go through every layout, packed and one sample per row, with and without
recomputation, the tower by tensor parallelism and by images. A gap is |found - expected| over
|expected| by norm, of the tensor and the rank where it is largest; expected are the numbers of one
process with unpacked samples. Runs on a CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sr1.demo.digits import corpus_texts
from megatron_sr1.demo.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
RANKS = ROOT / "tests" / "distributed" / "ranks" / "layout_table.py"
BOUND = 1e-5
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "TP2": {"tensor": 2},
        "TP2 + SP": {"tensor": 2, "sequence": True},
        "PP2": {"pipeline": 2},
        "PP2, 1 and 3 layers": {"pipeline": 2, "stage_layers": [1, 3]},
        "PP2 x VPP2": {"pipeline": 2, "virtual": 2},
        "CP2": {"context": 2},
        "DP2": {},
    },
    4: {
        "TP2 x PP2": {"tensor": 2, "pipeline": 2},
        "TP2 + SP x PP2 x VPP2": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual": 2},
        "TP2 x CP2": {"tensor": 2, "context": 2},
        "TP2 + SP x CP2": {"tensor": 2, "sequence": True, "context": 2},
        "PP2 x CP2": {"pipeline": 2, "context": 2},
        "TP2 x DP2": {"tensor": 2},
    },
}
COLUMNS = ("loss", "gradient", "sgd", "adamw")


def start(num_ranks: int, directory: Path, layouts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run ranks over layouts; yield their records as they arrive."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(RANKS), str(directory), json.dumps(layouts)]
    log = directory / f"ranks_{num_ranks}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("GAPS "):
                yield json.loads(line.removeprefix("GAPS "))
    if process.wait():
        sys.exit(f"{num_ranks} ranks ended with {process.returncode}:\n{log.read_text()[-4000:]}")


def measure(chosen: list[str], directory: Path) -> list[dict[str, Any]]:
    """Return a record for each layout and variant, of all layouts if none is chosen."""
    make_tiny_model(directory / "model", corpus_texts(), num_layers=4)
    list(start(1, directory, {}))
    records = []
    for num_ranks, layouts in LAYOUTS.items():
        wanted = {name: keys for name, keys in layouts.items() if not chosen or name in chosen}
        for record in start(num_ranks, directory, wanted) if wanted else ():
            gaps = ", ".join(f"{name} {record[name]['value']:.1e}" for name in COLUMNS)
            print(f"{record['layout']}: {record['variant']}: {gaps}", flush=True)
            records.append(record)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Format the largest gaps of each layout over its variants as a Markdown table."""
    lines = ["| layout | ways | loss | gradients | 2 x SGD | 2 x AdamW | farthest gradient |"]
    lines.append("|---|---|---|---|---|---|---|")
    for layout in dict.fromkeys(record["layout"] for record in records):
        own = [record for record in records if record["layout"] == layout]
        worst = {c: max((r[c] for r in own), key=lambda gap: gap["value"]) for c in COLUMNS}
        numbers = " | ".join(f"{worst[c]['value']:.1e}" for c in COLUMNS)
        lines.append(f"| {layout} | {len(own)} | {numbers} | `{worst['gradient']['tensor']}` |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table; exit with 1 if a gap exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [name for layouts in LAYOUTS.values() for name in layouts]
    text = f"this layout, repeatable: {'; '.join(names)}"
    add = parser.add_argument
    add("--only", action="append", default=[], choices=names, metavar="LAYOUT", help=text)
    chosen = parser.parse_args().only
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="layouts_") as directory:
        records = measure(chosen, Path(directory))
    print(f"\n{table(records)}\n")
    beyond = [r for r in records if any(not r[c]["value"] <= BOUND for c in COLUMNS)]
    for record in beyond:
        print(f"BEYOND {BOUND:.0e}: {json.dumps(record)}")
    within = f"{len(records) - len(beyond)} of {len(records)} within {BOUND:.0e}"
    print(f"{within}, {time.monotonic() - started:.0f} s")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
