"""The scoring tool gives the same numbers under every backend and layout.

Not covered here: bfloat16, GPUs.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "score_logprobs.py"
LAYOUTS = {
    "one": [],
    "pipeline": ["--pipeline-parallel", "2"],
    "context": ["--context-parallel", "2"],
}


def arguments(model, lines, output, backend, *options):
    return ["--model", model, "--input", lines, "--output", output, "--backend", backend, *options]


def run(*content):
    """The tool as a user starts it; it starts its ranks."""
    command = [sys.executable, str(TOOL), *map(str, arguments(*content))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def scores(model, lines, output, *options):
    done = run(model, lines, output, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(output)


def read(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def lines(tiny_model, tmp_path_factory):
    """Five prompts with no, one or two images of unequal sizes; one response is empty."""
    from PIL import Image

    from megatron_sr1.data.processor import Processor

    folder = tmp_path_factory.mktemp("lines")
    processor = Processor(tiny_model, 784, 200704)
    rng = np.random.default_rng(5)
    written = []
    for number in range(5):
        prompt, names = [1], []
        for k in range(number % 3):
            size = (28 * (2 + k + number), 28 * (2 + number), 3)
            image = Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8))
            names.append(f"image_{number}_{k}.png")
            image.save(folder / names[-1])
            t, h, w = processor.grid(image)
            prompt += [3, *([processor.image_pad_id] * (t * h * w // 4)), 4]
        prompt += rng.integers(10, 300, size=5).tolist()
        response = rng.integers(10, 300, size=4 * number).tolist()
        written.append({"prompt": prompt, "response": response, "images": names, "id": number})
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    return path


@pytest.fixture(scope="module")
def expected(tiny_model, lines, tmp_path_factory, run_ranks):
    output = tmp_path_factory.mktemp("expected") / "out.jsonl"
    run_ranks(TOOL, 1, *arguments(tiny_model, lines, output, "transformers"))
    return read(output)


def compare(found, expected, bound):
    for one, other in zip(found, expected, strict=True):
        assert len(one["logprobs"]) == len(one["response"])
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], rtol=0, atol=bound)
        assert {k: v for k, v in one.items() if k != "logprobs"} == {
            k: v for k, v in other.items() if k != "logprobs"
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_scores_as_transformers_does(
    tiny_model, lines, expected, tmp_path, layout, run_ranks
):
    output, options = tmp_path / "out.jsonl", LAYOUTS[layout]
    content = arguments(tiny_model, lines, output, "megatron", *options)
    run_ranks(TOOL, 2 if options else 1, *content)
    compare(read(output), expected, 1e-4)
    assert np.ptp(read(output)[4]["logprobs"]) > 0.1


def test_the_tool_starts_its_own_ranks(tiny_model, lines, expected, tmp_path):
    options = ["megatron", "--tensor-parallel", "2"]
    compare(scores(tiny_model, lines, tmp_path / "out.jsonl", *options), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", ["1", "2"])
def test_the_engine_scores_as_transformers_does(
    tiny_model, lines, expected, tmp_path, tensor_parallel
):
    options = ["--tensor-parallel", tensor_parallel]
    compare(scores(tiny_model, lines, tmp_path / "o.jsonl", "vllm", *options), expected, 1e-4)


@pytest.mark.slow
def test_a_megatron_checkpoint_scores_as_the_model_that_it_came_from(
    tiny_model, lines, expected, tmp_path
):
    convert = TOOL.with_name("convert_checkpoint.py")
    command = [sys.executable, str(convert), "hf-to-megatron", tiny_model, tmp_path / "megatron"]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    for backend in ("megatron", "transformers", "vllm"):
        found = scores(tmp_path / "megatron", lines, tmp_path / f"{backend}.jsonl", backend)
        compare(found, expected, 1e-4)


def test_wrong_input_is_named_with_its_line(tiny_model, tmp_path):
    path = tmp_path / "bad.jsonl"
    cases = {
        '{"prompt": [1, 2], "response": [3]}\nnonsense': "line 2: not JSON",
        '{"prompt": [1, "x"], "response": [3]}': "line 1: prompt must be a list of token ids",
        '{"prompt": [1], "response": [3], "images": ["absent.png"]}': "line 1: image absent.png",
    }
    for text, message in cases.items():
        path.write_text(text)
        done = run(tiny_model, path, tmp_path / "out.jsonl", "megatron")
        assert done.returncode == 1
        assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_that_do_not_fit_their_images_are_refused(tiny_model, lines, tmp_path, run_ranks):
    content = json.loads(lines.read_text().splitlines()[1])
    content["prompt"].remove(6)  # one image-pad id fewer
    path = lines.with_name("short.jsonl")
    path.write_text(json.dumps(content))
    content = arguments(tiny_model, path, tmp_path / "out.jsonl", "megatron")
    done = run_ranks(TOOL, 1, *content, check=False)
    assert done.returncode == 1
    assert "expand each image to its own number of image-pad ids" in done.stdout


def test_layouts_that_a_backend_does_not_have_are_refused(tiny_model, lines, tmp_path):
    for backend, options, message in (
        ("transformers", ["--tensor-parallel", "2"], "--tensor-parallel 2: the transformers"),
        ("vllm", ["--pipeline-parallel", "2"], "--pipeline-parallel 2: the vllm backend"),
        ("vllm", ["--context-parallel", "2"], "--context-parallel 2: the vllm backend"),
    ):
        done = run(tiny_model, lines, tmp_path / "out.jsonl", backend, *options)
        assert done.returncode == 1
        assert message in done.stderr
