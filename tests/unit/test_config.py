"""A configuration is refused with one clear sentence, or it is what the file and overrides say."""

import pytest

from megatron_sr1.config_checks import keys
from megatron_sr1.config_file import load_config, to_dict
from megatron_sr1.errors import ConfigError

REFUSED = {
    "rewrd.recipe=x": "nearest is 'reward.recipe'",
    "model.pth=x": "nearest is 'model.path'",
    "reward.max_ungraded=5": "the new one is reward.max_ungraded_share, a share of each step",
    "reward.max_ungraded_share=1.5": "reward.max_ungraded_share is 1.5; expected 0 to 1",
    "reward.grader=mathruler": "reward.grader is 'mathruler'; expected rules | math_verify",
    "seed=two": "Integer",
    "stage=rl": "sft | grpo | eval",
    "parallel.tensor=0": "1 or more",
    "parallel.sequence=true": "parallel.tensor",
    "rollout.top_p=0.9": "top_p=1",
    "rollout.temperature=0": "more than 0",
    "rollout.pass2_mode=guess": "generate | likelihood",
    "rollout.pass2_temperature=-1": "0 (greedy) or more",
    "rollout.pass2_samples=0": "1 or more",
    "rollout.pass2_samples=4": "set rollout.pass2_temperature",
    "rollout.canary_bound=-1": "0 or more",
    "reward.likelihood=odds": "per_token | probability | linear",
    "reward.likelihood_nats=0": "more than 0",
    "algorithm.std_floor=0": "more than 0",
    "algorithm.prompts_per_update=100": "does not divide",
    "algorithm.advantage=gae": "grpo | dr_grpo | rloo",
    "algorithm.credit=token": "scalar | component | span",
    "algorithm.loss=mean": "token_mean | sequence_mean | dr_grpo | gspo",
    "algorithm.importance_sampling=on": "off | token | sequence",
    "algorithm.importance_cap=0.5": "1 or more",
    "algorithm.max_refills=0": "1 or more",
    "algorithm.visual_weight=0": "more than 0",
    "algorithm.mask_beyond_nats=-1": "0 or more",
    "data.max_prompt_tokens=8000": "rollout.max_model_len",
    "model.fp8=hybrid": "transformer_engine",
    "model.fp8_recipe=tensorwise": "delayed | current | blockwise | mxfp8",
    "model.bf16_layers_at_end=1": "without model.fp8",
    "seed": "group.key=value",
}


@pytest.mark.parametrize("override", REFUSED)
def test_impossible_values_are_refused_with_what_is_expected(override):
    with pytest.raises(ConfigError) as error:
        load_config(None, ["model.path=x", override])
    assert REFUSED[override] in str(error.value) and "\n" not in str(error.value)


def test_first_and_last_layers_stay_in_bfloat16_unless_scaling_is_delayed():
    fp8 = ["model.path=x", "model.spec=transformer_engine", "model.fp8=hybrid"]
    kept = [*fp8, "model.bf16_layers_at_start=1"]
    with pytest.raises(ConfigError, match="set model.fp8_recipe=current, blockwise or mxfp8"):
        load_config(None, kept)
    for recipe in ("current", "blockwise", "mxfp8"):
        model = load_config(None, [*kept, f"model.fp8_recipe={recipe}"]).model
        assert (model.bf16_layers_at_start, model.bf16_layers_at_end) == (1, 0)
    load_config(None, fp8)


@pytest.mark.parametrize("recipe", ["see_think", "vision_r1"])
def test_credit_for_a_self_reward_needs_one(recipe):
    for credit in ("component", "span"):
        chosen = [f"algorithm.credit={credit}", f"reward.recipe={recipe}"]
        with pytest.raises(ConfigError, match="recipe=vision_sr1"):
            load_config(None, ["model.path=x", *chosen])
        load_config(None, ["model.path=x", *chosen, "stage=eval"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.pass2_mode=likelihood", "rollout.pass2_samples=2"], "pass2_mode=generate"),
        (["rollout.pass2_mode=likelihood", "rollout.pass2_temperature=1"], "pass2_mode=generate"),
        (["reward.question_baseline=true", "reward.recipe=see_think"], "recipe=vision_sr1"),
        (["rollout.pass2_mode=likelihood", "reward.recipe=vision_r1"], "recipe=vision_sr1"),
    ],
)
def test_settings_of_pass_2_that_contradict_each_other_are_refused(overrides, said):
    with pytest.raises(ConfigError) as error:
        load_config(None, ["model.path=x", *overrides])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_evaluation_refuses_what_its_engine_would_not_heed():
    with pytest.raises(ConfigError, match="top_k=0"):
        load_config(None, ["model.path=x", "stage=eval", "rollout.top_k=5"])


def test_the_file_wins_over_defaults_and_overrides_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 5\nmodel:\n  path: x\ndata:\n  eval: held_out\n  train: shards\n")
    config = load_config(path, ["seed=6", "data.eval="])
    assert (config.seed, config.data.train, config.data.eval) == (6, "shards", "")
    assert config.optimizer.beta1 == 0.9


def test_a_file_builds_on_the_one_that_it_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "first.yaml").write_text("seed: 1\nmodel:\n  path: x\n  dtype: float32\n")
    (tmp_path / "sub" / "second.yaml").write_text("base: ../first.yaml\nseed: 2\noutput: a\n")
    (tmp_path / "third.yaml").write_text("base: sub/second.yaml\noutput: b\n")
    config = load_config(tmp_path / "third.yaml")
    assert (config.seed, config.output, config.model.path) == (2, "b", "x")
    assert config.model.dtype == "float32"


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("run.yaml", "run.yaml: builds on itself"),
        ("other.yaml", "run.yaml: builds on itself"),
        ("absent.yaml", "absent.yaml: no such configuration file"),
        ("[a, b]", "expected the path of a YAML file"),
        ("wrong.yaml", "wrong.yaml: unknown key 'sed'; the nearest is 'seed'"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(tmp_path, base, said):
    (tmp_path / "run.yaml").write_text(f"base: {base}\n")
    (tmp_path / "other.yaml").write_text("base: run.yaml\n")
    (tmp_path / "wrong.yaml").write_text("sed: 1\n")
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "run.yaml", ["model.path=x"])


@pytest.mark.parametrize(
    ("text", "said"), [("- 1\n", "mapping"), ("a: [", "YAML"), (None, "no such")]
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_what_must_be_set_is_asked_for():
    with pytest.raises(ConfigError, match="model.path is not set"):
        load_config(None)


def test_every_key_is_saved_with_the_run():
    saved = to_dict(load_config(None, ["model.path=x"]))
    for key in keys():
        value = saved
        for part in key.split("."):
            value = value[part]
