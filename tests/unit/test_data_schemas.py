"""The three forms of custom data sets that EasyR1 names, in their published columns, to prompts."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from megatron_sr1.config.loading import load_config
from megatron_sr1.trainer.samples import Samples, make_processor
from tools.make_shards import main

TEXT, IMAGES = datasets.Value("string"), datasets.List(datasets.Image())


def picture(number, kind="PNG"):
    size = (28 * (number + 2), 28 * 2, 3)
    pixels = np.random.default_rng(number).integers(256, size=size, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return {"bytes": buffer.getvalue(), "path": f"images_{number}.{kind.lower()}"}


SETS = {
    "math12k": (
        {"problem": TEXT, "answer": TEXT},
        [
            {"problem": r"What is $\frac{1}{2}$ of 8?", "answer": "4"},
            {"problem": "Solve $x^2 = 9$ for $x > 0$.", "answer": r"x \in \{3\}"},
            {"problem": r"Write $0.5$ as a fraction.", "answer": r"\frac{1}{2}"},
        ],
    ),
    "geometry3k": (
        {"images": IMAGES, "problem": TEXT, "answer": TEXT},
        [
            {"images": [picture(0)], "problem": "<image>Find x.", "answer": "3"},
            {"images": [picture(1)], "problem": "<image>Find y.", "answer": r"\sqrt{3}"},
            {"images": [picture(2)], "problem": "<image>Find m.", "answer": "60"},
        ],
    ),
    "journeybench-multi-image-vqa": (
        {"images": IMAGES, "problem": TEXT, "answer": TEXT},
        [
            {
                "images": [picture(0, "JPEG"), picture(1, "JPEG")],
                "problem": "<image><image>How many more birds are in the second image?",
                "answer": "3",
            },
            {
                "images": [picture(n, "JPEG") for n in range(3)],
                "problem": "<image> <image> <image> Which are alike?",
                "answer": "the first two",
            },
            {"images": [picture(2), picture(0)], "problem": "Are they alike?", "answer": "no"},
        ],
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_published_form_becomes_prompts(name, tmp_path, tiny_model):
    kinds, rows = SETS[name]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    made.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    out = tmp_path / "out"
    assert main([str(tmp_path / "train-00000-of-00001.parquet"), str(out), "--max-skipped=0"]) == 0
    config = load_config(None, [f"model.path={tiny_model}", f"data.train={out}"])
    processor = make_processor(config)
    samples = Samples(config, config.data.sets, processor)
    assert len(samples) == len(rows)
    for number, row in enumerate(rows):
        prompt = samples.prompt(number)
        images = row.get("images", [])
        assert prompt.example.golds == (row["answer"],)
        assert samples.reader.image_files(number) == [image["bytes"] for image in images]
        grids = prompt.image_grid_thw
        tokens = sum(t * h * w for t, h, w in grids) // processor.merge_size**2
        assert prompt.token_ids.count(processor.image_pad_id) == tokens
        assert len(grids) == len(images)
        text = processor.tokenizer.decode(prompt.token_ids)
        assert all(part.strip() in text for part in row["problem"].split("<image>"))
