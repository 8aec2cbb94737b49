"""The configuration of a run: all groups, logging and launch."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_sr1.config.fields import choice, number, settings
from megatron_sr1.config.model import ModelConfig, ParallelConfig
from megatron_sr1.config.rollout import RewardConfig, RolloutConfig
from megatron_sr1.config.training import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
)


@dataclass
class LoggingConfig:
    """What a run tells."""

    level: str = choice("info", "debug", "info", "warning")
    """debug (with all messages of libraries) | info | warning."""
    wandb: str = choice("off", "off", "offline", "online")
    """off | offline | online."""
    wandb_project: str = "megatron_sr1"
    """Project in wandb."""
    wandb_samples: int = number(8, at_least=0)
    """Responses in wandb's table of samples, with their images; 0: no tables."""
    wandb_tables_every: int = number(10, at_least=1)
    """Steps from one table of samples and of verdicts in wandb to the next; the first has them."""
    rollouts: bool = True
    """Save rollouts/step_N.jsonl."""
    progress: bool = True
    """Progress bar on a terminal."""
    profile_steps: list[int] = number([], at_least=1)
    """First and last step, from 1, that torch.profiler records into profile/; empty: none."""
    profile_ranks: list[int] = number([0], at_least=0)
    """Ranks that record, each into a file of its own."""
    peak_tflops: float = number(0.0, at_least=0)
    """Of a rank's device, for MFU, 10^12 operations a second, dense bfloat16; 0: of the GPU's name
    where it is known; otherwise no MFU is told."""


@dataclass
class LaunchConfig:
    """Ranks and deadlines."""

    num_processes: int = number(0, at_least=0, at_most=1024)
    """Ranks on this machine when the command starts torchrun itself; 0: one a GPU, 1 on a CPU."""
    device: str = choice("auto", "auto", "cpu", "cuda")
    """auto | cpu | cuda."""
    threads: int = number(0, at_least=0, at_most=1024)
    """Threads a rank on a CPU; 0 shares the cores out."""
    setup_deadline_seconds: float = number(1800.0, at_least=0, at_most=2592000)
    """Loading of model and engine; 0: no deadline."""
    phase_deadline_seconds: float = number(3600.0, at_least=0, at_most=2592000)
    """Any other phase; 0: no deadline."""
    save_on_sigterm: bool = False
    """SIGTERM, like SIGUSR1, has the run finish its step, save and leave, instead of ending it at
    once; only SIGKILL does that then."""


@dataclass
class Config:
    """A run."""

    stage: str = choice("grpo", "sft", "grpo", "eval")
    """sft | grpo | eval."""
    output: str = "runs/default"
    """Run directory."""
    seed: int = number(1, at_least=0, at_most=2**32 - 1)
    """Of everything."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def keys() -> list[str]:
    """All dotted keys that a configuration may set."""
    return [key for key, _, _ in settings(Config())]
