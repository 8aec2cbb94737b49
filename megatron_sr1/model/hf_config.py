"""A published Qwen2.5-VL configuration, read once into frozen records.

In: `config.json` of a Hugging Face directory, flat (as on the hub: text keys at the top) or nested
(`text_config`, as transformers 5 writes). Out: `HFConfig`. What the model cannot do (other rotary
kinds, sliding windows, other activations) is refused here, by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sr1.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class TextConfig:
    """The language model.

    Attributes:
        vocab_size: rows of the embedding as published, before any padding.
        hidden_size: width.
        intermediate_size: width of the gated MLP.
        num_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads, a divisor of the query heads.
        rms_norm_eps: epsilon of all norms.
        rope_theta: rotary base.
        mrope_section: frequencies that turn by (time, height, width); sums to head_dim / 2.
        max_position_embeddings: longest context, tokens.
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
    """The vision tower.

    Attributes:
        depth: blocks.
        hidden_size: width.
        intermediate_size: width of the gated MLP.
        num_heads: attention heads.
        in_channels: of the image.
        patch_size: side of a patch, pixels.
        temporal_patch_size: frames in a patch.
        spatial_merge_size: side of the square of patches that becomes one token.
        window_size: side of an attention window, pixels.
        full_attention_blocks: blocks that attend over the whole image.
        out_hidden_size: width of the features handed on, the language model's.
        rope_theta: rotary base.
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
        """Values in a flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_units(self) -> int:
        """Side of a window, merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class HFConfig:
    """A model as its publisher describes it.

    Attributes:
        text: the language model.
        vision: the vision tower.
        image_token_id: stands for one image feature in the token row.
        video_token_id: the same for video; never accepted here.
        vision_start_token_id: opens an image.
        vision_end_token_id: closes an image.
        tie_word_embeddings: the output layer is the embedding; true where any of `tie_flags` is.
        raw: the whole file.
    """

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    raw: Mapping[str, Any] = field(repr=False, hash=False)

    @property
    def tie_flags(self) -> dict[str, bool]:
        """Values of `tie_word_embeddings` in the file, by the place where each was found."""
        return _tie_flags(self.raw)


def read_hf_config(directory: str | Path) -> HFConfig:
    """Read `config.json` of a Hugging Face directory.

    Args:
        directory: holds `config.json`.

    Returns:
        the configuration.

    Raises:
        CheckpointError: no `config.json`, or it is not a Qwen2.5-VL's.
        ConfigError: it asks for something that the model cannot do.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
    """Make the records of a `config.json` that is already a mapping.

    Raises:
        ConfigError: it asks for something that the model cannot do.
        KeyError: a key without a safe default is missing.
    """
    text_raw = raw.get("text_config") or raw
    text = _parse_text(text_raw)
    vision = _parse_vision(raw["vision_config"], text.hidden_size)
    if vision.out_hidden_size != text.hidden_size:
        raise ConfigError(
            f"vision_config.out_hidden_size is {vision.out_hidden_size}, the language model's "
            f"hidden_size {text.hidden_size}; they must be equal"
        )
    return HFConfig(
        text=text,
        vision=vision,
        image_token_id=raw["image_token_id"],
        video_token_id=raw.get("video_token_id", -1),
        vision_start_token_id=raw.get("vision_start_token_id", -1),
        vision_end_token_id=raw.get("vision_end_token_id", -1),
        tie_word_embeddings=any(_tie_flags(raw).values()),
        raw=dict(raw),
    )


def _tie_flags(raw: Mapping[str, Any]) -> dict[str, bool]:
    places = {"": raw, "text_config.": raw.get("text_config") or {}}
    key = "tie_word_embeddings"
    return {place + key: bool(found[key]) for place, found in places.items() if key in found}


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


def check_layout(
    hf_config: HFConfig,
    *,
    tensor: int = 1,
    tower: int = 1,
    pipeline: int = 1,
    virtual_stages: int = 1,
    stage_layers: Sequence[int] = (),
    sequence_parallel: bool = False,
) -> None:
    """Refuse a layout that does not divide the model.

    Args:
        hf_config: shape of the model.
        tensor: tensor-parallel ranks.
        tower: ranks that share each layer of the tower.
        pipeline: ranks of the pipeline.
        virtual_stages: of each of them.
        stage_layers: layers of each stage; empty for equally many.
        sequence_parallel: whether rows are split too.

    Raises:
        ConfigError: naming what does not divide.
    """
    text, vision = hf_config.text, hf_config.vision
    parts = {
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "intermediate_size": text.intermediate_size,
    }
    tower_parts = {
        "vision num_heads": vision.num_heads,
        "vision intermediate_size": vision.intermediate_size,
    }
    for name, value in (parts | tower_parts).items():
        of_tower = name in tower_parts
        if value % (tower if of_tower else tensor):
            other = " or parallel.vision=images" if of_tower else ""
            raise ConfigError(
                f"{name} is {value}, which parallel.tensor={tensor} does not divide; use a divisor"
                f"{other}"
            )
    _check_stages(text.num_layers, pipeline, virtual_stages, stage_layers)
    if sequence_parallel and tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of 2 or more")


def _check_stages(
    num_layers: int, pipeline: int, virtual_stages: int, stage_layers: Sequence[int]
) -> None:
    """Refuse a pipeline that the layers do not fill."""
    num_stages = pipeline * virtual_stages
    ranks = f"parallel.pipeline={pipeline}"
    ranks += f" x virtual={virtual_stages}" if virtual_stages > 1 else ""
    if not stage_layers and num_layers % num_stages:
        raise ConfigError(
            f"{num_layers} layers do not divide over {ranks} stages; use a divisor, or name the "
            "layers of each stage in parallel.stage_layers"
        )
    if stage_layers and (
        len(stage_layers) != num_stages or sum(stage_layers) != num_layers or min(stage_layers) < 1
    ):
        raise ConfigError(
            f"parallel.stage_layers is {list(stage_layers)}: {len(stage_layers)} stages with "
            f"{sum(stage_layers)} layers; expected {num_stages} numbers ({ranks}) of 1 or more "
            f"that add up to the model's {num_layers}"
        )
