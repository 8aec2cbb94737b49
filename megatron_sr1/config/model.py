"""Settings of the actor: the model and how it is laid out over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_sr1.config.fields import choice, number


@dataclass
class ModelConfig:
    """The actor."""

    path: str = MISSING
    """Hugging Face directory or Megatron checkpoint directory to start from."""
    dtype: str = choice("bfloat16", "float32", "bfloat16")
    """Parameters and activations: float32 | bfloat16."""
    spec: str = choice("local", "local", "transformer_engine")
    """Layer kernels: local (torch) | transformer_engine (CUDA only)."""
    fp8: str | None = choice(None, None, "hybrid", "e4m3")
    """FP8 format for Transformer Engine: None | hybrid | e4m3."""
    fp8_recipe: str = choice("delayed", "delayed", "current", "blockwise", "mxfp8")
    """FP8 scaling: delayed | current | blockwise | mxfp8 (Blackwell)."""
    bf16_layers_at_start: int = number(0, at_least=0)
    """model.fp8: so many first layers of the language model stay in bfloat16, not with delayed."""
    bf16_layers_at_end: int = number(0, at_least=0)
    """model.fp8: so many last layers do."""
    recompute: str = choice("none", "none", "selective", "full")
    """Activation recomputation: none | selective | full."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions over Hugging Face parameter names; each must match something."""
    logprob_chunk_tokens: int = number(1024, at_least=1)
    """Tokens whose logits exist at a time, > 0."""


@dataclass
class ParallelConfig:
    """How the actor is laid out over ranks; data parallelism is what remains."""

    tensor: int = number(1, at_least=1)
    """Tensor-parallel ranks, >= 1."""
    pipeline: int = number(1, at_least=1)
    """Pipeline stages, >= 1."""
    context: int = number(1, at_least=1)
    """Context-parallel ranks, >= 1."""
    virtual: int = number(1, at_least=1)
    """Virtual stages of each pipeline rank, >= 1: the interleaved schedule."""
    stage_layers: list[int] = number([], at_least=1)
    """Layers of the language model on each of the pipeline x virtual stages, in order; empty:
    equally many. The first stage holds the tower too; `megatron-sr1 plan` proposes a split."""
    vision: str = choice("tensor", "tensor", "images")
    """The tower: tensor (layers split as the language model's) | images (whole on each rank, and
    tensor-parallel ranks share out a row's images). Context-parallel ranks always share them."""
    sequence: bool = False
    """Sequence parallelism inside tensor parallelism."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the actor between them."""
        return self.tensor * self.pipeline * self.context
