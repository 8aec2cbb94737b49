"""What `megatron-sr1 plan` prints, and its errors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.cli import main
from megatron_sr1.config.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "tests" / "published"
SEVEN = ROOT / "examples" / "qwen25vl_7b.yaml"
NOT_TORCH = (
    "import sys\nfrom megatron_sr1.cli import main\nmain(sys.argv[1:])\n"
    "print([name for name in ('torch', 'megatron', 'vllm') if name in sys.modules])"
)


@pytest.fixture
def model(tmp_path):
    """A model directory of the 7B without weights."""
    (tmp_path / "config.json").write_text((PUBLISHED / "qwen25vl_7b.json").read_text())
    return tmp_path


def plan(capsys, *arguments):
    status = main(["plan", str(SEVEN), *map(str, arguments)])
    return status, capsys.readouterr()


def test_the_page_has_memory_layouts_phases_and_keys(model, capsys):
    status, printed = plan(capsys, f"model.path={model}", "--gpus", 8, "--gpu", "h100")
    assert status == 0
    for kind in ("weights", "gradients", "optimizer", "text activations", "vision activations",
                 "logits", "engine weights", "engine KV cache"):  # fmt: skip
        assert re.search(rf"^  {kind} +\d+\.\d$", printed.out, re.MULTILINE), kind
    for phase in ("sync", "prefill", "pass1", "pass2", "old_logprobs", "reference", "update"):
        assert re.search(rf"^  {phase} +\d+\.\d s +\d+\.\d % MFU$", printed.out, re.MULTILINE), (
            phase
        )
    keys = printed.out.split("as configuration keys:\n")[1].split()
    load_config(SEVEN, keys)


def test_given_lengths_are_used(model, capsys):
    lengths = ["--response-tokens", "300", "--image-tokens=0", "--reading-tokens", "50"]
    _, printed = plan(capsys, f"model.path={model}", "--gpus", 8, "--gpu", "h100", *lengths)
    assert "250 text + 0 image + 300 response tokens, readings of 50" in printed.out


def test_a_dry_run_supports_uneven_and_virtual_stages(model):
    (model / "config.json").write_text((PUBLISHED / "qwen25vl_3b.json").read_text())
    (model / "model.safetensors").touch()
    example = str(ROOT / "examples" / "qwen25vl_3b.yaml")
    keys = [f"model.path={model}", "launch.num_processes=8", "parallel.tensor=2"]
    keys += ["parallel.pipeline=2", "parallel.virtual=2", "parallel.vision=images"]

    def dry_run(layers):
        command = [sys.executable, "-m", "megatron_sr1", "train", example, "--dry-run", *keys]
        command.append(f"parallel.stage_layers={layers}")
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    done = dry_run("[4,10,12,10]")
    assert done.returncode == 0, done.stderr
    assert "GB on the fullest of 8 ranks" in done.stdout
    refused = dry_run("[4,32]")
    assert refused.returncode == 2
    assert "expected 4 numbers" in refused.stderr


def test_a_plan_needs_no_torch(model):
    command = [sys.executable, "-c", NOT_TORCH, "plan", str(SEVEN), f"model.path={model}"]
    done = subprocess.run(
        [*command, "--gpus", "8", "--gpu", "h100"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--gpus", 8, "--gpu", "h101"],
            "'h101' is unknown; expected one of a100, a100-40gb, h100, h200, b200, rtx4090, ",
        ),
        (["--gpus", 12, "--gpu", "h100"], "a multiple of 8, e.g. 8 or 16"),
        (["stage=eval", "--gpus", 8, "--gpu", "h100"], "stage=eval trains nothing"),
        (["--gpus", 0, "--gpu", "h100"], "--gpus 0: expected 1 to 8"),
        (
            ["--gpus", 1, "--gpu", "a100"],
            r"nothing fits on 1 a100 of 80 GB: .* needs \d+\.\d GB per GPU \(.*\); use 8 GPUs",
        ),
    ],
)
def test_an_impossible_plan_fails_with_one_line(model, capsys, arguments, words):
    status, printed = plan(capsys, f"model.path={model}", *arguments)
    assert status == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("megatron-sr1: error: ") and re.search(words, line)


def test_a_configured_layout_that_does_not_divide_is_reported(model, capsys):
    keys = [f"model.path={model}", "parallel.tensor=3"]
    _, printed = plan(capsys, *keys, "--gpus", 8, "--gpu", "h100")
    assert "the configuration's own layout does not divide these GPUs" in printed.out
    keys = [f"model.path={model}", "parallel.pipeline=2", "parallel.stage_layers=[1,2]"]
    _, printed = plan(capsys, *keys, "--gpus", 8, "--gpu", "h100")
    assert "does not divide this model: parallel.stage_layers is [1, 2]" in printed.out


def test_the_page_has_the_keys_of_uneven_stages(model, capsys):
    # Too little memory for the layouts without stages, which are faster.
    little = ["rollout.make_room=none", "rollout.gpu_memory_utilization=0.5"]
    keys = [f"model.path={model}", "parallel.vision=tensor", *little]
    _, printed = plan(capsys, *keys, "--gpus", 8, "--gpu", "h100")
    variants_part, keys_part = printed.out.split("as configuration keys:\n")
    (key,) = [line.strip() for line in keys_part.splitlines() if "stage_layers" in line]
    assert sum(load_config(SEVEN, ["parallel.pipeline=2", key]).parallel.stage_layers) == 28
    line = r"^ +\d+\.\d s +\d+\.\d GB  parallel.virtual=2 parallel.stage_layers=\[[\d,]+\]$"
    assert re.search(line, variants_part, re.MULTILINE)
    assert re.search(r" GB  parallel.stage_layers=\[\]$", variants_part, re.MULTILINE)


def test_frozen_weights_leave_a_small_gpu_if_nothing_fits_otherwise(tmp_path, capsys):
    (tmp_path / "config.json").write_text((PUBLISHED / "qwen25vl_3b.json").read_text())
    keys = [f"model.path={tmp_path}", "adapter.rank=64", "rollout.sleep_level=0"]
    keys += ["parallel.tensor=1", "parallel.sequence=false"]
    status, printed = plan(capsys, *keys, "--gpus", 1, "--gpu", "rtx4090")
    assert status == 0
    assert "no layout fits with the configuration's settings; this needs rollout" in printed.out
    asked = printed.out.split("as configuration keys:\n")[1].split()
    assert asked[-2:] == ["rollout.make_room=weights", "rollout.sleep_level=2"]
    kinds = dict(re.findall(r"^  ([a-z ,]+?) +(\d+\.\d{3})$", printed.out, re.MULTILINE))
    assert kinds["frozen weights"] == kinds["frozen weights in host memory"] == "7.509"
    assert float(kinds["total, rollout"]) < 24 < float(kinds["total, rollout"]) + 7.509


def test_what_does_not_fit_24_gb_is_said_with_its_parts_and_adapters_if_they_would(model, capsys):
    seven = [f"model.path={model}", "parallel.tensor=1", "parallel.sequence=false"]
    status, printed = plan(capsys, *seven, "adapter.rank=64", "--gpus", 1, "--gpu", "rtx4090")
    assert status == 2
    assert re.search(
        r"needs \d+\.\d GB per GPU .* in an update \(weights 17\.\d, .*activations", printed.err
    )
    status, printed = plan(capsys, *seven, "--gpus", 1, "--gpu", "l40s")
    assert status == 2 and "adapters fit here: adapter.rank=16" in printed.err


def test_the_plan_says_why_it_does_not_propose_the_fastest_layout(tmp_path, capsys):
    (tmp_path / "config.json").write_text((PUBLISHED / "qwen25vl_72b.json").read_text())
    _, printed = plan(capsys, f"model.path={tmp_path}", "--gpus", 64, "--gpu", "h100")
    reason = r"^  \d\.\d % slower than the fastest, with 1 instead of \d context-parallel ranks: "
    assert re.search(reason, printed.out, re.MULTILINE)
