"""What a layout asks of a model's shape. Free of torch, so that a plan checks as the model does.

In: a shape and the numbers of a layout. Out: nothing, or a `ConfigError` that says what to change.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import HFConfig


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
