"""AdamW for Megatron's distributed optimizer with little memory on the device.

In: this rank's shards of the weights, as views into Megatron's buffers, each with its gradient.
Out: the same shards, updated. For every shard three tensors are held, under the names by which
Megatron saves them:

    state      float32                              bfloat16
    master_param  float32 weights (the weights       what rounding the weights to bfloat16 has left
                  themselves where they are float32) over (Kahan's compensation)
    exp_avg, exp_avg_sq   moments                    moments
    update     torch.optim.adamw                     optimi.adamw with kahan_sum

Held on the weights' device, or in host memory (pinned where there is CUDA): then an update brings
the tensors of one shard to the device, and back when it is done.

What bfloat16 costs (tests/unit/test_adamw.py measures it): weight and compensation have 16 bits
together, so an update below 2^-18 of its weight is lost; the moments have 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Group = dict[str, Any]


class ShardAdamW:
    """What Megatron's `DistributedOptimizer` asks of the optimizer inside it.

    It is no `torch.optim.Optimizer`: that one refuses views, and casts what it loads to the dtype
    and the device of the weights.

    Attributes:
        param_groups: Megatron's groups; each has `params`, `lr`, `weight_decay`, `betas`, `eps`
            and `step`, the number of updates done.
        state: the tensors held of each shard.
    """

    def __init__(self, param_groups: list[Group], dtype: torch.dtype, offload: bool) -> None:
        """Hold the state that a first update starts from.

        Args:
            param_groups: of the optimizer that this one stands in for.
            dtype: of the state, float32 or bfloat16; bfloat16 only over weights in bfloat16.
            offload: hold the state in host memory.
        """
        self.param_groups = param_groups
        self.dtype = dtype
        self._offload = offload
        self._update: Callable[..., None] = _kahan if dtype == torch.bfloat16 else _plain
        self.state: dict[torch.Tensor, Tensors] = {}
        for group in param_groups:
            group["step"] = 0
            for shard in group["params"]:
                self.state[shard] = self._initial(shard)

    def _initial(self, shard: torch.Tensor) -> Tensors:
        weights = shard.detach()
        if self.dtype == torch.bfloat16:
            assert weights.dtype == torch.bfloat16
            master = self._empty(weights).zero_()
        elif weights.dtype == torch.float32:
            master = weights
        else:
            master = self._empty(weights).copy_(weights)
        moments = {name: self._empty(weights).zero_() for name in ("exp_avg", "exp_avg_sq")}
        return {"master_param": master, **moments}

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        device = torch.device("cpu") if self._offload else like.device
        pinned = self._offload and like.is_cuda
        return torch.empty(like.shape, dtype=self.dtype, device=device, pin_memory=pinned)

    @torch.no_grad()
    def step(self) -> None:
        """Update every shard by the gradient that Megatron has put beside it."""
        for group in self.param_groups:
            for shard in group["params"]:
                tensors = self._on_device(shard)
                self._update(shard, shard.decoupled_grad, tensors, group)
                self._put_back(shard, tensors)
            group["step"] += 1
        if self._offload and torch.cuda.is_available():
            # Checkpoints read host memory without asking the stream.
            torch.cuda.current_stream().synchronize()

    def _on_device(self, shard: torch.Tensor) -> Tensors:
        if not self._offload:
            return self.state[shard]
        # A copy on a CPU too, so that what runs there is what runs on a GPU.
        return {
            name: torch.empty_like(held, device=shard.device).copy_(held, non_blocking=True)
            for name, held in self.state[shard].items()
        }

    def _put_back(self, shard: torch.Tensor, tensors: Tensors) -> None:
        for name, held in self.state[shard].items():
            if held is not tensors[name]:
                held.copy_(tensors[name], non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of the gradients."""
        for shard in self.state:
            shard.decoupled_grad = None  # type: ignore[attr-defined]

    def get_unscaled_state(self, shard: torch.Tensor, name: str) -> torch.Tensor:
        """A held tensor, for a checkpoint."""
        return self.state[shard][name]

    def set_scaled_state(self, shard: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Fill a held tensor from a checkpoint."""
        self.state[shard][name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Groups without tensors, and the step once more where Megatron looks for torch's."""
        groups = [{**group, "params": []} for group in self.param_groups]
        return {"state": {0: {"step": torch.tensor(groups[0]["step"])}}, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the number of updates; tensors come one by one, settings stay as configured."""
        for group, loaded in zip(self.param_groups, state["param_groups"], strict=True):
            group["step"] = int(loaded["step"])

    def state_bytes(self) -> int:
        """Bytes held beyond the weights themselves."""
        return sum(
            held.numel() * held.element_size()
            for shard, tensors in self.state.items()
            for held in tensors.values()
            if held.data_ptr() != shard.data_ptr()
        )


def _plain(shard: torch.Tensor, gradient: torch.Tensor, tensors: Tensors, group: Group) -> None:
    """Update in float32; weights in bfloat16 are rounded from the master weights."""
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
    """Update in bfloat16; what rounding takes from the weights stays in the compensation."""
    from optimi import adamw

    compensation = tensors["master_param"]
    # The library decays the weights themselves, where bfloat16 loses all but a giant rate.
    compensation.add_(shard, alpha=-group["lr"] * group["weight_decay"])
    # Its kernel takes any gradient; its torch operations want one dtype, and write over it.
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
