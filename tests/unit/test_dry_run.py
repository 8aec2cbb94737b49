"""What `train RECIPE --dry-run` says of each recipe with the shape of its published model.

Not covered: Transformer Engine's classes, which hold the same parameters and need CUDA.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.model.hf_config import parse_hf_config
from megatron_sr1.planning.layout import Layout
from megatron_sr1.planning.memory import stage_parameters
from megatron_sr1.planning.workload import num_parameters

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "tests" / "published"
END = "-- end of a recipe --\n"
DRY_RUNS = f"""
import json, sys
from megatron_sr1.cli import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
    print({END.strip()!r})
"""


def raw_config(recipe):
    """Of the published model that a recipe is for."""
    return json.loads((PUBLISHED / f"qwen25vl_{recipe.split('_')[1]}.json").read_text())


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory):
    """By recipe. In a process of its own: this one may be a rank already, of a world of one."""
    folder, arguments = tmp_path_factory.mktemp("published"), []
    recipes = sorted((ROOT / "examples").glob("qwen25vl_*.yaml"))
    for path in recipes:
        directory = folder / path.stem.split("_")[1]
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(raw_config(path.stem)))
        (directory / "model.safetensors").touch()
        ranks = "launch.num_processes=8" if path.stem == "qwen25vl_3b" else "seed=1"
        arguments.append(["train", str(path), "--dry-run", f"model.path={directory}", ranks])
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUNS, json.dumps(arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip((path.stem for path in recipes), done.stdout.split(END)[:-1], strict=True))


def said(text, topic):
    """The numbers in a dry run's line."""
    (line,) = [line for line in text.splitlines() if line.startswith(topic)]
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", line)]


def test_a_dry_run_reports_the_memory_of_the_fullest_rank(dry_runs):
    """As docs/memory.md has it for two ranks a replica, the tower on both, and four replicas."""
    *parts, ranks = said(dry_runs["qwen25vl_3b"], "memory")
    assert sum(parts) == pytest.approx(19.9, abs=0.1) and ranks == 8


def test_every_recipes_model_is_built_on_the_meta_device_as_its_ranks_would(dry_runs):
    assert len(dry_runs) > 10
    for name, text in dry_runs.items():
        config = load_config(ROOT / "examples" / f"{name}.yaml")
        parallel, hf_config = config.parallel, parse_hf_config(raw_config(name))
        ranks = (parallel.tensor, parallel.pipeline, parallel.context)
        layout = Layout(*ranks, vision=parallel.vision)
        ends = dict.fromkeys((0, parallel.pipeline - 1))
        planned = [sum(p.numel for p in stage_parameters(hf_config, layout, s)) for s in ends]
        assert said(text, "parameters") == planned, name
        whole = num_parameters(hf_config) / (parallel.tensor * parallel.pipeline)
        assert max(planned) >= whole
