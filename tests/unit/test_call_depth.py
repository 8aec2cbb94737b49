"""How deep the loss is below the command line: one real step on the CPU, in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.demo.digits import make_digits

ROOT = Path(__file__).resolve().parents[2]
MAX_FRAMES = 8
"""From the command line to the loss, both counted."""
STEP = """
import importlib, json, sys, traceback
from megatron_sr1.cli import main

where, name, file, *arguments = sys.argv[1:]
module = importlib.import_module(where)
real = getattr(module, name)

def recording(*arguments):
    stack = [(frame.filename, frame.name) for frame in traceback.extract_stack()[:-1]]
    with open(file, "w") as opened:
        json.dump(stack, opened)
    return real(*arguments)

setattr(module, name, recording)
sys.exit(main(arguments))
"""


def frames_between(tiny_model, folder, stage, module, loss):
    """The package's frames, from that of `python -m megatron_sr1` to the loss, in order."""
    shards = make_digits(folder, 1, num_train=4, num_eval=2, num_cold_start=4)
    data = shards["cold_start" if stage == "sft" else "train"]
    arguments = ["train", "examples/digits_cpu.yaml", f"stage={stage}", f"model.path={tiny_model}"]
    arguments += [f"data.train={data}", "evaluation.sets=", f"output={folder / 'run'}"]
    arguments += ["data.prompts_per_step=2", "algorithm.prompts_per_update=2"]
    arguments += ["rollout.samples_per_prompt=2", "optimizer.num_steps=1"]
    arguments += ["launch.num_processes=1", "checkpoint.every_steps=0"]
    file = folder / "stack.json"
    command = [sys.executable, "-c", STEP, module, loss, str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    stack = json.loads(file.read_text())
    names = [name for path, name in stack if Path(path).is_relative_to(ROOT / "megatron_sr1")]
    assert names[0] == "main" and "update" in names
    return ["<module>", *names, loss]


def test_few_frames_lie_between_the_command_line_and_the_supervised_loss(tiny_model, tmp_path):
    names = frames_between(tiny_model, tmp_path, "sft", "megatron_sr1.trainer.sft", "sft_loss")
    assert len(names) <= MAX_FRAMES, names


@pytest.mark.slow
def test_few_frames_lie_between_the_command_line_and_the_policy_loss(tiny_model, tmp_path):
    module = "megatron_sr1.trainer.objective"
    names = frames_between(tiny_model, tmp_path, "grpo", module, "policy_loss")
    assert len(names) <= MAX_FRAMES, names
