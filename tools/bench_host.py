"""Host time of the benchmark: what Python costs between the kernels, with a model of tiny kernels.

Makes its model and images itself. Measures, in turn within one run: `LLM.generate` of 64 prompts
with 8 samples each, so 512 live sequences; `roll_out` of one pass of the same prompts, pixels
included; both passes forked, with what is finished graded by other processes, of which the loop's
own part is what lies outside of vLLM's calls; and what a step's images cost before the first token:
decoded by the trainer and preprocessed by vLLM one after the other, or read ahead by threads. The
planner's figure for the host is made here too: what one more live sequence costs in an engine step
outside of the model and the sampler, from passes with 64 and with 512 sequences. Times are
processor seconds of the main thread, which other programs on the machine disturb less than wall
time does. Writes a JSON file. One process, started by bench.py, with OMP_NUM_THREADS=1, so that the
main thread computes everything.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rollout import RewardConfig, RolloutConfig
from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import write_shards
from megatron_sr1.demo.digits import corpus_texts
from megatron_sr1.demo.tiny_model import make_tiny_model
from megatron_sr1.records import Message, Rollout
from megatron_sr1.rewards.grading_pool import GradingPool
from megatron_sr1.rollout import vllm_api
from megatron_sr1.rollout.engine import Engine, Request
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.rng import request_seed
from megatron_sr1.trainer.grading import score
from megatron_sr1.trainer.rollouts import follow_up
from megatron_sr1.trainer.samples import Samples, make_processor
from tools.scoring_backends import collapse

NUM_PROMPTS, SAMPLES = 64, 8
RESPONSE_TOKENS, READING_TOKENS, DESCRIPTION_CHARACTERS = 64, 24, 40
SMALL, LARGE = (84, 28), (1024, 768)
"""Width and height of an image, pixels: as in the digits, and of an ordinary photograph."""
ROUNDS = 5
SECONDS = ("one_pass_seconds", "own_seconds", "vllm_seconds", "ahead_seconds", "serial_seconds")
LIMITS = {"one_pass": 1.03, "own_share": 0.05, "images": 0.10}
"""`roll_out` of one pass over LLM.generate; the loop's own seconds over those of vLLM's steps; the
seconds of a step's images, read ahead over not."""


class Bench:
    """A tiny engine and samples with images of one size."""

    def __init__(self, directory: Path, live: int = 2 * NUM_PROMPTS * SAMPLES) -> None:
        """Make model and shards, and start the engine, which has `live` sequences at most."""
        model = directory / "model"
        make_tiny_model(model, corpus_texts(), hidden_size=64, num_layers=1)
        self.samples = {
            name: make_samples(directory, model, name, size)
            for name, size in (("small", SMALL), ("large", LARGE))
        }
        start_distributed(select_device("cpu"))
        rollout = RolloutConfig(max_model_len=2048, max_num_seqs=live)
        self.engine = Engine(model, rollout, self.samples["small"].processor)
        self.llm = self.engine._llm
        self.executor = self.engine._core.engine_core.engine_core.model_executor
        self.pool = GradingPool(RewardConfig())

    def reset(self) -> None:
        """Drop what the engine has cached."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def generate(self) -> float:
        """Return the seconds of LLM.generate from decoded images to tokens and logprobs."""
        from vllm import SamplingParams

        samples = self.samples["small"]
        prompts = [samples.prompt(index) for index in range(NUM_PROMPTS)]
        pad = samples.processor.image_pad_id
        images = [samples.images(index) for index in range(NUM_PROMPTS)]
        asked = [as_vllm_takes(p.token_ids, i, pad) for p, i in zip(prompts, images, strict=True)]
        common = {"n": SAMPLES, "max_tokens": RESPONSE_TOKENS, "logprobs": 0, "detokenize": False}
        settings = [SamplingParams(seed=k, flat_logprobs=True, **common) for k in range(len(asked))]
        self.reset()
        started = time.thread_time()
        found = self.llm.generate(asked, settings, use_tqdm=False)
        seconds = time.thread_time() - started
        assert sum(len(each.outputs) for each in found) == NUM_PROMPTS * SAMPLES
        return seconds

    def roll(self, with_pass2: bool) -> tuple[float, float, float]:
        """Return the seconds of roll_out, of its loop's own part, and of vLLM's steps.

        The loop begins with the first step, after pass 1 was submitted. Its own part is what is
        neither a step nor a submission of vLLM's. Those of one pass include what makes pixels of
        decoded images.
        """
        samples = self.samples["small"]
        images = [samples.images(index) for index in range(NUM_PROMPTS)]
        samples.readings.clear()
        self.reset()
        steps, submissions = list[Call](), list[Call]()
        started = time.thread_time()
        if not with_pass2:
            for pictures in images:
                samples.processor.vision(pictures)
        core = self.engine._core
        with timed_calls(core, ("step",), steps), timed_calls(core, ("add_request",), submissions):
            rollouts = self._rollouts(SAMPLES, with_pass2)
        ended = time.thread_time()
        assert sum(r.reading is not None for r in rollouts) > len(rollouts) / 2 or not with_pass2
        if with_pass2:
            score(rollouts, samples, self.pool)
        first, vllm = steps[0].started, sum(call.seconds for call in steps)
        submitted = sum(call.seconds for call in submissions if call.started > first)
        return ended - started, ended - first - vllm - submitted, vllm

    def sequence_seconds(self) -> float:
        """Return the host time of one more live sequence in an engine step.

        Counted are vLLM's scheduler, its inputs and outputs and our loop. The model, its logits and
        the sampler, which are kernels on a GPU, are not, nor are submissions, which come once.
        """
        found = []
        for num_samples in (1, SAMPLES):
            self.reset()
            runner = self.executor.driver_worker.model_runner
            started, kernels = time.thread_time(), list[Call]()
            with ExitStack() as stack:
                for owner, names in (
                    (runner.model, ("forward", "compute_logits")),
                    (runner.sampler, ("forward",)),
                    (self.engine._core, ("add_request",)),
                ):
                    stack.enter_context(timed_calls(owner, names, kernels))
                rollouts = self._rollouts(num_samples, with_pass2=False)
            seconds = time.thread_time() - started - sum(call.seconds for call in kernels)
            found.append((seconds, sum(len(r.completion.token_ids) for r in rollouts)))
        (few, few_tokens), (many, many_tokens) = found
        return (many - few) / (many_tokens - few_tokens)

    def _rollouts(self, num_samples: int, with_pass2: bool) -> list[Rollout]:
        samples = self.samples["small"]
        rollout = RolloutConfig(
            samples_per_prompt=num_samples,
            max_response_tokens=RESPONSE_TOKENS,
            pass2_temperature=1.0,
            max_reading_tokens=READING_TOKENS,
        )
        rollouts, _ = roll_out(
            self.engine,
            [samples.prompt(index) for index in range(NUM_PROMPTS)],
            rollout,
            RolloutHooks(
                first_characters,
                samples.reading_prompts if with_pass2 else None,
                lambda index, sample, part: request_seed(1, 0, index, sample, part),
                finished=follow_up(samples, self.pool, rollout, {}) if with_pass2 else None,
            ),
        )
        return list(rollouts)

    def images(self) -> tuple[float, float]:
        """Return the seconds of a step's large images: one after the other, and read ahead.

        The first are those of the trainer's prompts and of vLLM's preprocessing of them.
        """
        samples, pad = self.samples["large"], self.engine._image_pad
        assert pad is not None
        samples.forget()
        started = time.thread_time()
        for index in range(NUM_PROMPTS):
            messages = samples.prompts.pass1_messages(samples.example(index))
            pictures = samples.images(index)
            grids = [samples.processor.grid(picture) for picture in pictures]
            ids = samples.processor.encode_text(messages, grids)
            self.engine._core.renderer.render_cmpl([as_vllm_takes(ids, pictures, pad[0])])
        serial = time.thread_time() - started
        started = time.thread_time()
        samples.pixels.start(range(NUM_PROMPTS))
        before = time.thread_time() - started
        samples.pixels.finish()
        started = time.thread_time()
        for index in range(NUM_PROMPTS):
            prompt = samples.prompt(index)
            vllm_api.engine_input(Request("a", prompt.token_ids, prompt.vision), pad)
        ahead = before + time.thread_time() - started
        samples.forget()
        return serial, ahead


def make_samples(directory: Path, model: Path, name: str, size: tuple[int, int]) -> Samples:
    """Write and open shards of questions about an image of this size each."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(NUM_PROMPTS):
        coarse = rng.integers(256, size=(size[1] // 14, size[0] // 14, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
        asked = Message("user", f"<image>Which digit of {number} is largest?")
        records.append(Record((asked,), "7", (buffer.getvalue(),)))
    write_shards(records, directory / name)
    settings = {
        "model.path": model,
        "model.dtype": "float32",
        "data.train": directory / name,
        "data.min_pixels": 784,
        "data.max_pixels": 2**20,
        "data.pass1_template": "brief",
        "data.pass2_template": "brief",
    }
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    return Samples(config, directory / name, make_processor(config))


def first_characters(text: str) -> str | None:
    """Return a description: the text up to a mark, once it is long enough."""
    return text if len(text) >= DESCRIPTION_CHARACTERS else None


def as_vllm_takes(
    token_ids: Sequence[int], images: Sequence[Image.Image], pad_id: int
) -> dict[str, Any]:
    """Return a prompt for vLLM's own preprocessing, with one pad per image."""
    ids = list(collapse(token_ids, pad_id))
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": list(images)}}


class Call(NamedTuple):
    """A measured call, in processor seconds of its thread."""

    started: float
    seconds: float


@contextmanager
def timed_calls(owner: Any, names: Sequence[str], calls: list[Call]) -> Iterator[None]:
    """Append every call of some methods to `calls`."""

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **keywords: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments, **keywords)
            finally:
                calls.append(Call(started, time.thread_time() - started))

        return measured

    for name in names:
        setattr(owner, name, wrapped(getattr(owner, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(owner, name)


def measure(bench: Bench, num_rounds: int) -> dict[str, Any]:
    """Measure in turn; return the least seconds of each, as other programs only add, and ratios."""
    bench.generate(), bench.roll(False), bench.roll(True), bench.images()  # kernels warm up
    bench.sequence_seconds()
    found: dict[str, list[float]] = {name: [] for name in ("generate_seconds", *SECONDS)}
    for _ in range(num_rounds):
        generate, (one, *_), (_, own, vllm) = bench.generate(), bench.roll(False), bench.roll(True)
        serial, ahead = bench.images()
        values = generate, one, own, vllm, ahead, serial
        for series, value in zip(found.values(), values, strict=True):
            series.append(value)
    generate, one, own, vllm, ahead, serial = least = [min(series) for series in found.values()]
    ratios = one / generate, own / vllm, ahead / serial
    sequence = statistics.median(bench.sequence_seconds() for _ in range(num_rounds))
    whole = dict(zip(found, least, strict=True)) | dict(zip(LIMITS, ratios, strict=True))
    return whole | {"sequence_step_seconds": sequence}


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Bench(Path(directory)), arguments.rounds)
    arguments.result.write_text(json.dumps(found, indent=2) + "\n")
    print(arguments.result.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
