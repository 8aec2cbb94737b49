"""Time a GRPO step here against TRL's on the same model, data and machine.

Both sides sample 256 completions per step (32 prompts x 8) at temperature 1 from the demo's cold
start and make one update. TRL runs one pass on transformers' generation, with accuracy as its
reward; here both passes run, with self-reward, update and weight sync. The sides take turns in
rounds, so that a disturbance of the machine affects both; the first step of each round is ignored.
TRL is installed into an environment of its own, over the project's packages. Run `make demo` first,
or name a model and shards of the digits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from megatron_sr1.observability.metrics import read_lines

ROOT = Path(__file__).resolve().parent.parent
TRL = "trl==1.16.0"


def trl_python() -> str:
    """Return the interpreter of an environment with TRL, made on first use."""
    cache = Path(os.environ.get("MEGATRON_SR1_CACHE") or Path.home() / ".cache" / "megatron_sr1")
    directory = cache / TRL.replace("==", "-")
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        venv.create(directory, with_pip=True, clear=True)
        site = next((directory / "lib").glob("python*")) / "site-packages"
        packages = [p for p in sys.path if p.endswith("site-packages")]
        lines = [f"import site; site.addsitedir({p!r})" for p in packages]
        (site / "_base.pth").write_text("\n".join(lines) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", TRL], check=True)
        (directory / "complete").touch()
    return str(python)


def run_trl(model: str, data: str, num_steps: int, result: Path) -> None:
    """Run TRL's side, in its own environment; write the seconds of each step to `result`."""
    import torch

    torch.set_num_threads(2)
    from megatron_sr1.runtime.cpu import patch_torchvision

    patch_torchvision()
    from datasets import Dataset
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from megatron_sr1.data.prompts import Prompts
    from megatron_sr1.data.shards import ShardReader
    from megatron_sr1.demo.digits import PROMPTS

    reader, prompts, rows = ShardReader(data), Prompts(PROMPTS, "vision_sr1"), []
    for index in range(32 * num_steps):
        example, image = reader.example(index), reader.images(index)[0]
        parts = prompts.pass1_messages(example)[0]["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        prompt = [{"role": "user", "content": text}]
        rows.append({"prompt": prompt, "image": image, "gold": str(example.answer)})

    def accuracy(completions: list, gold: list[str], **_: object) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [float(f"\\boxed{{{g}}}" in t) for t, g in zip(texts, gold, strict=True)]

    seconds: list[float] = []

    class Clock(TrainerCallback):
        """Records the seconds of each step."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter() - self.started)

    trainer = GRPOTrainer(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoProcessor.from_pretrained(model),
        reward_funcs=accuracy,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(result.parent / "trl"),
            per_device_train_batch_size=64,
            gradient_accumulation_steps=4,
            steps_per_generation=4,
            num_generations=8,
            max_completion_length=64,
            beta=0.01,
            temperature=1.0,
            learning_rate=1.5e-4,
            max_steps=num_steps,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
        ),
    )
    trainer.train()
    result.write_text(json.dumps(seconds))


def run_ours(model: str, data: str, num_steps: int, directory: Path) -> list[dict[str, float]]:
    """Run our side through the command line; return the seconds of each step and its phases."""
    command = [sys.executable, "-m", "megatron_sr1", "train", "examples/digits_cpu.yaml"]
    command += [
        f"model.path={model}",
        f"data.train={data}",
        "evaluation.sets=",
        f"output={directory}",
    ]
    command += [f"optimizer.num_steps={num_steps}", "rollout.max_response_tokens=64"]
    command += ["algorithm.kl_coefficient=0.01", "checkpoint.export_hf=false"]
    subprocess.run(command, check=True, cwd=ROOT)
    lines = read_lines(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k.startswith("time/")} for line in lines]


def run_rounds(
    model: str, data: str, num_steps: int, num_rounds: int
) -> tuple[list[list[float]], list[list[dict[str, float]]]]:
    """Return TRL's seconds [round][step], and ours with those of our phases; no first steps."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    theirs, ours = [], []
    for _ in range(num_rounds):
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            command = [trl_python(), __file__, "--model", model, "--data", data]
            command += ["--steps", str(num_steps), "--trl-result", str(directory / "trl.json")]
            subprocess.run(command, check=True, cwd=directory, env=environment)
            theirs.append(json.loads((directory / "trl.json").read_text())[1:])
            ours.append(run_ours(model, data, num_steps, directory / "ours")[1:])
    return theirs, ours


def report(found: dict[str, Any], result: Path | None) -> None:
    """Print the findings as JSON, and write them to a file if one is named."""
    text = json.dumps(found, indent=2)
    if result:
        result.write_text(text + "\n")
    print(text)


def main() -> None:
    """Let both take turns; print medians over all rounds, and each round's ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="runs/demo/cold_start/hf", help="Hugging Face directory")
    add("--data", default="runs/demo/data/train", help="shards of the digits")
    add("--steps", type=int, default=6, help="steps per side and round")
    add("--rounds", type=int, default=3)
    add("--result", type=Path, help="also write the JSON to this file")
    add("--trl-result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, data = str(Path(arguments.model).resolve()), str(Path(arguments.data).resolve())
    for path in (model, data):
        if not Path(path).is_dir():
            raise SystemExit(f"compare_trl: {path} does not exist; run `make demo` first")
    if arguments.trl_result:
        run_trl(model, data, arguments.steps, arguments.trl_result)
        return
    theirs, ours = run_rounds(model, data, arguments.steps, arguments.rounds)
    own = [[line["time/step_seconds"] for line in lines] for lines in ours]
    sides = {"ours": own, "trl": theirs}
    medians = {name: statistics.median(sum(rounds, [])) for name, rounds in sides.items()}
    lines, median = sum(ours, []), statistics.median
    phases = [name for name in lines[0] if all(name in line for line in lines)]
    found = {
        "median_step_seconds": medians,
        "ratio": medians["ours"] / medians["trl"],
        "ratio_by_round": [median(o) / median(t) for o, t in zip(own, theirs, strict=True)],
        "steps": sides,
        "median_phase_seconds": {name: median(line[name] for line in lines) for name in phases},
        "phase_seconds_by_step": lines,
    }
    report(found, arguments.result)


if __name__ == "__main__":
    main()
