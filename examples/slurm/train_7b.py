"""Vision-SR1 on Qwen2.5-VL-7B as Slurm jobs of 8 GPUs per node, with nemo-run. NEEDS GPUS.

GRPO on four nodes, or the three stages one after another:

    .venv-launch/bin/python examples/slurm/train_7b.py --partition gpu --account lab --nodes 4 \
        model.path=DIR data.train=DIR
    .venv-launch/bin/python examples/slurm/train_7b.py --partition gpu --nodes 4 \
        --stages sft,grpo,eval --output runs/7b \
        sft:model.path=DIR sft:data.train=DIR grpo:data.train=DIR \
        evaluation.sets.held_out.path=DIR
"""

import argparse
import sys
from pathlib import Path

from megatron_sr1.errors import SR1Error
from megatron_sr1.launch.cluster import add_arguments, cluster_of, tasks_of

CONFIG = Path(__file__).resolve().parents[1] / "qwen25vl_7b.yaml"
SETTINGS = {
    # A cold start of one's own data; its number of steps is one epoch of them.
    "sft": ["optimizer.learning_rate=1e-5", "data.prompts_per_step=128"],
}


def main() -> int:
    """Check, queue, and say how to follow the jobs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, str(CONFIG))
    parser.set_defaults(gpus_per_node=8, time="1-00:00:00")
    arguments = parser.parse_intermixed_args()
    try:
        from megatron_sr1.launch.slurm import submit

        cluster = cluster_of(arguments)
        print(submit("vision_sr1_7b", cluster, tasks_of(arguments, SETTINGS)))
    except SR1Error as error:
        print(f"train_7b: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
