"""Adapters of random models and PEFT's own numbers for them."""

import random
import re

import torch

from megatron_sr1.checkpoint.mapping import canonical_hf_name, linear_modules
from megatron_sr1.config.adapter import AdapterConfig
from tests.model_cases import write_case

ALL = [r"^model[.]layers[.].*_proj$", r"^visual[.]blocks.*(qkv|proj)$", "merger.mlp"]
TARGETS = [
    ALL,
    [r"layers.*[qv]_proj"],  # parts of a fused layer
    [r"layers.*(k|gate|down)_proj", r"visual.*qkv", r"merger[.]mlp[.]2"],
    [r"^model[.]layers[.]1[.].*up_proj", "visual[.].*mlp[.]down_proj"],
]


def settings_of(seed, **more):
    """Settings of a case, different by seed: all layers or some, both scales, ranks."""
    rng = random.Random(seed)
    rank = rng.choice([1, 3, 4, 8])
    given = {
        "rank": rank,
        "alpha": rank * rng.choice([0.5, 1.0, 2.0]),
        "scaling": rng.choice(["standard", "rslora"]),
        "targets": TARGETS[seed % len(TARGETS)],
    }
    return AdapterConfig(**given | more)


def with_peft(model, hf_config, settings, seed=0):
    """PEFT's model around transformers' own, with A and B that are not zero; their values."""
    from peft import LoraConfig, get_peft_model

    ours = [m for m in linear_modules(hf_config) if any(re.search(p, m) for p in settings.targets)]
    named = {canonical_hf_name(name): name for name, _ in model.named_modules()}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.scaling == "rslora",
        target_modules=[named[module] for module in ours],
    )
    found = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in found.named_parameters():
        if ".lora_" in name:
            value = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.3 * value / parameter.shape[1] ** 0.5)
            tensors[published(name)] = parameter.data.clone()
    assert len(tensors) == 2 * len(ours)
    return found, tensors


def published(name):
    """The name here of one of PEFT's parameters, without its wrappers."""
    name = name.removeprefix("base_model.model.").replace(".default.", ".")
    return canonical_hf_name(name)


def write_adapted(directory, seed, **more):
    """A random model in a directory, PEFT's around it, its adapters, and rows of samples."""
    from megatron_sr1.model.hf_config import read_hf_config

    model, rows = write_case(directory, seed)
    settings = settings_of(seed, **more)
    peft, tensors = with_peft(model, read_hf_config(directory), settings, seed)
    return peft, rows, settings, tensors


def logits_of(model, samples):
    """A model's logits for samples, one after the other, [tokens, ids]."""
    found = []
    for sample in samples:
        images = {}
        if sample.pixel_values is not None:
            kind = (sample.token_ids == model.config.image_token_id).int()[None]
            images = {"mm_token_type_ids": kind, "image_grid_thw": sample.image_grid_thw}
            images["pixel_values"] = sample.pixel_values
        found.append(model(input_ids=sample.token_ids[None], **images).logits[0])
    return torch.cat(found)


def reference_logprobs(model, samples, temperature):
    """Logprobs of each next token, sample by sample, 0 at the last: [1, T]."""
    found = []
    for sample in samples:
        own = (logits_of(model, [sample])[:-1] / temperature).log_softmax(dim=-1)
        found += [own.gather(1, sample.token_ids[1:, None])[:, 0], torch.zeros(1)]
    return torch.cat(found)[None]
