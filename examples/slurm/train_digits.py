"""GRPO on handwritten digits as a Slurm job of two CPU ranks, with nemo-run.

Run `make demo` first: it creates the shards, the cold start and the model with random weights.

    .venv-launch/bin/python examples/slurm/train_digits.py --partition main
    .venv-launch/bin/python examples/slurm/train_digits.py --partition main \
        --stages sft,grpo,eval --output runs/digits_chain
"""

import argparse
import sys
from pathlib import Path

from megatron_sr1.errors import SR1Error
from megatron_sr1.launch.cluster import add_arguments, cluster_of, tasks_of

CONFIG = Path(__file__).resolve().parents[1] / "digits_cpu.yaml"
SETTINGS = {
    "sft": [
        "model.path=runs/demo/model",
        "data.train=runs/demo/data/cold_start",
        "data.prompts_per_step=64",
        "optimizer.num_steps=600",
        "optimizer.learning_rate=2e-3",
        "optimizer.min_learning_rate=2e-4",
        "optimizer.warmup_steps=20",
    ],
}


def main() -> int:
    """Check, queue, and say how to follow the jobs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, str(CONFIG))
    parser.set_defaults(tasks_per_node=2, time="01:00:00")
    arguments = parser.parse_intermixed_args()
    try:
        from megatron_sr1.launch.slurm import submit

        cluster = cluster_of(arguments)
        print(submit("digits", cluster, tasks_of(arguments, SETTINGS)))
    except SR1Error as error:
        print(f"train_digits: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
