"""The optimizer and its learning-rate schedule, from the configuration.

In: the actor's chunks inside Megatron's DistributedDataParallel. Out: Megatron's optimizer. With
`optimizer.state: bfloat16` or `optimizer.offload: true` Megatron's distributed optimizer shards,
clips and gathers as usual, and a `ShardAdamW` replaces the Adam inside it. It holds three tensors
per shard of the weights, under the names by which Megatron saves them:

    state         float32                                bfloat16
    master_param  float32 weights (the weights           the rounding error of the weights in
                  themselves if they are float32)        bfloat16 (Kahan's compensation)
    exp_avg, exp_avg_sq   moments                        moments
    update        torch.optim.adamw                      optimi.adamw with kahan_sum

They are on the weights' device, or in host memory (pinned if there is CUDA), from which an update
copies the tensors of one shard to the device and back.

Cost of bfloat16 (measured by tests/unit/test_adamw.py): weight and compensation have 16 bits
together, so an update below 2^-18 of its weight is lost; the moments have 8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from megatron_sr1.config.run import Config
from megatron_sr1.config.training import OptimizerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RATES = ("learning rate of the next update", "learning rate of the last update")
Tensors = dict[str, torch.Tensor]
Group = dict[str, Any]


def make_optimizer(config: Config, wrapped: list[Any]) -> Any:
    """Make Megatron's optimizer for chunks inside its DistributedDataParallel."""
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
        bf16=config.trained_dtype == "bfloat16",
        params_dtype=DTYPES[config.trained_dtype],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    is_replaced = chosen.state == "bfloat16" or chosen.offload
    # Megatron then makes no master weights: it hands shards of the weights themselves to the inner
    # optimizer, with their gradients as `decoupled_grad`. The public setting for that requires
    # Transformer Engine's Adam; the distributed optimizer reads this one.
    settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = is_replaced
    optimizer = get_megatron_optimizer(settings, wrapped)
    if is_replaced:
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                groups = part.optimizer.param_groups
                part.optimizer = ShardAdamW(groups, DTYPES[chosen.state], chosen.offload)
    return optimizer


def make_scheduler(chosen: OptimizerConfig, optimizer: Any, num_updates: int) -> Any:
    """Make Megatron's schedule of learning rate and weight decay over all updates of a run."""
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


def schedule_facts(config: Config, optimizer: Any, scheduler: Any, step: int) -> dict[str, Any]:
    """Describe the schedule after `step` steps, for a checkpoint: settings and `RATES` by name."""
    chosen, per_step = config.optimizer, config.updates_per_step
    names = ("num_steps", "learning_rate", "min_learning_rate", "warmup_steps", "schedule")
    here = scheduler.num_steps
    end = here + (config.num_steps - step) * per_step
    rates = []
    for place in (here, max(end - 1, 0)):
        scheduler.num_steps = place
        rates.append(float(scheduler.get_lr(optimizer.param_groups[0])))
    scheduler.num_steps = here
    return {
        **{f"optimizer.{name}": getattr(chosen, name) for name in names},
        "updates a step": per_step,
        "updates in all": config.num_updates,
        **dict(zip(RATES, rates, strict=True)),
    }


def schedule_change(saved: Any, now: dict[str, Any]) -> str:
    """Describe how a checkpoint's `schedule_facts` differ from those of this run at the same step.

    The description is `name old -> new, …`, empty if no setting differs or, in a checkpoint older
    than these facts, nothing was `saved`.
    """
    known = saved if isinstance(saved, dict) else {}
    differ = [name for name, value in now.items() if name in known and known[name] != value]
    if all(name in RATES for name in differ):
        return ""
    return ", ".join(f"{name} {_short(known[name])} -> {_short(now[name])}" for name in differ)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:40]


class ShardAdamW:
    """AdamW as Megatron's `DistributedOptimizer` expects its inner optimizer to be.

    Not a `torch.optim.Optimizer`, which refuses views and casts what it loads to the dtype and the
    device of the weights.

    Attributes:
        param_groups: Megatron's groups; each has `params`, `lr`, `weight_decay`, `betas`, `eps`
            and `step`, the number of updates done.
        state: the tensors of each shard.
    """

    def __init__(self, param_groups: list[Group], dtype: torch.dtype, offload: bool) -> None:
        """Initialize the state, float32 or, for weights in bfloat16, bfloat16.

        With `offload` it is kept in host memory.
        """
        self.param_groups = param_groups
        self.dtype = dtype
        self._offload = offload
        self.state = {shard: self._initial(shard) for g in param_groups for shard in g["params"]}
        for group in param_groups:
            group["step"] = 0

    def _initial(self, shard: torch.Tensor) -> Tensors:
        weights = shard.detach()
        assert self.dtype == torch.float32 or weights.dtype == torch.bfloat16
        zeros = partial(
            torch.zeros,
            weights.shape,
            dtype=self.dtype,
            device="cpu" if self._offload else weights.device,
            pin_memory=self._offload and weights.is_cuda,
        )
        master = weights
        if self.dtype == torch.bfloat16:
            master = zeros()
        elif weights.dtype != torch.float32:
            master = zeros().copy_(weights)
        return {"master_param": master, "exp_avg": zeros(), "exp_avg_sq": zeros()}

    @torch.no_grad()
    def step(self) -> None:
        """Update every shard by its `decoupled_grad`."""
        update = _kahan if self.dtype == torch.bfloat16 else _plain
        for group in self.param_groups:
            for shard in group["params"]:
                held = used = self.state[shard]
                if self._offload:  # on a CPU too, so that the tests run what a GPU runs
                    used = {
                        name: kept.to(shard.device, copy=True, non_blocking=True)
                        for name, kept in held.items()
                    }
                update(shard, shard.decoupled_grad, used, group)
                for name in held if self._offload else ():
                    held[name].copy_(used[name], non_blocking=True)
            group["step"] += 1
        if self._offload and torch.cuda.is_available():
            # Checkpoints read host memory without synchronizing.
            torch.cuda.current_stream().synchronize()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release the gradients."""
        for shard in self.state:
            shard.decoupled_grad = None  # type: ignore[attr-defined]

    def get_unscaled_state(self, shard: torch.Tensor, name: str) -> torch.Tensor:
        """Return a state tensor, for a checkpoint."""
        return self.state[shard][name]

    def set_scaled_state(self, shard: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Fill a state tensor from a checkpoint."""
        self.state[shard][name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups without tensors, and the step where Megatron expects torch's."""
        groups = [{**group, "params": []} for group in self.param_groups]
        return {"state": {0: {"step": torch.tensor(groups[0]["step"])}}, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the number of updates; settings stay as configured, and tensors are filled later."""
        for group, loaded in zip(self.param_groups, state["param_groups"], strict=True):
            group["step"] = int(loaded["step"])


def _plain(shard: torch.Tensor, gradient: torch.Tensor, tensors: Tensors, group: Group) -> None:
    """Update in float32, then round to weights in bfloat16."""
    from torch.optim.adamw import adamw

    master = tensors["master_param"]
    adamw(
        [master],
        [gradient.float()],
        [tensors["exp_avg"]],
        [tensors["exp_avg_sq"]],
        [],
        [torch.tensor(float(group["step"]))],
        foreach=False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    shard.copy_(master)


def _kahan(shard: torch.Tensor, gradient: torch.Tensor, tensors: Tensors, group: Group) -> None:
    """Update in bfloat16; the compensation keeps the weights' rounding errors."""
    from optimi import adamw

    compensation = tensors["master_param"]
    # The library would decay the bfloat16 weights, which loses all but giant rates to rounding.
    compensation.add_(shard, alpha=-group["lr"] * group["weight_decay"])
    # Its kernel accepts any gradient; its torch operations need one dtype, and overwrite it.
    kernel = shard.is_cuda
    adamw(
        [shard],
        [gradient if kernel else gradient.to(shard.dtype)],
        [tensors["exp_avg"]],
        [tensors["exp_avg_sq"]],
        [compensation],
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=0.0,
        eps=group["eps"],
        step=torch.tensor(group["step"]),
        kahan_sum=True,
        triton=kernel,
    )
