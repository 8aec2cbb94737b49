"""Lengths of prompts before training: those of the trainer, in a histogram, with a limit."""

import json
import pickle
import re

import pytest
from PIL import Image

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.lengths import PromptLength
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.data.tally import Tally
from megatron_sr1.trainer.samples import Samples, make_processor
from tests.pictures import png
from tools import make_shards as tool

SIDES = ((), ((84, 28),), ((400, 300), (30, 700)), ((56, 56),))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions with up to two images of several sizes, one image turned by its EXIF tag."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number, sides in enumerate(SIDES):
        names = [f"{number}_{place}.jpeg" for place in range(len(sides))]
        for name, side in zip(names, sides, strict=True):
            turned = Image.Exif()
            turned[274] = 6
            Image.new("RGB", side).save(folder / name, exif=turned)
        text = "What is it? " * (1 + 5 * number)
        lines.append({"problem": text, "answer": "7", "images": names})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def trained(config, directory, read):
    samples = Samples(config, {"": str(directory)}, make_processor(config))
    sequences = [getattr(samples, read)(i).token_ids for i in range(len(samples))]
    pad = samples.processor.image_pad_id
    return [(len(ids), list(ids).count(pad)) for ids in sequences]


def test_lengths_are_those_of_the_trainers_prompts(rows, tmp_path, tiny_model, capsys):
    settings = "data:\n  min_pixels: 3136\n  max_pixels: 50176\n"
    (tmp_path / "run.yaml").write_text(settings)
    own = ["--model", str(tiny_model), "--config", str(tmp_path / "run.yaml")]
    assert tool.main([str(rows), str(tmp_path / "out"), *own]) == 0
    out = capsys.readouterr().out
    config = load_config(tmp_path / "run.yaml", [f"model.path={tiny_model}"])
    lengths = trained(config, tmp_path / "out", "prompt")
    assert len({image for _, image in lengths}) == 4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    longest = {name: each["percentiles"]["100"] for name, each in report["prompt_tokens"].items()}
    assert longest["total"] == max(total for total, _ in lengths)
    assert longest["image"] == max(image for _, image in lengths)
    assert longest["text"] == max(total - image for total, image in lengths)
    assert report["prompt_tokens"]["image"]["up_to"]["0"] == 1 and report["too_long"] == 0
    row = f"longest {longest['text']} {longest['image']} {longest['total']}"
    assert row in re.sub(" +", " ", out) and "prompts by tokens" in out
    default = PromptLength(tiny_model).load()[2]  # with other limits of pixels
    assert default.max_pixels != config.data.max_pixels


def test_longer_prompts_are_left_out_and_counted(rows, tmp_path, tiny_model, capsys):
    config = load_config(None, [f"model.path={tiny_model}"])
    assert tool.main([str(rows), str(tmp_path / "all")]) == 0
    lengths = [total for total, _ in trained(config, tmp_path / "all", "prompt")]
    limit = sorted(lengths)[1]
    own = ["--model", str(tiny_model), "--max-prompt-tokens", str(limit), "--max-skipped", "0"]
    capsys.readouterr()
    assert tool.main([str(rows), str(tmp_path / "out"), *own]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: 2 samples, 0 skipped, 2 too")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["written"], report["too_long"], report["skipped"]) == (2, 2, 0)
    assert sum(report["prompt_tokens"]["total"]["up_to"].values()) == 4
    kept = [total for total, _ in trained(config, tmp_path / "out", "prompt")]
    assert kept == [total for total in lengths if total <= limit]


def test_counting_goes_on_in_another_process_unless_settings_changed(rows, tmp_path, tiny_model):
    """What names the settings is the same in each process, and differs for other settings."""
    told = []
    for pixels in (50176, 50176, 100352):
        settings = f"data:\n  min_pixels: 784\n  max_pixels: {pixels}\n"
        (tmp_path / "run.yaml").write_text(settings)
        own = ["--model", str(tiny_model), "--config", str(tmp_path / "run.yaml")]
        convert = tool.conversion(tool.parse([str(rows), str(tmp_path / "out"), *own]))
        assert pickle.loads(pickle.dumps(convert)) == convert and " at 0x" not in repr(convert)
        told.append(repr(convert))
    assert told[0] == told[1] != told[2]


def test_conversations_are_measured_with_their_answers(tmp_path, tiny_model):
    (tmp_path / "a.png").write_bytes(png("black", (112, 84)))
    turns = [
        {"role": "user", "content": "<image>q"},
        {"role": "assistant", "content": "so 7. " * 9},
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": turns, "images": ["a.png"]}]))
    own = ["--model", str(tiny_model)]
    assert tool.main([str(tmp_path / "a.json"), str(tmp_path / "out"), *own]) == 0
    config = load_config(None, [f"model.path={tiny_model}", "stage=sft"])
    ((total, image),) = trained(config, tmp_path / "out", "conversation")
    found = json.loads((tmp_path / "out" / "report.json").read_text())["prompt_tokens"]
    assert [found[name]["percentiles"]["50"] for name in ("total", "image")] == [total, image]


def test_the_histogram_has_every_prompt_once():
    tally = Tally()
    for text, image, count in ((16, 0, 3), (17, 64, 1), (5000, 16000, 96)):
        tally.lengths[text, image] = count
    found = tally.histograms()
    assert found["text"] == {
        "percentiles": {"50": 5000, "90": 5000, "99": 5000, "100": 5000},
        "up_to": {"16": 3, "32": 1, "8192": 96},
    }
    assert found["image"]["up_to"] == {"0": 3, "64": 1, "16384": 96}
    assert found["total"]["up_to"] == {"16": 3, "128": 1, "32768": 96}
    tally.lengths.clear()
    tally.lengths.update({(n, 0): 1 for n in range(1, 101)})
    assert tally.histograms()["total"]["percentiles"] == {"50": 50, "90": 90, "99": 99, "100": 100}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max-prompt-tokens", "9"], "need --model, whose tokens are counted"),
        (["--config", "run.yaml"], "need --model, whose tokens are counted"),
        (["--model", "m", "--max-prompt-tokens", "0"], "--max-prompt-tokens must be 1 or more"),
        (["--workers", "0"], "--workers must be 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, told, capsys):
    with pytest.raises(SystemExit):
        tool.parse(["a", "b", *options])
    assert told in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_clear_error(rows, tmp_path, capsys):
    assert tool.main([str(rows), str(tmp_path / "out"), "--model", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith(f"make_shards: {tmp_path}/none: no such directory")
    with pytest.raises(Exception, match="no .tar shards"):
        ShardReader(tmp_path / "out")
