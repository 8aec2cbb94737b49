"""Settings of the actor: the model and its distribution over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_sr1.config.fields import choice, number


@dataclass
class ModelConfig:
    """The model that is trained or evaluated."""

    path: str = MISSING
    """Hugging Face directory or Megatron checkpoint directory to start from."""
    dtype: str = choice("bfloat16", "float32", "bfloat16")
    """Data type of parameters and activations."""
    spec: str = choice("local", "local", "transformer_engine")
    """Layer kernels: local (torch), transformer_engine (needs CUDA)."""
    fp8: str | None = choice(None, None, "hybrid", "e4m3")
    """FP8 format of matrix products in Transformer Engine; null: no FP8."""
    fp8_recipe: str = choice("delayed", "delayed", "current", "blockwise", "mxfp8")
    """How FP8 scaling factors are chosen; mxfp8 needs Blackwell."""
    bf16_layers_at_start: int = number(0, at_least=0)
    """First text layers to keep in bfloat16 under model.fp8; not with fp8_recipe=delayed."""
    bf16_layers_at_end: int = number(0, at_least=0)
    """Last text layers to keep in bfloat16 under model.fp8; not with fp8_recipe=delayed."""
    recompute: str = choice("none", "none", "selective", "full")
    """Activation recomputation in the backward pass."""
    freeze: list[str] = field(default_factory=list)
    """Parameters not to train: regular expressions over Hugging Face names, each with a match."""
    logprob_chunk_tokens: int = number(1024, at_least=1)
    """Tokens whose logits are held in memory at the same time."""


@dataclass
class ParallelConfig:
    """Layout of the actor; the remaining factor of the number of ranks is data parallelism."""

    tensor: int = number(1, at_least=1)
    """Tensor-parallel size."""
    pipeline: int = number(1, at_least=1)
    """Pipeline-parallel size."""
    context: int = number(1, at_least=1)
    """Context-parallel size."""
    virtual: int = number(1, at_least=1)
    """Virtual stages per pipeline rank; more than 1 selects the interleaved schedule."""
    stage_layers: list[int] = number([], at_least=1)
    """Text layers on each of the pipeline x virtual stages, in order; empty: equally many. The
    first stage also has the vision tower; `megatron-sr1 plan` proposes a split."""
    vision: str = choice("tensor", "tensor", "images")
    """How tensor-parallel ranks divide the vision tower: tensor (its layers are split like the
    language model's), images (each rank has the whole tower and processes some of the images).
    Context-parallel ranks always divide the images."""
    sequence: bool = False
    """Sequence parallelism within the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""

    @property
    def replica_size(self) -> int:
        """Number of ranks that hold one copy of the actor."""
        return self.tensor * self.pipeline * self.context
