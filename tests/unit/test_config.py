"""A configuration is refused with one clear sentence, or it is what the file and overrides say."""

import json
import math
import re
from dataclasses import asdict, fields, is_dataclass
from operator import attrgetter

import pytest

from megatron_sr1.config.fields import accepted, settings
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rules import validate
from megatron_sr1.config.run import Config, keys
from megatron_sr1.errors import ConfigError
from tools import config_page

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


# Ranges and choices: once, in the metadata of the fields.

NUMBERS = {
    key: field
    for key, field, value in settings(Config())
    if isinstance(value[0] if isinstance(value, list) and value else value, (int, float))
    and not isinstance(value, bool)
} | {key: field for key, field, value in settings(Config()) if field.type == "list[int]"}


def test_every_number_has_a_range_and_every_field_is_seen():
    assert len(keys()) == len(set(keys())) > 120 and len(NUMBERS) > 60
    for key, field in NUMBERS.items():
        assert field.metadata.keys() & {"at_least", "above"}, f"{key} has no lower bound"
        assert accepted(field), key
    groups = [field.name for field in fields(Config) if is_dataclass(getattr(Config(), field.name))]
    assert {key.partition(".")[0] for key in keys() if "." in key} == set(groups)


def test_every_string_is_a_choice_unless_it_is_a_path_or_a_name():
    free = {
        "output",
        "model.path",
        "model.revision",
        "model.commit",
        "data.train",
        "data.pass1_template",
        "data.pass2_template",
        "data.system_prompt",
        "data.chat_template",
        "reward.function",
        "reward.arguments",
        "reward.spans.description",
        "reward.spans.think",
        "reward.spans.answer",
        "adapter.path",
        "adapter.targets",
        "evaluation.function",
        "evaluation.category",
        *(f"evaluation.judge.{name}" for name in ("base_url", "model", "api_key_env", "cache")),
        *(f"rollout.endpoint.{name}" for name in ("base_url", "model", "api_key_env")),
    }
    strings = [(key, field) for key, field, _ in settings(Config()) if "str" in str(field.type)]
    listed = {key for key, field in strings if "choices" in field.metadata}
    assert len(listed) > 20
    assert {key for key, _ in strings} - listed == free | {"logging.wandb_project", "model.freeze"}


def test_the_reference_page_is_what_the_dataclasses_say():
    written = config_page.PAGE.read_text()
    assert all(f"| `{key}` |" in written for key in keys())
    assert written == config_page.page(), "run `python tools/config_page.py`"


def outside(field):
    """Values just outside a field's range, and those that are in no range."""
    limits, is_whole = field.metadata, "int" in str(field.type)
    near = 1 if is_whole else 1e-9
    yield from (limits[name] - near for name in ("at_least",) if name in limits)
    yield from (limits[name] + near for name in ("at_most",) if name in limits)
    yield from (limits[name] for name in ("above", "below") if name in limits)
    yield from (2**63, 10**30) if is_whole else (math.nan, math.inf, -math.inf, -1e300)


@pytest.mark.field
def test_a_number_outside_its_range_is_refused_by_key_value_and_range():
    for key, field in NUMBERS.items():
        group, _, name = key.rpartition(".")
        for value in outside(field):
            config = Config()
            owner = attrgetter(group)(config) if group else config
            setattr(owner, name, [value] if "list" in str(field.type) else value)
            with pytest.raises(ConfigError) as error:
                validate(config)
            assert str(error.value).startswith(f"{key} is ") and "expected" in str(error.value)
            assert str(value) in str(error.value) and "\n" not in str(error.value)


def test_every_default_is_in_its_range_and_every_choice_is_taken():
    load_config(None, ["model.path=x"])
    for key, field, value in settings(Config()):
        choices = field.metadata.get("choices", ())
        assert not choices or value in choices, key


@pytest.mark.field
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.temperature=2.5", "0.01 to 2"),  # vLLM's SamplingParams: at most 2
        ("rollout.temperature=0.005", "0.01 to 2"),  # vLLM would sample at 0.01
        ("rollout.pass2_temperature=2.5", "0 to 2"),
        ("optimizer.beta1=1", "0 or more and less than 1"),  # torch.optim.Adam: below 1
        ("optimizer.beta2=1.5", "0 or more and less than 1"),
        ("optimizer.epsilon=0", "1e-30 to 1"),  # 0 / 0 where no gradient comes
        ("optimizer.num_steps=0", "1 or more, for example 100"),
        ("optimizer.learning_rate=-1e-6", "more than 0"),
        ("optimizer.weight_decay=-0.1", "0 or more"),  # torch.optim.AdamW: not negative
        ("algorithm.dual_clip=0.5", "more than 1"),
        ("algorithm.dual_clip=1", "more than 1"),
        ("algorithm.clip_low=1.5", "0 to 1"),
        ("data.min_pixels=0", "784 to"),
        ("data.max_pixels=1000000000000", "784 to"),
        ("rollout.gpu_memory_utilization=1.5", "more than 0 and at most 1"),  # vLLM's CacheConfig
        ("rollout.max_num_seqs=0", "1 to 8192"),  # vLLM's SchedulerConfig: 1 to tokens of a step
        ("rollout.sleep_level=3", "0 to 2"),
        ("rollout.kv_cache_gib=0", "1 or more"),
        ("logging.samples_every=0", "1 or more"),  # divides by it
        ("launch.phase_deadline_seconds=-1", "0 to 2592000"),
        ("launch.setup_deadline_seconds=1e12", "0 to 2592000"),  # more than a timer takes
        ("reward.grader_timeout_seconds=1e300", "more than 0 and at most 3600"),
        ("seed=4294967296", "0 to 4294967295"),  # numpy.random.seed, which vLLM calls
        ("logging.profile_ranks=[0,-1]", "each 0 or more"),
        ("parallel.stage_layers=[4,0]", "each 1 or more"),
    ],
)
def test_what_a_library_would_refuse_later_is_refused_at_once(override, said):
    with pytest.raises(ConfigError) as error:
        load_config(None, ["model.path=x", override])
    assert override.partition("=")[0] in str(error.value) and said in str(error.value)


@pytest.mark.field
@pytest.mark.parametrize(
    "more",
    [
        ["algorithm.advantage=grpo"],
        ["algorithm.advantage=dr_grpo"],
        ["algorithm.advantage=rloo"],
        ["algorithm.credit=span"],
        ["algorithm.credit=component"],
        ["algorithm.filter_groups=true"],
    ],
)
def test_a_group_of_one_response_is_refused_as_it_would_teach_nothing(more):
    with pytest.raises(ConfigError, match="samples_per_prompt=1 .* set 2 or more"):
        load_config(None, ["model.path=x", "rollout.samples_per_prompt=1", *more])
    for stage in ("sft", "eval"):
        load_config(None, ["model.path=x", "rollout.samples_per_prompt=1", f"stage={stage}"])
    load_config(None, ["model.path=x", "rollout.samples_per_prompt=2", *more])


def test_a_decay_that_would_rise_is_refused():
    rates = ["optimizer.learning_rate=1e-6", "optimizer.min_learning_rate=1e-5"]
    with pytest.raises(ConfigError, match="is more than optimizer.learning_rate=1e-06"):
        load_config(None, ["model.path=x", "optimizer.schedule=cosine", *rates])
    load_config(None, ["model.path=x", *rates])  # constant: it has no end to reach


# Values of the wrong kind: in YAML and as overrides, in words of our own.

WRONG = {
    "optimizer: 5": "optimizer is 5; expected a mapping, for example {num_steps: 100}",
    "optimizer: [1]": "optimizer is [1]; expected a mapping",
    "model:": "model is null; expected a mapping, for example {revision: main}",
    'model: {freeze: "^visual"}': (
        'model.freeze is "^visual"; expected a list of strings, for example ["^visual"]'
    ),
    "model: {freeze: }": "model.freeze is null; expected a list of strings",
    "model: {freeze: {}}": "model.freeze is {}; expected a list of strings",
    "model: {freeze: [[a]]}": "expected a list of strings",
    "model: {freeze: [null]}": "expected a list of strings",
    "model: {path: [a]}": 'model.path is ["a"]; expected a string',
    "model: {path: {a: b}}": 'model.path is {"a": "b"}; expected a string',
    "model: {fp8: [1]}": "model.fp8 is [1]; expected null | hybrid | e4m3",
    "seed: 1.5": "seed is 1.5; expected an integer, for example 1",
    "seed: true": "seed is true; expected an integer",
    "seed:": "seed is null; expected an integer",
    "output: 1e3": "output is 1000.0; expected a string",
    "output: no": "output is false; expected a string",
    "rollout: {temperature: hot}": 'temperature is "hot"; expected a number, for example 1.0',
    "rollout: {temperature: no}": "temperature is false; expected a number",
    "data: {shuffle: maybe}": 'data.shuffle is "maybe"; expected true or false',
    "data: {shuffle: 2}": "data.shuffle is 2; expected true or false",
    "parallel: {stage_layers: 4}": "expected a list of integers, for example [4]",
    "parallel: {stage_layers: [1.5]}": "stage_layers is [1.5]; expected a list of integers",
    "logging: {wandb: on}": "logging.wandb is true; expected off | offline | online",
    "zebra: 3": "unknown key 'zebra' and none like it; expected one of stage, output, seed, model,",
    "model: {zebra: 3}": "unknown key 'model.zebra' and none like it; model has path, revision,",
    "temperature: 1": "unknown key 'temperature'; the nearest is 'rollout.temperature'",
    "modl: {pth: 1}": "unknown key 'modl.pth'; the nearest is 'model.path'",
    "modell: 1": "unknown key 'modell'",
    "5: 3": "unknown key '5'",
}


@pytest.mark.field
@pytest.mark.parametrize("text", WRONG)
def test_a_value_of_the_wrong_kind_is_named_with_an_example(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ") and WRONG[text] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.field
@pytest.mark.parametrize("text", ["", "{a: b}", "[a]", "maybe", "1.5", "null", "{}", "true"])
def test_no_value_of_any_kind_of_key_ends_in_a_library_error(text):
    kinds = ("seed", "stage", "output", "data.shuffle", "rollout.temperature", "model.fp8")
    for key in (*kinds, "model.freeze", "parallel.stage_layers", "model", "optimizer"):
        try:
            config = load_config(None, ["model.path=x", f"{key}={text}"])
        except ConfigError as error:
            assert "\n" not in str(error) and key in str(error)
            assert not re.search(r"OmegaConf|Node|Config\b|NoneType|Merge", str(error))
        else:
            json.dumps(asdict(config))


@pytest.mark.field
def test_off_without_quotes_is_the_choice_and_not_false(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: x}\nlogging:\n  wandb: off\n")
    config = load_config(path, ["algorithm.importance_sampling=off"])
    assert (config.logging.wandb, config.algorithm.importance_sampling) == ("off", "off")


def test_numbers_and_truth_values_may_come_as_text_from_the_environment(monkeypatch):
    monkeypatch.setenv("RUN_SEED", "7")
    monkeypatch.setenv("RUN_SHUFFLE", "no")
    given = ["seed=${oc.env:RUN_SEED}", "data.shuffle=${oc.env:RUN_SHUFFLE}", "output=12345"]
    config = load_config(None, ["model.path=x", *given])
    assert (config.seed, config.data.shuffle, config.output) == (7, False, "12345")
    with pytest.raises(ConfigError, match='seed is "no"; expected an integer'):
        load_config(None, ["model.path=x", "seed=${oc.env:RUN_SHUFFLE}"])
