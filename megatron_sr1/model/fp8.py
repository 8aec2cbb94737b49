"""Transformer Engine's FP8 as Megatron-Core is told of it.

In: the configuration's words. Out: fields of Megatron's TransformerConfig, for the linear layers of
the language model; the tower, the embedding and the output layer stay in the activations' type.
Megatron turns the recipe into one of Transformer Engine's (megatron/core/fp8_utils.py).
"""

from __future__ import annotations

from typing import Any

from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_align_size

from megatron_sr1.errors import ConfigError

RECIPES = {
    "delayed": Fp8Recipe.delayed,
    "current": Fp8Recipe.tensorwise,
    "blockwise": Fp8Recipe.blockwise,
    "mxfp8": Fp8Recipe.mxfp8,
}
"""`model.fp8_recipe` to Megatron's name. In Transformer Engine these are DelayedScaling,
Float8CurrentScaling, Float8BlockScaling and MXFP8BlockScaling."""


def fp8_settings(
    fp8: str | None,
    recipe: str,
    bf16_layers: tuple[int, int],
    *,
    num_layers: int,
    num_stages: int,
) -> dict[str, Any]:
    """Fields of Megatron's configuration.

    Args:
        fp8: hybrid | e4m3, or None.
        recipe: a key of `RECIPES`.
        bf16_layers: so many first and last layers stay in bfloat16.
        num_layers: of the language model.
        num_stages: ranks of the pipeline.

    Raises:
        ConfigError: more layers in bfloat16 than Megatron takes.
    """
    if fp8 is None:
        return {}
    most = num_layers // num_stages
    if max(bf16_layers) > most:
        raise ConfigError(
            f"model.bf16_layers_at_start={bf16_layers[0]}, bf16_layers_at_end={bf16_layers[1]}: "
            f"each at most the {most} layers of a pipeline stage ({num_layers} over {num_stages})"
        )
    return {
        "fp8": fp8,
        "fp8_recipe": RECIPES[recipe],
        "first_last_layers_bf16": any(bf16_layers),
        "num_layers_at_start_in_bf16": bf16_layers[0],
        "num_layers_at_end_in_bf16": bf16_layers[1],
    }


def fp8_row_multiple(recipe: str) -> int:
    """Tokens that a rank's rows are to be a multiple of, for FP8's products."""
    return get_fp8_align_size(RECIPES[recipe])
