"""The example configurations load, and say what upstream's recipe says."""

import subprocess
from pathlib import Path

import pytest

from megatron_sr1.config import Config
from megatron_sr1.config_file import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_configuration(path):
    load_config(path)


@pytest.mark.parametrize("size", ["3b", "7b"])
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
    assert 8 % (config.parallel.tensor * config.parallel.pipeline * config.parallel.context) == 0


def test_the_launch_script_is_valid_and_says_how_to_use_it():
    script = EXAMPLES / "launch_torchrun.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2 and "NODE_RANK" in done.stdout
