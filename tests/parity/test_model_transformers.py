"""The Megatron model computes what transformers computes, in float32 on random small models.

Not covered here: more than one rank (tests/distributed/test_model_layouts.py), bfloat16, CUDA.
"""

import pytest
import torch

from megatron_sr1.checkpoint.hf import load_hf
from megatron_sr1.checkpoint.mapping import canonical_hf_name
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.errors import DataError
from megatron_sr1.gpu_checks.numerics import published_gradients
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.model.qwen25_vl import build_model
from megatron_sr1.runtime import cpu
from tests.model_cases import make_row, worst_relative_gap, write_case

TOLERANCE = 1e-5
NUM_CASES = 20


def build(directory, groups, **options):
    hf_config = read_hf_config(directory)
    model = ModelConfig(**{"dtype": "float32", **options})
    chunks = build_model(hf_config, groups, model, ParallelConfig())
    load_hf(chunks, directory, hf_config, groups)
    return chunks[0]


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_logits_of_packed_rows_equal_transformers_one_sample_at_a_time(seed, tmp_path, groups):
    _, rows = write_case(tmp_path, seed)
    model = build(tmp_path, groups)
    with torch.no_grad(), cpu.megatron_mode():
        for samples in rows:
            logits = model(**make_row(samples).inputs)[0]
            expected = torch.cat([s.logits for s in samples])
            assert expected.abs().max() > 0.5
            assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("seed", "chunk_tokens"), [(0, 1024), (1, 7), (3, 16), (8, 5)])
def test_logprobs_and_their_gradients_equal_log_softmax_of_transformers(
    seed, chunk_tokens, tmp_path, groups
):
    reference, rows = write_case(tmp_path, seed)
    model = build(tmp_path, groups, logprob_chunk_tokens=chunk_tokens)
    samples = rows[2]
    row = make_row(samples)
    temperature = 0.7
    with cpu.megatron_mode():
        logprobs = model(**row.inputs, labels=row.labels, temperature=temperature)
        (logprobs * row.loss_mask).sum().backward()
    expected = reference_logprobs(reference, samples, temperature)
    assert (logprobs - expected)[:, row.loss_mask[0] > 0].abs().max() < TOLERANCE
    (expected * row.loss_mask).sum().backward()
    wanted = {canonical_hf_name(n): p.grad for n, p in reference.named_parameters()}
    found = published_gradients([model], model.hf_config, groups)
    gap, name = worst_relative_gap(found, {n: wanted[n] for n in found})
    assert gap < TOLERANCE, name


def reference_logprobs(reference, samples, temperature):
    """transformers' logprobs of each next token, sample by sample, 0 at the last: [1, T]."""
    found = []
    for sample in samples:
        images = {}
        if sample.pixel_values is not None:
            kind = (sample.token_ids == reference.config.image_token_id).int()[None]
            images = {"mm_token_type_ids": kind, "image_grid_thw": sample.image_grid_thw}
            images["pixel_values"] = sample.pixel_values
        logits = reference(input_ids=sample.token_ids[None], **images).logits[0]
        own = (logits[:-1] / temperature).log_softmax(dim=-1)
        found += [own.gather(1, sample.token_ids[1:, None])[:, 0], torch.zeros(1)]
    return torch.cat(found)[None]


def test_a_row_of_padding_and_samples_equals_the_samples_alone(tmp_path, groups):
    _, rows = write_case(tmp_path, 2)
    model = build(tmp_path, groups)
    with torch.no_grad(), cpu.megatron_mode():
        alone = [model(**make_row([s]).inputs)[0] for s in rows[2]]
        packed = model(**make_row(rows[2], pad_multiple=64).inputs)[0]
    assert len(packed) % 64 == 0
    expected = torch.cat(alone)
    assert (packed[: len(expected)] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("frozen", ["", "embed"])
def test_recomputation_leaves_gradients_as_they_are(recompute, frozen, tmp_path, groups):
    _, rows = write_case(tmp_path, 4)
    gradients = []
    for mode in ("none", recompute):
        model = build(tmp_path, groups, recompute=mode)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and frozen in name))
        with cpu.megatron_mode():
            for row in (make_row(rows[0]), make_row(rows[1])):  # images, then text alone
                logprobs = model(**row.inputs, labels=row.labels)
                (logprobs * row.loss_mask).sum().backward()
        gradients.append(published_gradients([model], model.hf_config, groups))
    gap, name = worst_relative_gap(*gradients)
    assert gap < 1e-6, name


def test_bfloat16_stays_near_float32_and_has_gradients_everywhere(tmp_path, groups):
    _, rows = write_case(tmp_path, 16)
    row, found = make_row(rows[0]), []
    for dtype in ("float32", "bfloat16"):
        hf_config = read_hf_config(tmp_path)
        chunks = build_model(hf_config, groups, ModelConfig(dtype=dtype), ParallelConfig())
        load_hf(chunks, tmp_path, hf_config, groups)
        with cpu.megatron_mode():
            found.append(chunks[0](**row.inputs, labels=row.labels))
            (found[-1] * row.loss_mask).sum().backward()
    assert found[1].dtype == torch.float32
    assert (found[0] - found[1]).abs().max() < 0.3
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in chunks[0].parameters())
    assert all(p.grad.abs().max() > 0 for p in chunks[0].parameters())


def test_a_weight_that_was_not_loaded_gives_nan(tmp_path, groups):
    _, rows = write_case(tmp_path, 1)
    model = build(tmp_path, groups)
    fresh = build_model(model.hf_config, groups, ModelConfig(dtype="float32"), ParallelConfig())[0]
    for name in (
        "vision_model.merger.norm.weight",
        "language_model.decoder.layers.0.mlp.linear_fc2.weight",
    ):  # noqa: E501
        kept = model.get_parameter(name).data
        model.get_parameter(name).data = fresh.get_parameter(name).data
        with torch.no_grad(), cpu.megatron_mode():
            assert model(**make_row(rows[0]).inputs).isnan().any()
        model.get_parameter(name).data = kept


def test_image_pads_and_features_that_do_not_match_are_refused(tmp_path, groups):
    _, rows = write_case(tmp_path, 1)
    model = build(tmp_path, groups)
    inputs = make_row(rows[0]).inputs
    ids = inputs["input_ids"].clone()
    ids[0, 0] = model.hf_config.image_token_id
    with torch.no_grad(), cpu.megatron_mode():
        with pytest.raises(DataError, match="features"):
            model(**{**inputs, "input_ids": ids})
        with pytest.raises(DataError, match="no images were given"):
            model(**{**inputs, "vision": None})
