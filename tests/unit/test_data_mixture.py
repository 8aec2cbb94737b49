"""Several training sets with weights: one index space, names, checks, metrics and report."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_sr1.cli import main
from megatron_sr1.config.loading import load_config
from megatron_sr1.data.examples import Record
from megatron_sr1.data.loader import Loader
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.shards import ShardReader, write_shards
from megatron_sr1.errors import ConfigError
from megatron_sr1.records import Completion, Message, Reward, Rollout
from megatron_sr1.report.report import write_report
from megatron_sr1.trainer.grading import Scored
from megatron_sr1.trainer.recording import rollout_line, set_means
from megatron_sr1.trainer.samples import Samples
from tests.custom_sets import NUM_IMAGES, make_sets, mixture
from tests.pictures import png

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ROOT / "tests" / "published" / "qwen25vl_3b.json"


def record(text, *shades):
    images = tuple(png((shade, shade, shade), (28, 28)) for shade in shades)
    return Record((Message("user", "<image>" * len(images) + text),), "7", images)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Shards: 12 questions without an image, 5 with one, 8 with two, in two shards."""
    folder = tmp_path_factory.mktemp("sets")
    write_shards([record(f"words {n}") for n in range(12)], folder / "words")
    write_shards([record(f"one {n}", 10 * n) for n in range(5)], folder / "one")
    pairs = [record(f"two {n}", 10 * n, 10 * n + 1) for n in range(8)]
    write_shards(pairs, folder / "two", samples_per_shard=6)
    return {name: folder / name for name in ("words", "one", "two")}


@pytest.fixture(scope="module")
def processor(tiny_model):
    return Processor(tiny_model, 784, 200704)


@pytest.fixture(scope="module")
def samples(sets, processor):
    config = load_config(None, ["model.path=x", *mixture(sets, words=1, one=2, two=1)])
    return Samples(config, config.data.sets, processor)


def test_the_samples_of_all_sets_have_one_index_space_and_keep_their_places(sets, samples):
    assert len(samples) == 25 and samples.reader.sizes == [12, 5, 8]
    names = [samples.set_of(index) for index in range(25)]
    assert names == ["words"] * 12 + ["one"] * 5 + ["two"] * 8
    last = samples.prompt(24)
    assert last.example.index == 24 and last.example.question.endswith("two 7")
    assert last.example.where == f"{sets['two']}/shard-000001.tar sample 000000007"
    assert [image.getpixel((0, 0))[0] for image in samples.images(24)] == [70, 71]
    assert samples.images(13)[0].getpixel((0, 0))[0] == 10 and samples.images(0) == []
    assert (samples.vision(24).image_grid_thw.shape[0], samples.vision(0)) == (2, None)
    with pytest.raises(IndexError, match="words, .*two: sample 25 of 25"):
        samples.reader.images(25)


def test_a_single_directory_has_no_name(sets, processor):
    config = load_config(None, ["model.path=x", f"data.train={sets['one']}"])
    samples = Samples(config, config.data.sets, processor)
    assert config.data.paths == {"data.train": str(sets["one"])} and samples.set_of(4) == ""
    assert set_means([scored(4, 1.0, 1.0)], samples.set_of) == {}


def scored(index, accuracy, self_reward):
    rollout = Rollout(index, 0, (), Completion((), (), "", "stop"), None, None, 1)
    return Scored(rollout, Reward(accuracy, 1.0, self_reward, False, accuracy, None, None))


def test_accuracy_and_self_reward_are_means_of_each_set_with_rollouts(sets, samples):
    found = [scored(0, 1.0, None), scored(11, 0.0, None), scored(12, 1.0, 0.0)]
    found += [scored(16, 1.0, 1.0), scored(12, 1.0, 0.0), scored(13, 0.0, 0.0)]
    assert set_means(found, samples.set_of) == {
        "reward/accuracy/one": 0.75,
        "reward/accuracy/words": 0.5,
        "reward/self_reward/one": 0.25,
    }
    example = ShardReader(sets["words"]).example(3)
    assert rollout_line(1, found[2], example, {"advantage": 0.0}, "one")["set"] == "one"
    assert "set" not in rollout_line(1, found[2], example, {"advantage": 0.0})


def test_a_text_set_and_sets_of_one_and_of_several_images_mix(processor, tmp_path, capsys):
    """The schemas of EasyR1's three examples of one's own data."""
    counts = {"math12k": 6, "geometry3k": 5, "journeybench": 4}
    made = make_sets(tmp_path, **counts)
    overrides = mixture(made, **dict.fromkeys(counts, 1))
    config = load_config(None, ["model.path=x", *overrides])
    samples = Samples(config, config.data.sets, processor)
    loader = Loader(samples.reader.sizes, 9, 1, shares=config.data.shares)
    for step in (loader.next_step() for _ in range(4)):
        names = Counter(samples.set_of(index) for index in step)
        assert set(names.values()) == {3} and len(set(step)) == 9
        for index in step:
            number, prompt = NUM_IMAGES[samples.set_of(index)], samples.prompt(index)
            assert len(prompt.image_grid_thw) == number
            pads = prompt.token_ids.count(processor.image_pad_id)
            assert pads == 3 * number and prompt.example.answer  # 84 x 28 pixels: three tokens


@pytest.fixture
def command(sets, tmp_path):
    """`train` with a model's shape, the sets equally weighted, and further overrides."""
    (tmp_path / "config.json").write_text(SHAPE.read_text())
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {tmp_path}}}\ndata: {{train: {sets['words']}, prompts_per_step: 6}}\n"
        "algorithm: {prompts_per_update: 3}\nlaunch: {device: cpu}\n"
    )
    return lambda *more: main(
        ["train", str(file), "--dry-run", *mixture(sets, words=1, one=1, two=1), *more]
    )


def test_a_dry_run_checks_and_describes_every_set(command, sets, capsys):
    assert command("rollout.canary_bound=1e-3") == 0  # the images are in the second set
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train")]
    assert lines[1] == (
        f"train data  one (33% of a step): {sets['one']}, 5 samples, first 5 read"
    ) and [line.split()[2] for line in lines] == ["words", "one", "two"]
    assert command("data.mixture.late.path=lost") == 0
    said = capsys.readouterr()
    assert "data.mixture.late.path=lost does not exist" in said.err
    assert "late (25% of a step): lost: does not exist, not checked" in said.out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data.mixture.one.weight=100"],
            "data.mixture.one.weight=100 is 6 of a step's data.prompts_per_step=6, but {one} has",
        ),
        (
            ["data.prompts_per_step=30", "data.mixture.words.weight=1e-9"],
            "data.mixture.one.weight=1 is 15 of a step's data.prompts_per_step=30, but {one} has 5",
        ),
        (["data.mixture.bad.path={bad}"], "data.mixture.bad.path={bad} holds no *.tar shard"),
        (["data.mixture.talk.path={talk}"], "data.mixture.talk.path={talk}: none of the first 8"),
        (["data.mixture.one.weight=0"], "data.mixture.one.weight is 0.0; expected more than 0"),
        (["data.mixture.one.wait=2"], "unknown key 'data.mixture.one.wait'"),
        (["data.mixture.a/b.path=x"], "data.mixture.a/b: expected a name of letters"),
        (["data.train=x"], "data.train excludes data.mixture; set one of them"),
        (["data.mixture="], "data.train is not set"),
    ],
)
def test_a_set_that_cannot_be_used_is_named_by_its_key(
    command, sets, tmp_path, capsys, overrides, said
):
    (tmp_path / "bad").mkdir()
    write_shards([Record((Message("user", "q"),), None, ())] * 9, tmp_path / "talk")
    names = {**sets, "bad": tmp_path / "bad", "talk": tmp_path / "talk"}
    if "data.train is" in said:
        overrides = ["data.mixture=", "data.train="]
    assert command(*(text.format(**names) for text in overrides)) == 2
    assert said.format(**names) in capsys.readouterr().err


def test_a_step_may_take_every_sample_of_a_set_and_no_more(command, capsys):
    enough = ["data.prompts_per_step=15", "algorithm.prompts_per_update=15"]
    assert command(*enough) == 0
    assert command("data.prompts_per_step=18", "algorithm.prompts_per_update=18") == 2
    assert "is 6 of a step's data.prompts_per_step=18" in capsys.readouterr().err


def test_the_report_draws_a_curve_per_set_and_finds_the_images_of_all_sets(sets, tmp_path):
    lines = [
        {"step": n, "stage": "grpo", "reward/accuracy/one": n / 9, "reward/accuracy/words": None}
        for n in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = {name: {"path": str(path), "weight": 1.0} for name, path in sets.items()}
    (tmp_path / "config.json").write_text(json.dumps({"data": {"train": "", "mixture": named}}))
    reward = {"accuracy": 1.0, "format": 1.0, "self_reward": None, "leak": False, "total": 1.0}
    line = {"step": 8, "set": "two", "index": 24, "sample": 0, "question": "q", "gold": "7"}
    line |= {"response": "7", "description": None, "reading": None, "advantage": 0.0}
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_8.jsonl").write_text(
        json.dumps({**line, "reward": reward}) + "\n"
    )
    page = write_report(tmp_path).read_text()
    assert "Answer right, by training set" in page and '"name":"one"' in page and "0.33333" in page
    assert "Self-reward, by training set" not in page
    assert "two no. 24" in page and page.count("data:image/png") == 2


def test_one_of_data_train_and_data_mixture_counts_the_later_one(tmp_path):
    (tmp_path / "first.yaml").write_text("model: {path: x}\ndata: {train: shards/a}\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\ndata: {mixture: {b: {path: b}}}\n")
    assert load_config(tmp_path / "second.yaml").data.sets == {"b": "b"}
    both = load_config(tmp_path / "second.yaml", ["data.mixture.c={path: c, weight: 3}"])
    assert both.data.shares == {"b": 0.25, "c": 0.75}
    assert load_config(tmp_path / "second.yaml", ["data.train=d"]).data.sets == {"": "d"}
    (tmp_path / "both.yaml").write_text("data: {train: a, mixture: {b: {path: b}}}\n")
    with pytest.raises(ConfigError, match=r"both.yaml: data.mixture excludes data.train"):
        load_config(tmp_path / "both.yaml", ["model.path=x"])
