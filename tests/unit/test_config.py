"""A configuration is refused with one clear sentence, or it is what the file and overrides say."""

import json
from dataclasses import asdict

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import keys
from megatron_sr1.errors import ConfigError

REFUSED = {
    "rewrd.recipe=x": "nearest is 'reward.recipe'",
    "model.pth=x": "nearest is 'model.path'",
    "seed=two": "expected an integer, for example 1",
    "reward.max_ungraded=5": "the new one is reward.max_ungraded_share, a share of each step",
    "reward.max_ungraded_share=1.5": "reward.max_ungraded_share is 1.5; expected 0 to 1",
    "reward.grader=mathruler": "reward.grader is 'mathruler'; expected rules | math_verify",
    "stage=rl": "sft | grpo | eval",
    "parallel.tensor=0": "1 or more",
    "parallel.sequence=true": "parallel.tensor",
    "rollout.top_p=0.9": "top_p=1",
    "rollout.temperature=0": "expected 0.01 to 2, for example 1.0",
    "rollout.pass2_mode=guess": "generate | likelihood",
    "rollout.pass2_temperature=-1": "0 to 2",
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
    "data.prompt_style=brief": "the new one is data.pass1_template and data.pass2_template",
    "data.image_position=start": "keep | first | last",
    "reward.recipe=sr1": "vision_sr1 | see_think | vision_r1",
    "reward.grader=odd": "rules | math_verify",
    "rollout.pass2_order=x": "the new one is data.pass2_template, such as full_description_first",
    "reward.arguments=3": "reward.arguments is 3; expected a mapping, for example {tolerance: 0.1}",
    "reward.arguments.a-b=3": "reward.arguments has the name 'a-b'; expected one of a Python param",
    "reward.arguments.a=3": "reward.arguments={'a': 3} is about reward.function, which is not set",
    "reward.function_for=total": "reward.function_for=total is about reward.function, which is not",
    "reward.function_range=[1,1]": "expected the lowest and the highest value, such as [-1, 1]",
    "reward.function_range=[0,.inf]": "each -1000000 to 1000000",
    "reward.overlong.cache_tokens=4096": "is more than rollout.max_response_tokens=2048",
    "reward.spans.think=a b": "reward.spans.think=a b; expected the name of a tag",
    "reward.spans.answer=think": "reward.spans.answer=think: expected three different names",
    "reward.spans.think=reasoning": "data.pass1_template=full asks for <description>, <think>",
    "reward.spans.thought=x": "reward.spans has description, think, answer, think_first",
    "data.eval=x": "the new one is evaluation.sets.NAME.path",
    "data.eval_limit=2": "the new one is evaluation.max_samples",
    "evaluation.sets=x": "expected a mapping of names, each with a mapping",
    "evaluation.sets.a=x": 'evaluation.sets.a is "x"; expected a mapping, for example {path: DIR}',
    "evaluation.sets.a/b.path=x": "expected a name of letters, digits, _ and - only",
    "evaluation.sets.a.pth=x": "the nearest is 'evaluation.sets.NAME.path'",
    "evaluation.sets.a.temperature=1": "evaluation.sets.a.path is not set",
    "evaluation.sets.a={path: x, temperature: 3}": "a.temperature is 3.0; expected 0 to 2",
    "evaluation.sets.a={path: x, temperature: hot}": "expected a number or null, for example 0.5",
    "evaluation.sets.a={path: x, samples_per_prompt: 4}": "set a temperature above 0",
    "evaluation.every_steps=2": "evaluation.sets is empty",
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
        load_config(None, [*kept, "model.fp8_recipe=delayed"])
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
        (["rollout.pass2_mode=endpoint"], "rollout.endpoint.base_url=; expected an address"),
    ],
)
def test_settings_of_pass_2_that_contradict_each_other_are_refused(overrides, said):
    with pytest.raises(ConfigError) as error:
        load_config(None, ["model.path=x", *overrides])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["reward.overlong.cache_tokens=9"], "reward.overlong is part of the total"),
        (
            ["reward.function_for=total", "reward.function=a.py:f"],
            "reward.function_for=total is part",
        ),
    ],
)
def test_what_is_part_of_the_total_is_refused_where_that_is_not_used(overrides, said):
    load_config(None, ["model.path=x", *overrides])
    with pytest.raises(ConfigError, match=said):
        load_config(None, ["model.path=x", "algorithm.credit=component", *overrides])


def test_arguments_of_a_function_are_of_any_type_and_those_of_a_file_can_be_removed(tmp_path):
    given = {"tolerance": 0.5, "names": ["a", "b"], "inner": {"x": None}}
    (tmp_path / "a.yaml").write_text(
        f"{{model: {{path: x}}, reward: {{function: a.py:f, arguments: {json.dumps(given)}}}}}"
    )
    config = load_config(tmp_path / "a.yaml", ["reward.arguments.more=true"])
    assert config.reward.arguments == given | {"more": True}
    assert json.loads(json.dumps(asdict(config)))["reward"]["arguments"] == given | {"more": True}
    assert load_config(tmp_path / "a.yaml", ["reward.arguments="]).reward.arguments == {}


def test_an_evaluation_refuses_settings_that_its_engine_would_ignore():
    with pytest.raises(ConfigError, match="top_k=0"):
        load_config(None, ["model.path=x", "stage=eval", "rollout.top_k=5"])


def test_an_override_keeps_leading_zeros_and_is_never_octal():
    config = load_config(None, ["model.path=x", "model.revision=0010", "optimizer.num_steps=010"])
    assert (config.model.revision, config.optimizer.num_steps) == ("0010", 10)


def test_the_file_wins_over_defaults_and_overrides_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "seed: 5\nmodel:\n  path: x\ndata: {train: shards}\nevaluation: {sets: {a: {path: x}}}\n"
    )
    config = load_config(path, ["seed=6", "evaluation.sets="])
    assert (config.seed, config.data.train, config.evaluation.sets) == (6, "shards", {})
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


def test_a_missing_mandatory_key_is_named():
    with pytest.raises(ConfigError, match="model.path is not set"):
        load_config(None)


def test_every_key_is_saved_with_the_run():
    saved = asdict(load_config(None, ["model.path=x"]))
    for key in keys():
        if "NAME" in key.split("."):  # a group that only the user makes
            continue
        value = saved
        for part in key.split("."):
            value = value[part]
