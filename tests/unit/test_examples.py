"""The example configurations load, and say what upstream's recipe says."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_sr1.cli import main
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import Config
from megatron_sr1.data.benchmarks import BENCHMARKS
from megatron_sr1.model.hf_config import parse_hf_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PUBLISHED = Path(__file__).resolve().parents[1] / "published"
NUM_GPUS = {"3b_lora_1gpu": 1, "7b_lora": 2, "72b_lora_8gpus": 8}
NUM_MACHINES = {"7b_4_nodes": 4, "32b": 4, "72b": 8, "32b_cold_start": 4, "72b_cold_start": 8}


RECIPES = pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)


@RECIPES
def test_every_recipe_passes_a_dry_run_without_model_and_data(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without what `make demo` leaves in runs/
    assert main(["train", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("not checked") >= 2 and "Traceback" not in said


@RECIPES
def test_every_recipe_names_its_stage_and_an_output_of_its_own(path):
    own = OmegaConf.load(path)
    assert own.stage in ("sft", "grpo", "eval")
    assert own.output == f"runs/{path.stem}"
    assert ("NEEDS GPUS" in path.read_text()) == (load_config(path).launch.device == "cuda")


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_the_large_examples_have_the_papers_numbers(size):
    config = load_config(EXAMPLES / f"qwen25vl_{size}.yaml")
    assert isinstance(config, Config) and config.stage == "grpo"
    assert config.data.prompts_per_step == 512
    assert config.algorithm.prompts_per_update == 128
    assert config.rollout.samples_per_prompt == 8 and config.rollout.temperature == 1.0
    assert config.rollout.max_response_tokens == 2048 and config.rollout.max_model_len == 8192
    assert (config.data.min_pixels, config.data.max_pixels) == (262_144, 4_194_304)
    reward = config.reward
    weights = (reward.accuracy_weight, reward.format_weight, reward.self_reward_weight)
    assert reward.recipe == "vision_sr1" and weights == (0.9, 0.1, 1.0)
    algorithm = config.algorithm
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip) == (0.2, 0.3, 3.0)
    assert algorithm.kl_coefficient == 1e-2
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule) == (1e-6, "constant")
    assert (optimizer.weight_decay, optimizer.clip_grad) == (1e-2, 1.0)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_comparisons_differ_from_vision_sr1_in_their_recipe_alone(size):
    usual = asdict(load_config(EXAMPLES / f"qwen25vl_{size}.yaml"))
    for recipe in ("see_think", "vision_r1"):
        other = asdict(load_config(EXAMPLES / f"qwen25vl_{size}_{recipe}.yaml"))
        assert other["reward"].pop("recipe") == recipe and other.pop("output")
        assert other == {
            **{key: value for key, value in usual.items() if key != "output"},
            "reward": {k: v for k, v in usual["reward"].items() if k != "recipe"},
        }


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_the_cold_starts_have_the_papers_numbers(size):
    config = load_config(EXAMPLES / f"qwen25vl_{size}_cold_start.yaml")
    optimizer = config.optimizer
    assert (config.stage, config.data.prompts_per_step) == ("sft", 128)
    assert (optimizer.learning_rate, optimizer.schedule) == (1e-5, "cosine")
    assert (optimizer.num_epochs, optimizer.warmup_ratio) == (3, 0.1)
    assert optimizer.num_steps is None  # not the 100 of its base
    assert config.model.freeze == ["^visual[.]"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("qwen*.yaml")), ids=lambda p: p.name)
def test_every_layout_divides_the_published_model_and_the_gpus(path):
    config = load_config(path)
    size = path.name.split("_")[1].removesuffix(".yaml")
    raw = json.loads((PUBLISHED / f"qwen25vl_{size}.json").read_text())
    model, tensor = parse_hf_config(raw), config.parallel.tensor
    for parallel in (tensor, config.rollout.tensor_parallel):
        assert model.text.num_attention_heads % parallel == 0
        assert model.text.num_key_value_heads % parallel == model.vision.num_heads % parallel == 0
    assert model.text.num_layers % config.parallel.pipeline == 0
    name = path.stem.removeprefix("qwen25vl_").removesuffix("_fp8")
    num_gpus = NUM_GPUS.get(name, 8 * NUM_MACHINES.get(name, 1))
    assert num_gpus % config.parallel.replica_size == 0
    assert (
        num_gpus % config.rollout.tensor_parallel == 0 and 8 % config.rollout.tensor_parallel == 0
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("qwen*.yaml")), ids=lambda p: p.name)
def test_no_layout_splits_an_mlp_into_columns_that_matrix_products_are_slow_with(path):
    """cuBLAS wants bfloat16 rows of 16 bytes; the tower's whole 3,420 columns are 8-byte ones."""
    config = load_config(path)
    size = path.name.split("_")[1].removesuffix(".yaml")
    model = parse_hf_config(json.loads((PUBLISHED / f"qwen25vl_{size}.json").read_text()))
    parallel = config.parallel
    tower_ranks = parallel.tensor if parallel.vision == "tensor" else 1
    assert model.text.intermediate_size // parallel.tensor % 8 == 0
    assert model.vision.intermediate_size // tower_ranks % 4 == 0


def test_the_launch_script_is_valid_and_says_how_to_use_it():
    script = EXAMPLES / "launch_torchrun.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2 and "NODE_RANK" in done.stdout


@pytest.mark.parametrize("name", ["vision_sr1", "benchmarks"])
def test_the_evaluations_ask_known_benchmarks_greedily_and_count_mmmu_pro_once(name):
    config = load_config(EXAMPLES / f"eval_{name}.yaml")
    sets, weights = config.evaluation.sets, {}
    for key, each in sets.items():
        prefix = "sr1_" if name == "vision_sr1" else ""
        assert each.path == f"shards/{prefix}{key}" and prefix + key in BENCHMARKS
        family = "mmmu_pro" if key.startswith("mmmu_pro_") else key
        weights[family] = weights.get(family, 0.0) + each.weight
    assert all(weight in (0, pytest.approx(1, abs=1e-5)) for weight in weights.values())
    if name == "vision_sr1":  # as its average of Sep 2025
        assert sum(weights.values()) == pytest.approx(10, abs=1e-5)
    rollout = config.rollout
    assert (config.evaluation.temperature, config.evaluation.samples_per_prompt) == (0, 1)
    assert (rollout.max_response_tokens, rollout.max_model_len) == (2048, 25600)
    assert config.data.max_prompt_tokens == 12800
