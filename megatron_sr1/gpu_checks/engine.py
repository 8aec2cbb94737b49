"""The vLLM engine beside the actor: start, sampling, sync, sleep and wake, and agreement of both.

Engine and actor are in one process and in bfloat16, as in a run. Prompts have images of noise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.gpu_checks.bench import GIB, Bench
from megatron_sr1.gpu_checks.rows import Row, at_least, at_most, fact
from megatron_sr1.records import Completion, Example, Message, Prompt, TrainSample, VisionInputs
from megatron_sr1.rollout.engine import Engine, Request
from megatron_sr1.trainer.actor import Actor
from megatron_sr1.trainer.sft import token_loss
from megatron_sr1.trainer.step import sample_logprobs, update

START_SECONDS = 240.0
MEAN_GAP, LARGEST_GAP = 0.03, 0.5
"""Nats between engine and actor on sampled tokens, in bfloat16."""
SYNC_RATE = 5e9
"""Bytes per second; a copy on an H100 has 1e12, the rest is Python for each tensor."""
LEAK_BYTES = 2**27
NUM_CYCLES = 3
NUM_SCORED = 16
IMAGE_SIZES = ((224, 168), (112, 336), (280, 196))
"""Width and height, pixels; within the limits of the model that is made here."""


class Rollouts:
    """Actor, engine and requests."""

    def __init__(self, bench: Bench) -> None:
        """Load the actor, then start the engine beside it, as a run does."""
        self.bench, sizes = bench, bench.sizes
        self.actor: Actor = bench.actor(bench.config())
        self.processor = Processor(bench.model_dir, 784, 200704, dtype="bfloat16")
        length = sizes.sampled_tokens + 512
        settings = RolloutConfig(
            max_model_len=length,
            max_num_seqs=sizes.num_requests,
            gpu_memory_utilization=0.4,
            sleep_level=2,
        )
        self.engine = Engine(
            bench.model_dir,
            settings,
            self.processor,
            device_kind=bench.kind,
            dtype="bfloat16",
        )
        self.prompts = [self.prompt(index) for index in range(max(sizes.num_requests // 8, 2))]

    def prompt(self, index: int) -> Prompt:
        """Return a question about an image of noise."""
        width, height = IMAGE_SIZES[index % len(IMAGE_SIZES)]
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        text = f"Which digit is largest? {index}"
        example = Example(index, str(index), "", (Message("user", f"<image>{text}"),), "7", 1)
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": parts}]
        vision = self.processor.vision([Image.fromarray(pixels)])
        return self.processor.encode_prompt(example, vision, messages)

    def requests(self, number: int, max_tokens: int) -> list[Request]:
        """Return requests with seeds, several for each prompt."""
        return [
            Request(str(k), prompt.token_ids, prompt.vision, max_tokens=max_tokens, seed=k)
            for k in range(number)
            for prompt in [self.prompts[k % len(self.prompts)]]
        ]

    def sync(self, version: int) -> None:
        """Stream the actor's weights into the engine."""
        self.engine.sync(self.actor.weights(), version)

    def gaps(self, found: Sequence[Completion]) -> np.ndarray:
        """Return |engine - actor| of each sampled token's logprob, nats."""
        samples = [self.sample(number, one) for number, one in enumerate(found)]
        rows = self.bench.rows(samples, vision=self.vision)
        own = sample_logprobs(self.actor, samples, rows, 1.0)
        engine = np.concatenate([one.logprobs for one in found])
        actor = np.concatenate(
            [row[-len(one.token_ids) :] for row, one in zip(own, found, strict=True)]
        )
        return np.abs(engine - actor)

    def sample(self, number: int, completion: Completion) -> TrainSample:
        """Return the sequence of a request's prompt and response."""
        prompt = self.prompts[number % len(self.prompts)]
        token_ids = np.array((*prompt.token_ids, *completion.token_ids), np.int64)
        mask = np.arange(len(token_ids)) >= len(prompt.token_ids)
        index = number % len(self.prompts)
        return TrainSample(index, 1, token_ids, mask, prompt.image_grid_thw)

    def vision(self, index: int) -> VisionInputs:
        """Return the pixels of a prompt's image."""
        vision = self.prompts[index].vision
        assert vision is not None
        return vision


def engine(bench: Bench) -> Iterator[Row]:
    """Start an engine and measure what a rollout needs of it."""
    started = time.monotonic()
    run = Rollouts(bench)
    slow = "compiling or capturing CUDA graphs takes long: rollout.enforce_eager=true avoids both"
    yield at_most("start of actor and engine", time.monotonic() - started, START_SECONDS, slow, "s")
    found = run.engine.generate(run.requests(NUM_SCORED, bench.sizes.sampled_tokens))
    yield from _agreement(run, "before the first sync", found)
    yield from sampling(run)
    yield from sync(run)
    again = run.engine.generate(run.requests(NUM_SCORED, bench.sizes.sampled_tokens))
    yield from _agreement(run, "after an update and a sync", again)
    yield from sleep(run)


def _agreement(run: Rollouts, when: str, found: Sequence[Completion]) -> Iterator[Row]:
    gaps = run.gaps(found)
    wrong = f"{when}, engine and actor do not hold the same model: rewards would be off-policy"
    note = f"{len(gaps)} tokens"
    yield at_most(f"engine and actor, {when}: mean", gaps.mean(), MEAN_GAP, wrong, "nats", note)
    yield at_most(f"engine and actor, {when}: largest", gaps.max(), LARGEST_GAP, wrong, "nats")


def sampling(run: Rollouts) -> Iterator[Row]:
    """Measure sampling with all slots filled; tokens are those of the seeds, in any order."""
    engine, sizes = run.engine, run.bench.sizes
    requests = run.requests(sizes.num_requests, sizes.sampled_tokens)
    before, started = engine.num_steps, time.perf_counter()
    forwards = engine.generate(requests)
    seconds = time.perf_counter() - started
    steps = engine.num_steps - before
    tokens = sum(len(one.token_ids) for one in forwards)
    note = f"{sizes.num_requests} requests, {steps} steps"
    yield fact("sampled tokens a second", tokens / seconds, note=note)
    yield fact("time of an engine step", 1000 * seconds / steps, "ms")
    backwards = engine.generate(requests[::-1])[::-1]
    pairs = zip(forwards, backwards, strict=True)
    same = sum(a.token_ids == b.token_ids for a, b in pairs) / len(requests)
    note = "rounding that depends on the batch flips tokens in bfloat16"
    yield fact("share of responses equal in another order", same, note=note)


def sync(run: Rollouts) -> Iterator[Row]:
    """Update the actor; then measure a weight sync beside a copy of the same bytes."""
    bench = run.bench
    update(run.actor, bench.rows(bench.samples()), token_loss, 1.0)
    run.sync(1)
    seconds = bench.seconds(lambda: run.sync(2))
    size, copying = copy_seconds(bench, [tensor for _, tensor in run.actor.weights()])
    note = f"{size:,} bytes in {seconds:.4g} s, a copy in {copying:.4g} s"
    if bench.kind == "cpu":
        yield fact("weight sync", size / seconds / 1e9, "GB/s", note)
        return
    slow = "a sync of a whole model takes seconds of every step"
    yield at_least("weight sync", size / seconds / 1e9, SYNC_RATE / 1e9, slow, "GB/s", note)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run.sync(3)
    extra = torch.cuda.max_memory_allocated() - before
    yield fact("memory of a sync beside the weights", extra / GIB, "GiB")


def copy_seconds(bench: Bench, tensors: Sequence[torch.Tensor]) -> tuple[int, float]:
    """Return the bytes of tensors, and the seconds of a copy of them."""
    targets = [torch.empty_like(tensor) for tensor in tensors]

    def copy() -> None:
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor.detach())

    copy()
    return sum(t.numel() * t.element_size() for t in tensors), bench.seconds(copy)


def sleep(run: Rollouts) -> Iterator[Row]:
    """Put the engine to sleep and wake it; memory comes back, and so do weights with a sync."""
    bench, engine = run.bench, run.engine
    requests = run.requests(NUM_SCORED, bench.sizes.sampled_tokens)
    free: list[int] = []
    for cycle in range(NUM_CYCLES):
        awake = free_bytes(bench)
        started = time.perf_counter()
        engine.sleep()
        slept = time.perf_counter()
        bench.release()
        free.append(free_bytes(bench))
        if cycle == 0 and bench.kind == "cuda":
            wrong = "sleep does not free the engine's memory: an update has no room"
            yield at_least("freed by sleep", (free[0] - awake) / GIB, 1.0, wrong, "GiB")
        waking = time.perf_counter()
        engine.wake()
        yield fact(f"sleep {cycle + 1}", slept - started, "s")
        yield fact(f"wake {cycle + 1}", time.perf_counter() - waking, "s")
        run.sync(10 + cycle)
        found = engine.generate([replace(r, id=f"{cycle}/{r.id}") for r in requests])
    yield from _agreement(run, "after sleep, wake and sync", found)
    if bench.kind == "cuda":
        wrong = "each cycle keeps memory: a long run ends without any"
        lost = (max(free) - min(free)) / GIB
        yield at_most("memory lost over the cycles", lost, LEAK_BYTES / GIB, wrong, "GiB")


def free_bytes(bench: Bench) -> int:
    """Return the free memory of the device; 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] if bench.kind == "cuda" else 0
