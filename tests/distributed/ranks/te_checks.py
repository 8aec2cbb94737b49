"""The rows of gpu_checks about Transformer Engine, on a CPU with the double on the path.

Run as `te_checks.py DIRECTORY`; prints the rows as JSON.
"""

import json
import sys
from pathlib import Path

import transformer_engine

from megatron_sr1.gpu_checks.bench import Bench
from megatron_sr1.gpu_checks.numerics import transformer_engine as check
from megatron_sr1.model import layers
from megatron_sr1.runtime.device import stop_distributed


def main():
    assert "te_double" in transformer_engine.__file__
    layers.require_transformer_engine = lambda: None  # it asks for CUDA
    rows = [row.as_json() for row in check(Bench("cpu", Path(sys.argv[1])))]
    print("ROWS", json.dumps(rows), flush=True)
    stop_distributed()


if __name__ == "__main__":
    main()
