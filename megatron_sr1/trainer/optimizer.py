"""The optimizer and its learning-rate schedule, from the configuration.

In: the actor's chunks inside Megatron's DistributedDataParallel. Out: Megatron's optimizer. With
`optimizer.state: bfloat16` or `optimizer.offload: true` Megatron's distributed optimizer shards,
clips and gathers as ever, and a `ShardAdamW` stands in for the Adam inside it.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_sr1.config.run import Config
from megatron_sr1.config.training import OptimizerConfig
from megatron_sr1.trainer.adamw import ShardAdamW

RATES = ("learning rate of the next update", "learning rate of the last update")
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


def updates_per_step(config: Config) -> int:
    """Optimizer updates that a step makes; with `algorithm.filter_groups` the most."""
    if config.stage == "sft":
        return 1
    return config.data.prompts_per_step // config.algorithm.prompts_per_update


def schedule_facts(config: Config, optimizer: Any, scheduler: Any, step: int) -> dict[str, Any]:
    """What a place in the schedule means, to be kept with a checkpoint.

    Args:
        config: of the run.
        optimizer: Megatron's.
        scheduler: of the learning rate, at its place after `step`.
        step: steps done.

    Returns:
        by name the settings that the schedule is made of, and the learning rates that follow.
    """
    chosen, per_step = config.optimizer, updates_per_step(config)
    names = ("num_steps", "learning_rate", "min_learning_rate", "warmup_steps", "schedule")
    here = scheduler.num_steps
    end = here + (chosen.num_steps - step) * per_step
    rates = []
    for place in (here, max(end - 1, 0)):
        scheduler.num_steps = place
        rates.append(float(scheduler.get_lr(optimizer.param_groups[0])))
    scheduler.num_steps = here
    return {
        **{f"optimizer.{name}": getattr(chosen, name) for name in names},
        "updates a step": per_step,
        "updates in all": per_step * chosen.num_steps,
        **dict(zip(RATES, rates, strict=True)),
    }


def schedule_change(saved: Any, now: dict[str, Any]) -> str:
    """Say how the schedule of a checkpoint differs from the one of this run.

    Args:
        saved: `schedule_facts` as a checkpoint keeps them, or None where an older one has none.
        now: those of this run at the same place.

    Returns:
        each difference as `name old -> new`; empty where no setting differs.
    """
    known = saved if isinstance(saved, dict) else {}
    differ = [name for name, value in now.items() if name in known and known[name] != value]
    if all(name in RATES for name in differ):
        return ""
    return ", ".join(f"{name} {_short(known[name])} -> {_short(now[name])}" for name in differ)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:40]
