"""The configuration of a run, with the groups for the model, its layout, logging and launch."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.endpoint import EndpointConfig
from megatron_sr1.config.evaluation import EvaluationConfig, EvaluationSet
from megatron_sr1.config.fields import UNSET, choice, number, settings
from megatron_sr1.config.rollout import RewardConfig, RolloutConfig
from megatron_sr1.config.training import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    MixtureSet,
    OptimizerConfig,
)


@dataclass
class ModelConfig:
    """The model that is trained or evaluated."""

    path: str = UNSET
    """Hugging Face directory or Megatron checkpoint directory to start from, or a name on the
    Hugging Face hub, OWNER/NAME; HF_HOME and HF_HUB_OFFLINE have their usual meaning."""
    revision: str = "main"
    """Branch, tag or commit of model.path, if that is a hub name."""
    commit: str = ""
    """Commit of a hub name, in place of model.revision. Empty: the one that config.json of the run
    has, where a run is started again; else the newest of model.revision, which a run fixes there
    when it starts."""
    dtype: str = choice("bfloat16", "float32", "bfloat16")
    """Data type of parameters and activations."""
    spec: str = choice("local", "local", "transformer_engine")
    """Layer kernels: local (torch), transformer_engine (needs CUDA)."""
    fp8: str | None = choice(None, None, "hybrid", "e4m3")
    """FP8 format of matrix products in Transformer Engine; null: no FP8."""
    fp8_recipe: str = choice("current", "delayed", "current", "blockwise", "mxfp8")
    """How FP8 scaling factors are chosen: delayed (from earlier passes; 1 in the first one, and
    after each resume), current (per tensor), blockwise (per block), mxfp8 (needs Blackwell)."""
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

    @property
    def at(self) -> tuple[str, str]:
        """`path` and the revision of it to use: where the model is."""
        return self.path, self.commit or self.revision


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


@dataclass
class LoggingConfig:
    """What a run logs and saves about itself."""

    level: str = choice("info", "debug", "info", "warning")
    """Lowest level of log messages; debug includes all messages of libraries."""
    wandb: str = choice("off", "off", "offline", "online")
    """Weights & Biases: offline writes into the run directory."""
    wandb_project: str = "megatron_sr1"
    """Project name in Weights & Biases."""
    tensorboard: bool = False
    """Write scalars, and samples with their images, for TensorBoard into tensorboard/ of the run
    directory."""
    samples: int = number(8, at_least=0)
    """Responses with their images that wandb and TensorBoard show of a step; 0: none."""
    samples_every: int = number(10, at_least=1)
    """Steps between two with samples in wandb and TensorBoard; the first step always has them."""
    rollouts: bool = True
    """Save the rollouts of each step to rollouts/step_N.jsonl."""
    progress: bool = True
    """Show a progress bar if stderr is a terminal."""
    profile_steps: list[int] = number([], at_least=1)
    """First and last step, from 1, to record with torch.profiler into profile/; empty: none."""
    profile_ranks: list[int] = number([0], at_least=0)
    """Ranks that record a profile, one file each."""
    peak_tflops: float = number(0.0, at_least=0)
    """Peak dense bfloat16 throughput of a rank's device, for MFU, 10^12 operations per second; 0:
    by the name of the GPU. MFU is not reported for an unknown one."""


@dataclass
class LaunchConfig:
    """Ranks, devices and time limits."""

    num_processes: int = number(0, at_least=0, at_most=1024)
    """Ranks on this machine if the command starts them itself; 0: one per GPU, or one on a CPU."""
    device: str = choice("auto", "auto", "cpu", "cuda")
    """Device of the ranks; auto: CUDA if available."""
    threads: int = number(0, at_least=0, at_most=1024)
    """CPU threads per rank; 0: the cores divided by the ranks."""
    setup_deadline_seconds: float = number(1800.0, at_least=0, at_most=2592000)
    """Time limit for loading model and engine, seconds; 0: none."""
    phase_deadline_seconds: float = number(3600.0, at_least=0, at_most=2592000)
    """Time limit for any other phase of a step, seconds; 0: none."""
    save_on_sigterm: bool = False
    """On SIGTERM, as on SIGUSR1, finish the step, save and exit; false: exit at once."""

    @property
    def collective_timeout_seconds(self) -> float:
        """Time limit of a collective, above every deadline, so that the watch reports hangs.

        A month if a phase may take any time.
        """
        deadlines = (self.setup_deadline_seconds, self.phase_deadline_seconds)
        return max(deadlines) + 60.0 if all(deadlines) else 30 * 86400.0


@dataclass
class Config:
    """A run: what to do, where its files go, and the groups of settings."""

    stage: str = choice("grpo", "sft", "grpo", "eval")
    """What to run."""
    output: str = "runs/default"
    """Run directory."""
    seed: int = number(1, at_least=0, at_most=2**32 - 1)
    """Seed of the data order and of sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def trained_dtype(self) -> str:
        """Data type of the parameters that are trained: the adapters', if there are any."""
        with_adapters = self.adapter.rank > 0 and self.adapter.dtype != "model"
        return self.adapter.dtype if with_adapters else self.model.dtype

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per step; with `algorithm.filter_groups`, the most."""
        is_sft = self.stage == "sft"
        return 1 if is_sft else self.data.prompts_per_step // self.algorithm.prompts_per_update

    def endpoints(self) -> dict[str, EndpointConfig]:
        """Return the endpoints that the stage asks, by configuration key."""
        has_answers = self.stage != "sft" or self.evaluation.generate
        found: dict[str, EndpointConfig] = {}
        if has_answers and self.rollout.pass2_mode == "endpoint":
            found["rollout.endpoint"] = self.rollout.endpoint
        if has_answers and self.evaluation.judge.is_asked:
            found["evaluation.judge"] = self.evaluation.judge
        return found

    @property
    def num_steps(self) -> int:
        """Steps of the run, if it has no `num_epochs` any more (`rules.with_steps`)."""
        assert self.optimizer.num_steps is not None, "optimizer.num_epochs is not resolved"
        return self.optimizer.num_steps

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the run; with `algorithm.filter_groups`, the most."""
        return self.updates_per_step * self.num_steps

    @property
    def has_judge(self) -> bool:
        """True if a judge is asked about answers to held-out questions."""
        return "evaluation.judge" in self.endpoints()

    @property
    def shares_prompts(self) -> bool:
        """True if the actor computes a prompt once for all its samples in a row.

        Only our own attention can, on ranks that hold whole rows.
        """
        parallel = self.parallel
        return self.model.spec == "local" and parallel.context == 1 and not parallel.sequence

    def functions(self) -> dict[str, str]:
        """Return the reward functions that are set, by configuration key."""
        named = {"reward.function": self.reward.function}
        named["evaluation.function"] = self.evaluation.function
        for name, each in self.evaluation.sets.items():
            named[f"evaluation.sets.{name}.function"] = each.function or ""
        return {key: function for key, function in named.items() if function}


def keys() -> list[str]:
    """Return all dotted keys that a configuration may set, `NAME` where the user names a group."""
    config = Config()
    config.evaluation.sets["NAME"] = EvaluationSet()
    config.data.mixture["NAME"] = MixtureSet()
    return [key for key, _, _ in settings(config)]
