"""A dry run measures some prompts and says what to do about those that are too long."""

from pathlib import Path

import pytest

from megatron_sr1.cli import main
from megatron_sr1.config.loading import load_config
from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import write_shards
from megatron_sr1.dry_run import hf_files
from megatron_sr1.records import Message
from megatron_sr1.runtime.device import stop_distributed
from megatron_sr1.trainer.data_checks import NUM_MEASURED, long_prompts, prompt_lengths
from megatron_sr1.trainer.samples import Samples, make_processor
from tests.pictures import png

LIMIT = "data.max_prompt_tokens=400"
SMALL = ["data.min_pixels=784", "data.max_pixels=200704"]


def question(words=1, size=None, roles=("user",), answer="7"):
    images = ()
    if size:
        images = (png("black", size),)
    turns = tuple(Message(role, "<image>" * bool(size) + "sum " * words) for role in roles)
    return Record(turns[:1] + tuple(Message(t.role, "7") for t in turns[1:]), answer, images)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """256 questions, of which every fourth and the last are long; 5, one long by its image."""
    folder = tmp_path_factory.mktemp("sets")
    write_shards([question(500 if n % 4 == 0 else 2) for n in range(256)], folder / "many")
    few = [question(2, (400, 400) if n == 3 else (28, 28)) for n in range(5)]
    write_shards([*few, question(answer=None)], folder / "few")
    talks = [question(400 * (n == 1) + 1, None, ("user", "assistant"), None) for n in range(4)]
    write_shards(talks, folder / "talks")
    return folder


def config_of(model, *overrides):
    return load_config(None, [f"model.path={model}", LIMIT, *SMALL, *overrides])


def measured(config):
    return prompt_lengths(config, hf_files(config))


def both(sets):
    return [f"data.mixture.{name}.path={sets / name}" for name in ("many", "few")]


def test_evenly_spaced_prompts_of_each_set_are_measured_whatever_the_limit(tiny_model, sets):
    config = config_of(tiny_model, *both(sets))
    lengths = measured(config)
    many, few = lengths["data.mixture.many.path"], lengths["data.mixture.few.path"]
    assert len(many) == NUM_MEASURED and min(many) > 500  # every fourth sample, all of them long
    assert len(few) == 5 and sum(n > 400 for n in few) == 1  # one has no answer: left out
    samples = Samples(config, config.data.sets, make_processor(config))
    assert few[0] == len(samples.prompt(256).token_ids) and few[3] > few[0] + 150
    warnings = long_prompts(config, lengths)
    assert len(warnings) == 2
    assert warnings[1].startswith(
        f"data.mixture.few.path={sets / 'few'}: 1 of 5 samples, evenly spaced, are longer than "
        f"data.max_prompt_tokens=400 (at most {few[3]} tokens); the run skips such samples, and "
        "stops after data.max_skipped=100"
    )
    assert (
        f"tools/make_shards.py --model {tiny_model} --config CONFIG --max-prompt-tokens 400"
        in warnings[0]
    )
    assert (
        long_prompts(config_of(tiny_model, *both(sets), "data.max_prompt_tokens=2000"), lengths)
        == []
    )


def test_in_sft_conversations_are_measured(tiny_model, sets):
    config = config_of(tiny_model, f"data.train={sets / 'talks'}", "stage=sft")
    lengths = measured(config)["data.train"]
    assert len(lengths) == 4 and [n > 400 for n in lengths] == [False, True, False, False]


def test_the_dry_run_prints_the_lengths_and_the_warning(tiny_model, sets, tmp_path, capsys):
    stop_distributed()  # other modules may leave a world of one
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny_model}, dtype: float32}}\nlaunch: {{device: cpu}}\n"
        "rollout: {max_response_tokens: 48, max_model_len: 512}\n"
        "data: {prompts_per_step: 4}\nalgorithm: {prompts_per_update: 4}\n"
    )
    few = [f"data.train={sets / 'few'}", LIMIT, *SMALL]
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run", *few]) == 0
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if line.startswith("prompts")]
    assert line.startswith("prompts     5 of data.train: ") and "median" in line
    assert f"data.train={sets / 'few'}: 1 of 5 samples, evenly spaced, are longer" in said.err


def test_nothing_is_measured_without_a_tokenizer_or_a_set(tiny_model, sets, tmp_path):
    (tmp_path / "config.json").write_text((Path(tiny_model) / "config.json").read_text())
    (tmp_path / "model.safetensors").touch()
    assert measured(config_of(tmp_path, *both(sets))) == {}
    assert measured(config_of(tmp_path / "lost", *both(sets))) == {}
    assert measured(config_of(tiny_model, *both(sets), "data.mixture.c.path=lost")) == {}
    assert measured(config_of(tiny_model, *both(sets), "stage=eval")) == {}
