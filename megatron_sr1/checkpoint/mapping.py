"""One table between Megatron's parameters and the tensors of a published Qwen2.5-VL.

Loading, export and weight sync use its entries, through transforms.py. Free of torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
ADAPTER_A, ADAPTER_B = "lora_A", "lora_B"
TOWER = "vision_model."  # the parameters of the vision tower begin so

# Norms before a linear layer, and their names in Transformer Engine's fused layer.
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}

COLUMN, ROW, WHOLE = 0, 1, None  # the dimension that is split over tensor-parallel ranks


@dataclass(frozen=True)
class Entry:
    """One parameter and the published tensors that it consists of.

    Attributes:
        name: of the parameter in the local specification, layers counted over the whole model.
        hf_names: of the tensors, in the order in which they are joined.
        hf_shapes: of the whole tensors.
        shard_dim: dimension split over tensor-parallel ranks, None if every rank has all of it.
        form: plain | flat (trailing dimensions flattened) | stacked (one part above the other) |
            grouped (q, k and v rows, by key/value head) | vocabulary (rows may be padded).
        num_groups: key/value heads of the whole model, for `grouped`.
        num_parts: equal parts that each tensor holds, one above the other: 3 for a published
            tensor of q, k and v together.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    shard_dim: int | None
    form: str = "plain"
    num_groups: int = 1
    num_parts: int = 1


# Parameter of a layer, published modules that have a tensor of the same kind (weight or bias), its
# shapes by dimension name, split, form.
_Row = tuple[str, tuple[str, ...], tuple[str, ...], int | None, str]
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")


_TEXT_LAYER: tuple[_Row, ...] = (
    ("input_layernorm.weight", ("input_layernorm",), ("h",), WHOLE, "plain"),
    ("self_attention.linear_qkv.weight", _QKV, ("q h", "k h", "k h"), COLUMN, "grouped"),
    ("self_attention.linear_qkv.bias", _QKV, ("q", "k", "k"), COLUMN, "grouped"),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj",), ("h q",), ROW, "plain"),
    ("pre_mlp_layernorm.weight", ("post_attention_layernorm",), ("h",), WHOLE, "plain"),
    ("mlp.linear_fc1.weight", _GATED, ("f h", "f h"), COLUMN, "stacked"),
    ("mlp.linear_fc2.weight", ("mlp.down_proj",), ("h f",), ROW, "plain"),
)
_VISION_LAYER: tuple[_Row, ...] = (
    ("input_layernorm.weight", ("norm1",), ("h",), WHOLE, "plain"),
    ("self_attention.linear_qkv.weight", ("attn.qkv",), ("3h h",), COLUMN, "grouped"),
    ("self_attention.linear_qkv.bias", ("attn.qkv",), ("3h",), COLUMN, "grouped"),
    ("self_attention.linear_proj.weight", ("attn.proj",), ("h h",), ROW, "plain"),
    ("self_attention.linear_proj.bias", ("attn.proj",), ("h",), WHOLE, "plain"),
    ("pre_mlp_layernorm.weight", ("norm2",), ("h",), WHOLE, "plain"),
    ("mlp.linear_fc1.weight", _GATED, ("f h", "f h"), COLUMN, "stacked"),
    ("mlp.linear_fc1.bias", _GATED, ("f", "f"), COLUMN, "stacked"),
    ("mlp.linear_fc2.weight", ("mlp.down_proj",), ("h f",), ROW, "plain"),
    ("mlp.linear_fc2.bias", ("mlp.down_proj",), ("h",), WHOLE, "plain"),
)
_MERGER: tuple[_Row, ...] = (
    ("norm.weight", ("ln_q",), ("h",), WHOLE, "plain"),
    ("linear_fc1.weight", ("mlp.0",), ("m m",), COLUMN, "plain"),
    ("linear_fc1.bias", ("mlp.0",), ("m",), COLUMN, "plain"),
    ("linear_fc2.weight", ("mlp.2",), ("o m",), ROW, "plain"),
    ("linear_fc2.bias", ("mlp.2",), ("o",), WHOLE, "plain"),
)


@lru_cache(maxsize=8)
def entries(config: HFConfig) -> tuple[Entry, ...]:
    """Return the entries of all parameters of a model, in the order of computation.

    With tied embeddings the output layer is not a parameter of its own and has no entry.
    """
    text, vision = config.text, config.vision
    text_dims = {
        "h": text.hidden_size,
        "q": text.num_attention_heads * text.head_dim,
        "k": text.num_key_value_heads * text.head_dim,
        "f": text.intermediate_size,
    }
    vision_dims = {
        "h": vision.hidden_size,
        "3h": 3 * vision.hidden_size,
        "f": vision.intermediate_size,
        "m": vision.hidden_size * vision.spatial_merge_size**2,
        "o": vision.out_hidden_size,
    }
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    patches = (vision.hidden_size, *patch)
    vocabulary = (text.vocab_size, text.hidden_size)
    patch_name = "visual.patch_embed.proj.weight"
    found = [Entry("vision_model.patch_embed.weight", (patch_name,), (patches,), WHOLE, "flat")]
    for i in range(vision.depth):
        names = f"vision_model.decoder.layers.{i}.", f"visual.blocks.{i}."
        found += [_entry(row, *names, vision_dims, vision.num_heads) for row in _VISION_LAYER]
    names = "vision_model.merger.", "visual.merger."
    found += [_entry(row, *names, vision_dims, 1) for row in _MERGER]
    found.append(Entry(EMBEDDING, (HF_EMBEDDING,), (vocabulary,), COLUMN, "vocabulary"))
    for i in range(text.num_layers):
        names = f"language_model.decoder.layers.{i}.", f"model.layers.{i}."
        groups = text.num_key_value_heads
        found += [_entry(row, *names, text_dims, groups) for row in _TEXT_LAYER]
    norm = "language_model.decoder.final_layernorm.weight"
    found.append(Entry(norm, ("model.norm.weight",), ((text.hidden_size,),), WHOLE))
    if not config.tie_word_embeddings:
        found.append(Entry(OUTPUT, (HF_OUTPUT,), (vocabulary,), COLUMN, "vocabulary"))
    return tuple(found)


def _entry(row: _Row, prefix: str, hf_prefix: str, dims: dict[str, int], groups: int) -> Entry:
    name, modules, shapes, shard_dim, form = row
    kind, grouped = name.rpartition(".")[2], form == "grouped"
    return Entry(
        name=prefix + name,
        hf_names=tuple(f"{hf_prefix}{module}.{kind}" for module in modules),
        hf_shapes=tuple(tuple(dims[d] for d in shape.split()) for shape in shapes),
        shard_dim=shard_dim,
        form=form,
        num_groups=groups if grouped else 1,
        num_parts=3 // len(modules) if grouped else 1,
    )


def is_frozen(entry: Entry, patterns: Sequence[str]) -> bool:
    """Return True if a pattern of `model.freeze` matches every tensor of a parameter."""
    return any(all(re.search(p, name) for name in entry.hf_names) for p in patterns)


def check_freeze(config: HFConfig, patterns: Sequence[str]) -> None:
    """Raise `ConfigError` if a pattern matches nothing, or only a part of a fused parameter."""
    for pattern in patterns:
        found = [e for e in entries(config) if any(re.search(pattern, n) for n in e.hf_names)]
        for entry in found:
            if not is_frozen(entry, [pattern]):
                raise ConfigError(
                    f"model.freeze: {pattern!r} matches some of {', '.join(entry.hf_names)}, which "
                    "are one parameter here; match all of them or none"
                )
        if not found:
            some = ", ".join(entry.hf_names[0] for entry in entries(config)[:3])
            raise ConfigError(f"model.freeze: {pattern!r} matches no parameter, as {some}, …")


def is_tower_frozen(config: HFConfig, patterns: Sequence[str]) -> bool:
    """Return True if nothing of the vision tower is trained."""
    return all(is_frozen(e, patterns) for e in entries(config) if e.name.startswith(TOWER))


def linear_modules(config: HFConfig) -> dict[str, Entry]:
    """Return the published linear layers that Megatron splits, each with its weight's entry."""
    return {
        name.removesuffix(".weight"): entry
        for entry in entries(config)
        if entry.shard_dim is not WHOLE and entry.form != "vocabulary"
        for name in entry.hf_names
        if name.endswith(".weight")
    }


def adapter_entries(
    config: HFConfig, targets: Sequence[str], rank: int
) -> dict[str, tuple[Entry, Entry]]:
    """Return the entries of A [rank, in] and B [out, rank] of each published linear layer.

    `targets` are regular expressions, searched for in the layers' names; the order is that of
    computation. A layer whose rows are split has A whole and B split on each rank, one whose
    columns are split the reverse. Raises `ConfigError` if an expression matches no layer.
    """
    modules = linear_modules(config)
    for pattern in targets:
        if not any(re.search(pattern, module) for module in modules):
            some = ", ".join(list(modules)[:3])
            raise ConfigError(f"adapter.targets: {pattern!r} matches no linear layer, as {some}, …")
    found = {}
    for module, base in modules.items():
        if any(re.search(pattern, module) for pattern in targets):
            (rows, columns), is_row = _shape_of(base, module), base.shard_dim == ROW
            name = f"{base.name.removesuffix('weight')}{module.rpartition('.')[2]}."
            a = Entry(
                name + ADAPTER_A, (f"{module}.{ADAPTER_A}.weight",), ((rank, columns),), WHOLE
            )
            b = Entry(name + ADAPTER_B, (f"{module}.{ADAPTER_B}.weight",), ((rows, rank),), COLUMN)
            if is_row:
                a, b = replace(a, shard_dim=ROW), replace(b, shard_dim=WHOLE)
            elif base.num_parts > 1:  # its rows are in the order of the fused layer
                b = replace(b, form=base.form, num_groups=base.num_groups, num_parts=base.num_parts)
            found[module] = a, b
    return found


def _shape_of(entry: Entry, module: str) -> tuple[int, ...]:
    return entry.hf_shapes[entry.hf_names.index(f"{module}.weight")]


def canonical_parameter(name: str, first_layer: int = 0) -> str:
    """Return the name that the entries have for a parameter of a chunk.

    Wrappers' prefixes and Transformer Engine's fused norms are translated; `first_layer` numbers
    the chunk's first decoder layer in the whole language model.
    """
    name = re.sub(r"^(module\.)+", "", name)
    for norm, fused in FUSED_NORMS.items():
        name = name.replace(fused, norm)
    found = re.match(r"language_model\.decoder\.layers\.(\d+)\.", name)
    if found:
        number = int(found[1]) + first_layer
        name = f"language_model.decoder.layers.{number}.{name[found.end() :]}"
    return name


def canonical_hf_name(name: str) -> str:
    """Return a tensor's published name; transformers 5 has other names in memory."""
    return re.sub(r"^model\.(?:language_(?=model\.)|(?=visual\.))", "", name)
