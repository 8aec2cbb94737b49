"""Settings of LoRA adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_sr1.config.fields import choice, number


@dataclass
class AdapterConfig:
    """LoRA: train low-rank additions to frozen weights, as PEFT does."""

    rank: int = number(0, at_least=0)
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: float = number(16.0, above=0)
    """Numerator of the scale of an adapter, see adapter.scaling."""
    dropout: float = number(0.0, at_least=0, below=1)
    """Probability of dropout on the input of an adapter, in supervised training; 0 for GRPO."""
    targets: list[str] = field(default_factory=lambda: [r"^model[.]layers[.].*_proj$"])
    """Linear layers with an adapter: regular expressions over published module names, each with a
    match anywhere in a name, such as q_proj or visual[.].*qkv. By default all of the language
    model."""
    scaling: str = choice("standard", "standard", "rslora")
    """Scale of an adapter: standard (alpha / rank), rslora (alpha / sqrt(rank))."""
    init: str = choice("kaiming", "kaiming", "gaussian")
    """Initial A, where B is zero: kaiming (uniform, PEFT's default), gaussian (standard deviation
    1 / rank)."""
    path: str = ""
    """Directory of an adapter in PEFT's format to start from; empty: a new one."""
    dtype: str = choice("float32", "float32", "model")
    """Data type of adapters, their gradients and their products: float32, or the model's."""

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by; the rank is above 0."""
        is_standard = self.scaling == "standard"
        return self.alpha / (self.rank if is_standard else math.sqrt(self.rank))
