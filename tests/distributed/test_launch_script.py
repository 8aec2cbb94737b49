"""The script for several machines, as two node agents on this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.observability.metrics import read_lines
from tests.ranks import free_ports

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_node_agents_make_one_run(tiny_model, tmp_path):
    shards = make_digits(tmp_path, 1, num_train=8, num_eval=4, num_cold_start=32)
    (port,) = free_ports(1)
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {"PATH": os.pathsep.join(paths), "MASTER_PORT": str(port), "NUM_NODES": "2"}
    agents = [
        subprocess.Popen(
            [
                *(ROOT / "examples" / "launch_torchrun.sh", "examples/digits_cpu.yaml"),
                *("stage=sft", f"output={tmp_path / 'run'}", f"model.path={tiny_model}"),
                *(
                    f"data.train={shards['cold_start']}",
                    "evaluation.sets=",
                    "optimizer.num_steps=2",
                ),
                *("data.prompts_per_step=16", "checkpoint.export_hf=false"),
            ],
            cwd=ROOT,
            env={**os.environ, **environment, "NODE_RANK": str(node), "RANKS_PER_NODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = [agent.communicate(timeout=400)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    # Only rank 0 logs the steps: one agent has it, the other has rank 1.
    assert sorted("sft 2/2" in text for text in said) == [False, True]
