"""Logits and gradients of the actor beside those of transformers, and of TE's layers beside ours.

A gap is |found - expected| over |expected|, by norm; expected is float32, without TF32. In bfloat16
there is no fixed limit: ours may be as far from float32 as transformers' is, with a margin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sr1.checkpoint.hf import export_weights, load_hf
from megatron_sr1.checkpoint.mapping import canonical_hf_name
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.gpu_checks.bench import Bench
from megatron_sr1.gpu_checks.rows import ERROR, Row, at_most, fact
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.model.layers import kernels
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.model.transformer_config import text_transformer_config
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Groups
from megatron_sr1.trainer.step import to_device

FLOAT32_LIMIT = 1e-4
"""TF32 would be at 3e-4 and more, a wrong kernel far beyond."""
BF16_MARGIN = 1.5
FP8_LIMIT = 0.25
"""A product in e4m3 has a relative error of a few percent; layers add up."""
NORM_LIMIT = 1e-2
"""Rounding of a result to bfloat16 is 2e-3."""
NUM_SAMPLES = 4
RECIPES = ("current", "blockwise", "delayed")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """Results of one model on the samples of a row.

    Attributes:
        logits: [tokens, vocabulary] float32, of all samples, one after the other.
        gradients: of the targets' logprobs, summed, by published name.
    """

    logits: torch.Tensor
    gradients: Tensors

    def gaps(self, expected: Measured) -> tuple[float, float]:
        """Return the gaps of logits and of gradients."""
        return self.distances(expected)[:2]

    def distances(self, expected: Measured) -> tuple[float, float, str]:
        """Return the gaps of logits and of gradients, and the name of the farthest gradient."""
        by_name = {
            name: (float((self.gradients[name].float() - want.float()).norm()), float(want.norm()))
            for name, want in expected.gradients.items()
        }
        far = max(by_name, key=lambda name: by_name[name][0] / max(by_name[name][1], 1e-12))
        lost, whole = (sum(norms[i] ** 2 for norms in by_name.values()) ** 0.5 for i in (0, 1))
        return gap(self.logits, expected.logits), lost / whole, far


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |found - expected| / |expected|."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def actor(bench: Bench) -> Iterator[Row]:
    """Compare our actor with transformers' model in float32 and in bfloat16."""
    torch.backends.cudnn.allow_tf32 = False  # transformers embeds patches by a convolution
    samples = bench.samples(NUM_SAMPLES)
    expected = measure_transformers(bench, samples, "float32")
    found = measure_actor(bench, samples, ModelConfig(dtype="float32"))
    logits, gradients, far = found.distances(expected)
    del found
    wrong = "float32 products use TF32, or a kernel is wrong; compare attention below"
    yield at_most("float32 logits, from transformers'", logits, FLOAT32_LIMIT, wrong)
    yield at_most("float32 gradients", gradients, FLOAT32_LIMIT, wrong, note=f"farthest {far}")
    theirs = measure_transformers(bench, samples, "bfloat16").gaps(expected)
    bench.release()
    ours = measure_actor(bench, samples, ModelConfig(dtype="bfloat16")).gaps(expected)
    wrong = "our layers lose more to rounding than transformers'; look for a bfloat16 sum"
    for name, mine, others in zip(("logits", "gradients"), ours, theirs, strict=True):
        note = f"transformers' {others:.2g}"
        limit = BF16_MARGIN * others
        yield at_most(f"bfloat16 {name}, from float32", mine, limit, wrong, note=note)


def transformer_engine(bench: Bench) -> Iterator[Row]:
    """Compare Transformer Engine's layers with ours, in bfloat16, then its FP8 recipes with it."""
    samples = bench.samples(NUM_SAMPLES)
    expected = measure_actor(bench, samples, ModelConfig(dtype="float32"))
    seconds: dict[str, float] = {}
    ours = measure_actor(bench, samples, ModelConfig(), seconds).gaps(expected)
    bench.release()
    fused = measure_actor(bench, samples, ModelConfig(spec="transformer_engine"), seconds)
    wrong = "Transformer Engine's attention, norms or layout of a packed row differ from ours"
    for name, mine, others in zip(("logits", "gradients"), fused.gaps(expected), ours, strict=True):
        limit, note = BF16_MARGIN * others, f"local layers {others:.2g}"
        yield at_most(f"bfloat16 {name}, from float32", mine, limit, wrong, note=note)
    del fused
    local, base = seconds.values()
    name = "forward and backward pass over local layers'"
    slow = "fused layers are no faster here: model.spec=local will do"
    yield at_most(name, base / local, 1.0, slow, note=f"{base:.4g} s")
    yield from _norms(bench)
    for recipe in RECIPES:
        bench.release()
        yield from _fp8(bench, samples, recipe, expected, base)


def _norms(bench: Bench) -> Iterator[Row]:
    """Compare Transformer Engine's norm with ours, in bfloat16, forward and backward."""
    width, eps = bench.hf_config.text.hidden_size, bench.hf_config.text.rms_norm_eps
    model = ModelConfig()
    config = text_transformer_config(bench.hf_config, bench.groups, model, ParallelConfig())
    generator = torch.Generator(bench.device).manual_seed(3)
    shape = bench.sizes.pack_tokens, 1, width
    hidden = torch.randn(shape, device=bench.device, generator=generator).bfloat16()
    results, seconds = [], []
    for spec in ("local", "transformer_engine"):
        norm = kernels(spec).norm(config, width, eps)
        given = hidden.clone().requires_grad_()

        def run(norm: Any = norm, given: torch.Tensor = given) -> list[torch.Tensor]:
            result = norm(given)
            return [result, *torch.autograd.grad(result, [given, norm.weight], hidden)[:1]]

        results.append(run())
        seconds.append(bench.seconds(run, calls=10))
    ours, fused = results
    wrong = "Transformer Engine's norm is not ours: compare versions"
    off = max(gap(a, b) for a, b in zip(fused, ours, strict=True))
    yield at_most("norm, off ours", off, NORM_LIMIT, wrong)
    yield fact("norm, forward and backward over ours", seconds[1] / seconds[0])


def _fp8(
    bench: Bench, samples: Sequence[TrainSample], recipe: str, expected: Measured, base: float
) -> Iterator[Row]:
    """Compare an FP8 recipe with float32; one that this GPU or this release lacks is a row."""
    settings = {"spec": "transformer_engine", "fp8": "hybrid", "fp8_recipe": recipe}
    seconds: dict[str, float] = {}
    try:
        found = measure_actor(bench, samples, ModelConfig(**settings), seconds)  # type: ignore[arg-type]
    except Exception as error:  # any recipe may be refused, by Megatron, TE or the GPU
        meaning = "do not set this model.fp8_recipe here"
        yield Row(f"FP8 {recipe}", ERROR, meaning=meaning, note=str(error).splitlines()[0][:200])
        return
    logits, gradients, far = found.distances(expected)
    wrong = f"model.fp8_recipe={recipe} is not accurate enough to train with"
    yield at_most(f"FP8 {recipe}: logits, from float32", logits, FP8_LIMIT, wrong)
    yield fact(f"FP8 {recipe}: gradients, from float32", gradients, note=f"farthest {far}")
    (used,) = seconds.values()
    yield fact(f"FP8 {recipe}: forward and backward pass over bfloat16's", used / base)


def measure_actor(
    bench: Bench,
    samples: Sequence[TrainSample],
    model: ModelConfig,
    seconds: dict[str, float] | None = None,
) -> Measured:
    """Run our model on the samples, packed into one row; add the seconds of both passes."""
    (row,) = bench.rows(samples, budget=2**30)
    hf_config, groups = bench.hf_config, bench.groups
    chunks = build_model(hf_config, groups, model, ParallelConfig())
    load_hf(chunks, bench.model_dir, hf_config, groups)
    batch = to_device(row, bench.device)
    inputs = {n: getattr(batch, n) for n in ("input_ids", "position_ids", "cu_seqlens", "vision")}
    for _ in range(
        3 if model.fp8 else 1
    ):  # scales of the `delayed` recipe come from earlier passes
        _backward(chunks[0], inputs, batch)
    if seconds is not None:
        name = f"{model.spec} {model.fp8_recipe if model.fp8 else ''}"
        seconds[name] = bench.seconds(lambda: _backward(chunks[0], inputs, batch))
    _backward(chunks[0], inputs, batch)
    with torch.no_grad(), cpu.megatron_mode():
        logits = chunks[0](**inputs)[0]
    total = sum(len(sample.token_ids) for sample in samples)  # the rest of the row is padding
    return Measured(logits[:total].clone(), published_gradients(chunks, hf_config, groups))


def _backward(chunk: Any, inputs: dict[str, Any], batch: PackedBatch) -> None:
    for parameter in chunk.parameters():
        parameter.grad = None
    with cpu.megatron_mode():
        wanted = batch.loss_mask != 0
        (chunk(**inputs, labels=batch.labels, wanted=wanted) * batch.loss_mask).sum().backward()


def measure_transformers(bench: Bench, samples: Sequence[TrainSample], dtype: str) -> Measured:
    """Run transformers' model on the samples, one at a time."""
    cpu.patch_torchvision()
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        bench.model_dir, dtype=getattr(torch, dtype)
    )
    model, logits = model.to(bench.device).eval(), []
    for sample in samples:
        found = transformers_logits(bench, model, sample)
        logits.append(found.detach())
        targets = torch.from_numpy(sample.token_ids[1:]).to(bench.device)[:, None]
        own = found[:-1].log_softmax(dim=-1).gather(1, targets)[:, 0]
        own[torch.from_numpy(sample.loss_mask[1:]).to(bench.device)].sum().backward()
    gradients = {
        canonical_hf_name(name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Measured(torch.cat(logits), gradients)


def transformers_logits(bench: Bench, model: Any, sample: TrainSample) -> torch.Tensor:
    """Return transformers' logits of a sample, [tokens, vocabulary] float32."""
    ids = torch.from_numpy(sample.token_ids).to(bench.device)[None]
    images: dict[str, Any] = {}
    if sample.num_images:
        vision = bench.vision(sample.index)
        images["pixel_values"] = vision.pixel_values.to(bench.device)
        images["image_grid_thw"] = vision.image_grid_thw.to(bench.device)
        images["mm_token_type_ids"] = (ids == bench.hf_config.image_token_id).int()
    return model(input_ids=ids, use_cache=False, **images).logits[0].float()


def published_gradients(chunks: Sequence[Any], hf_config: HFConfig, groups: Groups) -> Tensors:
    """Return gradients under their published names, gathered as weights are exported.

    Replicated parameters come from this rank, so each rank compares its own copy.
    """
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    kept = [p.data for p in parameters]
    for parameter in parameters:
        gradient = getattr(parameter, "main_grad", parameter.grad)
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    weights = export_weights(chunks, hf_config, groups)
    gradients = {name: weight.clone() for name, weight in weights}
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data = data
    return gradients
