"""A published Qwen2.5-VL configuration, read into frozen records; free of torch.

Both forms of `config.json` are read: flat, as on the hub (text keys at the top), and nested
(`text_config`, as transformers 5 writes it). What the model does not support (other rotary kinds,
sliding windows, other activations) is refused with the key's name, and so is a layout that does not
divide the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sr1.config.run import ParallelConfig
from megatron_sr1.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class TextConfig:
    """Shape of the language model.

    `vocab_size` is the published one, before padding; `mrope_section` holds the numbers of rotary
    frequencies for time, height and width, whose sum is head_dim / 2.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower.

    A patch has `patch_size` x `patch_size` pixels of `temporal_patch_size` frames; a square of
    `spatial_merge_size` x `spatial_merge_size` patches becomes one token, of width
    `out_hidden_size`. Blocks in `full_attention_blocks` attend over the whole image, the others
    within windows of `window_size` x `window_size` pixels.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    full_attention_blocks: tuple[int, ...]
    out_hidden_size: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Number of values in a flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_units(self) -> int:
        """Side of a window in merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class HFConfig:
    """A published model; each `image_token_id` in a row is replaced by an image feature."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    raw: Mapping[str, Any] = field(repr=False, hash=False)  # content of the file

    @property
    def tie_flags(self) -> dict[str, bool]:
        """Values of `tie_word_embeddings` in the file, by the place where each was found."""
        places = {"": self.raw, "text_config.": self.raw.get("text_config") or {}}
        key = "tie_word_embeddings"
        return {place + key: bool(found[key]) for place, found in places.items() if key in found}

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output layer is the embedding: true where any of `tie_flags` is."""
        return any(self.tie_flags.values())


def read_hf_config(directory: str | Path) -> HFConfig:
    """Read `config.json` of a Hugging Face directory.

    Raises CheckpointError if there is none, or it is not that of a Qwen2.5-VL; ConfigError if it
    requires something that the model does not support.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    if raw.get("model_type") != "qwen2_5_vl":
        raise CheckpointError(
            f"{path}: model_type is {raw.get('model_type')!r}; only 'qwen2_5_vl' is supported"
        )
    try:
        return parse_hf_config(raw)
    except KeyError as error:
        raise CheckpointError(f"{path}: key {error} is missing") from None
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: a value of the wrong kind: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_hf_config(raw: Mapping[str, Any]) -> HFConfig:
    """Parse the content of a `config.json`.

    Raises ConfigError if it requires something that the model does not support, and KeyError if a
    key without a safe default is missing.
    """
    text = _parse_text(raw.get("text_config") or raw)
    vision = _parse_vision(raw["vision_config"], text.hidden_size)
    if vision.out_hidden_size != text.hidden_size:
        raise ConfigError(
            f"vision_config.out_hidden_size is {vision.out_hidden_size}, the language model's "
            f"hidden_size {text.hidden_size}; they must be equal"
        )
    return HFConfig(text, vision, raw["image_token_id"], dict(raw))


def _parse_text(raw: Mapping[str, Any]) -> TextConfig:
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"rotary kind {kind!r} is not supported; expected 'default' or 'mrope'")
    if raw.get("use_sliding_window"):
        raise ConfigError("use_sliding_window=true is not supported; set it to false")
    _require_silu("hidden_act", raw)
    heads = raw["num_attention_heads"]
    text = TextConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 1e6))),
        mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
        max_position_embeddings=raw.get("max_position_embeddings", 32768),
    )
    if text.hidden_size % heads or heads % text.num_key_value_heads:
        raise ConfigError(
            f"hidden_size {text.hidden_size}, {heads} heads and {text.num_key_value_heads} "
            "key/value heads do not divide one another"
        )
    if len(text.mrope_section) != 3 or 2 * sum(text.mrope_section) != text.head_dim:
        raise ConfigError(
            f"mrope_section {list(text.mrope_section)} must be three numbers that sum to half of "
            f"head_dim, {text.head_dim // 2}"
        )
    return text


def _parse_vision(raw: Mapping[str, Any], text_hidden_size: int) -> VisionConfig:
    _require_silu("vision_config.hidden_act", raw)
    rope = raw.get("rope_parameters") or {}
    vision = VisionConfig(
        depth=raw["depth"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=raw["num_heads"],
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        patch_size=raw.get("patch_size", 14),
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        spatial_merge_size=raw.get("spatial_merge_size", 2),
        window_size=raw.get("window_size", 112),
        full_attention_blocks=tuple(raw.get("fullatt_block_indexes", (7, 15, 23, 31))),
        out_hidden_size=raw.get("out_hidden_size", text_hidden_size),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
    if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
        raise ConfigError(
            f"vision_config: hidden_size {vision.hidden_size} over {vision.num_heads} heads gives "
            "a head width that is not a multiple of 4, as the two-axis rotary embedding needs"
        )
    if vision.window_units < 1:
        raise ConfigError(
            f"vision_config.window_size {vision.window_size} is smaller than one merged token, "
            f"{vision.patch_size * vision.spatial_merge_size} pixels"
        )
    return vision


def _require_silu(name: str, raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{name} is {raw['hidden_act']!r}; expected 'silu'")


def check_layout(hf_config: HFConfig, parallel: ParallelConfig) -> None:
    """Raise a ConfigError if the layout does not divide the model."""
    text, vision, tensor = hf_config.text, hf_config.vision, parallel.tensor
    tower = 1 if parallel.vision == "images" else tensor
    for name, value, num_ranks in (
        ("num_attention_heads", text.num_attention_heads, tensor),
        ("num_key_value_heads", text.num_key_value_heads, tensor),
        ("intermediate_size", text.intermediate_size, tensor),
        ("vision num_heads", vision.num_heads, tower),
        ("vision intermediate_size", vision.intermediate_size, tower),
    ):
        if value % num_ranks:
            other = " or parallel.vision=images" if name.startswith("vision") else ""
            raise ConfigError(
                f"{name} is {value}, which parallel.tensor={tensor} does not divide; use a divisor"
                f"{other}"
            )
    num_stages, stage_layers = parallel.pipeline * parallel.virtual, parallel.stage_layers
    ranks = f"parallel.pipeline={parallel.pipeline} x virtual={parallel.virtual}"
    if not stage_layers and text.num_layers % num_stages:
        raise ConfigError(
            f"{text.num_layers} layers do not divide over {ranks} stages; use a divisor, or give "
            "the layers of each stage in parallel.stage_layers"
        )
    given = len(stage_layers), sum(stage_layers)
    if stage_layers and (given != (num_stages, text.num_layers) or min(stage_layers) < 1):
        raise ConfigError(
            f"parallel.stage_layers is {list(stage_layers)}: {given[0]} stages with "
            f"{given[1]} layers; expected {num_stages} numbers ({ranks}) of 1 or more "
            f"that add up to the model's {text.num_layers}"
        )
