"""The configuration: dataclasses free of torch. A default, a range and a choice live here once.

A field's range or accepted values are in its metadata, under the names of the arguments of
`number` and `choice`; config_checks.py reads them there. config_file.py resolves YAML files and
overrides over the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def number(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a field for a finite number within a range, or for a list of such numbers.

    Args:
        default: value, or list of values, of a configuration that does not set the field.
        at_least: smallest value.
        above: every value is larger than this one.
        at_most: largest value.
        below: every value is smaller than this one.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(default: Any, *choices: Any) -> Any:
    """Return a field that takes one of a few values."""
    return field(default=default, metadata={"choices": choices})


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


@dataclass
class DataConfig:
    """Shards and how a step is drawn from them."""

    train: str = ""
    """Folder of webdataset shards to learn from (tools/make_shards.py writes them)."""
    eval: str = ""
    """Folder of webdataset shards held out."""
    eval_limit: int = number(0, at_least=0)
    """Use the first so many held-out samples; 0 means all."""
    prompts_per_step: int = number(512, at_least=1)
    """GRPO: prompts rolled out a step; SFT: sequences a step."""
    shuffle: bool = True
    """New order each epoch, from the seed."""
    prompt_style: str = choice("full", "full", "brief")
    """Instructions: full (published models) | brief (a model that was trained on them)."""
    packing: bool = True
    """Sequences share micro-batches; false: each has its own."""
    pack_tokens: int = number(8192, at_least=1)
    """Budget of a micro-batch: its tokens, and its images' patches at what a patch takes of the
    work of a token (docs/scaling.md); a larger sequence gets one of its own."""
    max_prompt_tokens: int = number(6000, at_least=1)
    """Longer prompts and conversations (images expanded) are skipped and counted."""
    max_skipped: int = number(100, at_least=0)
    """So many bad or too long samples stop the run."""
    min_pixels: int = number(262144, at_least=784, at_most=2**27)
    """Smallest image area, pixels; a token of the language model is 28 x 28."""
    max_pixels: int = number(4194304, at_least=784, at_most=2**27)
    """Largest image area, pixels; rounding to patches may exceed it (docs/data.md)."""

    @property
    def row_budget(self) -> int:
        """Budget of a micro-batch, tokens; 0 if each sequence has a micro-batch of its own."""
        return self.pack_tokens if self.packing else 0


@dataclass
class RolloutConfig:
    """The vLLM engine and sampling."""

    tensor_parallel: int = number(1, at_least=1)
    """Ranks an engine replica spans; independent of the actor's layout."""
    samples_per_prompt: int = number(8, at_least=1)
    """Responses a prompt (n)."""
    temperature: float = number(1.0, at_least=0.01, at_most=2)
    """Pass-1 sampling temperature. vLLM refuses more than 2, and samples at 0.01 for any less."""
    top_p: float = number(1.0, above=0, at_most=1)
    """Only 1 is accepted for training rollouts."""
    top_k: int = number(0, at_least=0)
    """Only 0 (off) is accepted for training rollouts."""
    max_response_tokens: int = number(2048, at_least=1)
    """Pass-1 limit."""
    pass2: str = choice("fork", "fork", "barrier")
    """When pass 2 starts: fork (as soon as the description closes) | barrier (after pass 1)."""
    pass2_order: str = choice("question_first", "question_first", "description_first")
    """Pass-2 prompt: question_first (what a prompt's samples share comes first, so that the prefix
    cache serves it) | description_first (as published, and as the digits' model is trained)."""
    pass2_mode: str = choice("generate", "generate", "likelihood")
    """A description is judged by: generate (answers from it) | likelihood (of the gold answer,
    by prefill alone)."""
    pass2_samples: int = number(1, at_least=1)
    """Answers a description, averaged; more than 1 needs a pass2_temperature above 0."""
    pass2_temperature: float = number(0.0, at_least=0, at_most=2)
    """Pass-2 temperature; 0 is greedy."""
    max_reading_tokens: int = number(1024, at_least=1)
    """Pass-2 limit."""
    max_model_len: int = number(8192, at_least=2)
    """Engine context, tokens."""
    max_num_seqs: int = number(512, at_least=1, at_most=8192)
    """Engine slots, for both passes together; vLLM refuses more than tokens of an engine step."""
    gpu_memory_utilization: float = number(0.5, above=0, at_most=1)
    """Share of a GPU's memory that the engine may take (CUDA)."""
    kv_cache_gib: int = number(1, at_least=1)
    """Key/value cache on a CPU, GiB."""
    sleep_level: int = number(2, at_least=0, at_most=2)
    """Engine sleep between rollouts (CUDA): 0 stays awake | 1 | 2."""
    make_room: str = choice("gradients", "none", "gradients", "optimizer")
    """What of the actor's leaves the device while the engine is awake: none | gradients (they are
    made anew) | optimizer (the gradients, and the state to host memory and back)."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    quantization: str | None = choice(None, None, "fp8_per_channel", "fp8_per_tensor")
    """Of the engine's linear layers: fp8_per_channel | fp8_per_tensor (CUDA), anew with each sync;
    needs bfloat16 weights, and a correction of the mismatch (algorithm.importance_sampling)."""
    mismatch_bound: float = number(0.0, at_least=0)
    """Largest |engine - actor| logprob among a step's sampled tokens, nats; beyond it the run
    stops. 1e-3 suits float32 on a CPU; 0 turns it off."""
    canary_bound: float = number(0.0, at_least=0)
    """After each sync engine and actor score a fixed response to a fixed image; so many nats apart
    on a token, the run stops. 1e-3 suits float32 on a CPU; 0 leaves it out."""


@dataclass
class RewardConfig:
    """What pays."""

    recipe: str = choice("vision_sr1", "vision_sr1", "see_think", "vision_r1")
    """vision_sr1 | see_think (same spans, no self-reward) | vision_r1 (think and answer)."""
    function: str = ""
    """FILE.py:NAME of a function that judges answers in place of the grader, from 0 to 1, those of
    pass 1 and pass 2 alike (docs/reward.md); empty: the grader."""
    accuracy_weight: float = number(0.9, at_least=0)
    """Pays a right pass-1 answer: times 0 or 1, or what reward.function gave."""
    format_weight: float = number(0.1, at_least=0)
    """Pays the recipe's form."""
    self_reward_weight: float = number(1.0, at_least=0)
    """Pays a right pass-2 answer (vision_sr1), in the same way."""
    likelihood: str = choice("per_token", "per_token", "probability", "linear")
    """rollout.pass2_mode=likelihood, log p of the gold answer's tokens as a number in [0, 1]:
    per_token (exp of the mean) | probability (exp of the sum) | linear (1 + sum /
    likelihood_nats, at least 0)."""
    likelihood_nats: float = number(10.0, above=0)
    """likelihood=linear: -log p from which on nothing is paid, nats, > 0."""
    question_baseline: bool = False
    """Read each question without a description too, once a step, and pay a self-reward only for
    what it exceeds that by."""
    pay_leaks: bool = True
    """False: a description that states the answer as a verdict earns no self-reward."""
    grader: str = choice("rules", "rules", "math_verify")
    """rules (text, options, units, lists, then algebra) | math_verify (that library alone, which
    reads LaTeX and plain expressions)."""
    grader_timeout_seconds: float = number(5.0, above=0, at_most=3600)
    """Time limit of a comparison, seconds."""
    max_ungraded_share: float = number(1.0, at_least=0, at_most=1)
    """Stop the run where more than this share of a step's prompts has an answer that took the
    grader too long or too much memory; with 1 such answers never stop it."""


@dataclass
class AlgorithmConfig:
    """The policy-gradient objective; docs/algorithms.md says what makes which published one."""

    advantage: str = choice("grpo", "grpo", "dr_grpo", "rloo")
    """Within a group: grpo (centred, divided by the deviation) | dr_grpo (centred) | rloo (less the
    mean of the others)."""
    credit: str = choice("scalar", "scalar", "component", "span")
    """Of the rewards: scalar (their sum) | component (answer and visual reward normalised apart,
    then added) | span (visual advantage on the description's tokens, the answer's on the rest)."""
    answer_weight: float = number(0.5, above=0)
    """credit=component: of the answer's advantage, > 0."""
    visual_weight: float = number(0.5, above=0)
    """credit=component: of the visual advantage, > 0."""
    format_share: float = number(0.1, at_least=0)
    """credit=component and span: what format adds to accuracy and to self-reward, each worth 1."""
    std_floor: float = number(1e-2, above=0)
    """Smallest group standard deviation that a reward is divided by (advantage=grpo)."""
    loss: str = choice("token_mean", "token_mean", "sequence_mean", "dr_grpo", "gspo")
    """Mean over an update: token_mean (its tokens) | sequence_mean (tokens, then sequences) |
    dr_grpo (sequences of a constant length, rollout.max_response_tokens) | gspo (sequence_mean
    with a ratio per sequence)."""
    clip_low: float = number(0.2, at_least=0, at_most=1)
    """PPO ratio is clipped below at 1 - clip_low."""
    clip_high: float = number(0.3, at_least=0)
    """PPO ratio is clipped above at 1 + clip_high."""
    gspo_clip_low: float = number(3e-4, at_least=0, at_most=1)
    """loss=gspo: the sequence's ratio, a mean a token, is clipped below at 1 - gspo_clip_low."""
    gspo_clip_high: float = number(4e-4, at_least=0)
    """loss=gspo: and above at 1 + gspo_clip_high."""
    dual_clip: float = number(3.0, above=1)
    """Bound on ratio for negative advantages, > 1."""
    kl_coefficient: float = number(1e-2, at_least=0)
    """Weight of the k3 KL to the frozen reference; 0 needs no reference model."""
    importance_sampling: str = choice("off", "off", "token", "sequence")
    """Weights actor / engine on the advantages: off | token | sequence."""
    importance_cap: float = number(2.0, at_least=1)
    """Largest importance weight, >= 1."""
    mask_beyond_nats: float = number(0.0, at_least=0)
    """Sequences whose mean gap actor - engine, nats a token, is larger teach nothing; 0 keeps
    all."""
    prompts_per_update: int = number(128, at_least=1)
    """Prompts of an optimizer update; divides data.prompts_per_step."""
    filter_groups: bool = False
    """Replace prompts whose responses teach nothing (no spread of rewards) by further prompts."""
    max_refills: int = number(3, at_least=1)
    """filter_groups: rollout rounds of a step behind the first, at most, >= 1."""


@dataclass
class OptimizerConfig:
    """AdamW and the learning-rate schedule."""

    num_steps: int = number(100, at_least=1)
    """Steps (rollout batches in GRPO, updates in SFT)."""
    learning_rate: float = number(1e-6, above=0, at_most=1)
    """Peak."""
    min_learning_rate: float = number(0.0, at_least=0, at_most=1)
    """At the end of a decay."""
    schedule: str = choice("constant", "constant", "linear", "cosine")
    """After warm-up: constant | linear | cosine."""
    warmup_steps: int = number(0, at_least=0)
    """Updates of linear warm-up."""
    weight_decay: float = number(1e-2, at_least=0)
    """Decoupled."""
    beta1: float = number(0.9, at_least=0, below=1)
    """Adam."""
    beta2: float = number(0.999, at_least=0, below=1)
    """Adam."""
    epsilon: float = number(1e-8, at_least=1e-30, at_most=1)
    """Adam."""
    clip_grad: float = number(1.0, at_least=0)
    """Largest global gradient norm; 0 clips none."""
    state: str = choice("float32", "float32", "bfloat16")
    """Master weights and moments, shared out over data-parallel ranks (docs/memory.md):
    float32 (12 bytes a parameter) | bfloat16 (6: two moments and the weights' rounding error)."""
    gradients: str = choice("float32", "float32", "bfloat16")
    """Sums of gradients, whole on every data-parallel rank: float32 (4 bytes a parameter) |
    bfloat16 (2; each micro-batch adds a rounding error of 2^-9)."""
    offload: bool = False
    """Keep the state in host memory; an update brings it to the device tensor by tensor."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: int = number(20, at_least=0)
    """Save each so many steps and at the end; 0 saves at the end only."""
    keep_last: int = number(2, at_least=0)
    """Checkpoints to keep; 0 keeps all."""
    keep_best: int = number(0, at_least=0)
    """So many of the best besides. Each save is then preceded by an evaluation of greedy answers to
    data.eval (GRPO only); 0: none."""
    best_by: str = choice(
        "max accuracy",
        *("max accuracy", "max self_reward", "max description_exact", "min shortcut_rate"),
    )
    """keep_best: which rate, and which way: max accuracy | max self_reward | max description_exact
    | min shortcut_rate."""
    asynchronous: bool = False
    """Train on while tensors are written; the snapshot takes host memory of this rank's share."""
    max_in_flight: int = number(1, at_least=1)
    """asynchronous: so many saves at once, >= 1; a further one waits for the oldest."""
    resume: bool = True
    """Go on from `checkpoints/latest` if there is one."""
    verify: bool = True
    """Compare the checksums of a Megatron checkpoint before it is read; False: the sizes only."""
    export_hf: bool = True
    """Write the Hugging Face model to `hf/` at the end."""


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
