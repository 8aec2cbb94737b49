"""The optimizer and its learning-rate schedule, from the configuration.

In: the actor's chunks inside Megatron's DistributedDataParallel. Out: Megatron's optimizer. With
`optimizer.state: bfloat16` or `optimizer.offload: true` Megatron's distributed optimizer shards,
clips and gathers as ever, and a `ShardAdamW` stands in for the Adam inside it.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_sr1.config import Config, OptimizerConfig
from megatron_sr1.trainer.adamw import ShardAdamW

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_optimizer(config: Config, wrapped: list[Any]) -> Any:
    """Megatron's optimizer over wrapped chunks.

    Args:
        config: of the run.
        wrapped: chunks inside Megatron's DistributedDataParallel.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    chosen = config.optimizer
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=chosen.learning_rate,
        min_lr=chosen.min_learning_rate,
        weight_decay=chosen.weight_decay,
        adam_beta1=chosen.beta1,
        adam_beta2=chosen.beta2,
        adam_eps=chosen.epsilon,
        clip_grad=chosen.clip_grad,
        bf16=config.model.dtype == "bfloat16",
        params_dtype=DTYPES[config.model.dtype],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    held = chosen.state == "bfloat16" or chosen.offload
    # Megatron then makes no master weights: shards of the weights themselves are handed to the
    # optimizer inside, with their gradients as `decoupled_grad`. The public setting for it insists
    # on Transformer Engine's Adam; this one is what the distributed optimizer asks for.
    settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = held
    optimizer = get_megatron_optimizer(settings, wrapped)
    if held:
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                groups = part.optimizer.param_groups
                part.optimizer = ShardAdamW(groups, DTYPES[chosen.state], chosen.offload)
    return optimizer


def make_scheduler(chosen: OptimizerConfig, optimizer: Any, num_updates: int) -> Any:
    """Megatron's schedule of learning rate and weight decay.

    Args:
        chosen: settings.
        optimizer: Megatron's.
        num_updates: optimizer updates of the whole run.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if chosen.warmup_steps else chosen.learning_rate,
        max_lr=chosen.learning_rate,
        min_lr=min(chosen.min_learning_rate, chosen.learning_rate),
        lr_warmup_steps=chosen.warmup_steps,
        lr_decay_steps=max(num_updates, chosen.warmup_steps + 1),
        lr_decay_style=chosen.schedule,
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
