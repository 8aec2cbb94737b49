"""Ranges, choices and kinds of a configuration's values."""

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
        ("rollout.kv_cache_gib=0", "more than 0"),
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
