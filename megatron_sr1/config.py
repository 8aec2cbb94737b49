"""The configuration: dataclasses free of torch. A default lives here once.

config_file.py resolves YAML files and overrides over them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """The actor."""

    path: str = MISSING
    """Hugging Face directory or Megatron checkpoint directory to start from."""
    dtype: str = "bfloat16"
    """Parameters and activations: float32 | bfloat16."""
    spec: str = "local"
    """Layer kernels: local (torch) | transformer_engine (CUDA only)."""
    fp8: str | None = None
    """FP8 format for Transformer Engine: None | hybrid | e4m3."""
    fp8_recipe: str = "delayed"
    """FP8 scaling: delayed | current | blockwise | mxfp8 (Blackwell)."""
    bf16_layers_at_start: int = 0
    """model.fp8: so many first layers of the language model stay in bfloat16, not with delayed."""
    bf16_layers_at_end: int = 0
    """model.fp8: so many last layers do."""
    recompute: str = "none"
    """Activation recomputation: none | selective | full."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions over Hugging Face parameter names; each must match something."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose logits exist at a time, > 0."""


@dataclass
class ParallelConfig:
    """How the actor is laid out over ranks; data parallelism is what remains."""

    tensor: int = 1
    """Tensor-parallel ranks, >= 1."""
    pipeline: int = 1
    """Pipeline stages, >= 1."""
    context: int = 1
    """Context-parallel ranks, >= 1."""
    virtual: int = 1
    """Virtual stages of each pipeline rank, >= 1: the interleaved schedule."""
    stage_layers: list[int] = field(default_factory=list)
    """Layers of the language model on each of the pipeline x virtual stages, in order; empty:
    equally many. The first stage holds the tower too; `megatron-sr1 plan` proposes a split."""
    vision: str = "tensor"
    """The tower: tensor (layers split as the language model's) | images (whole on each rank, and
    tensor-parallel ranks share out a row's images). Context-parallel ranks always share them."""
    sequence: bool = False
    """Sequence parallelism inside tensor parallelism."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""


@dataclass
class DataConfig:
    """Shards and how a step is drawn from them."""

    train: str = ""
    """Folder of webdataset shards to learn from (tools/make_shards.py writes them)."""
    eval: str = ""
    """Folder of webdataset shards held out."""
    eval_limit: int = 0
    """Use the first so many held-out samples; 0 means all."""
    prompts_per_step: int = 512
    """GRPO: prompts rolled out a step; SFT: sequences a step."""
    shuffle: bool = True
    """New order each epoch, from the seed."""
    prompt_style: str = "full"
    """Instructions: full (published models) | brief (a model that was trained on them)."""
    packing: bool = True
    """Sequences share micro-batches; false: each has its own."""
    pack_tokens: int = 8192
    """Budget of a micro-batch: its tokens, and its images' patches at what a patch takes of the
    work of a token (docs/scaling.md); a larger sequence gets one of its own."""
    max_prompt_tokens: int = 6000
    """Longer prompts and conversations (images expanded) are skipped and counted."""
    max_skipped: int = 100
    """So many bad or too long samples stop the run."""
    min_pixels: int = 262144
    """Smallest image area, pixels."""
    max_pixels: int = 4194304
    """Largest image area, pixels."""


@dataclass
class RolloutConfig:
    """The vLLM engine and sampling."""

    tensor_parallel: int = 1
    """Ranks an engine replica spans; independent of the actor's layout."""
    samples_per_prompt: int = 8
    """Responses a prompt (n)."""
    temperature: float = 1.0
    """Pass-1 sampling temperature, > 0."""
    top_p: float = 1.0
    """Only 1 is accepted for training rollouts."""
    top_k: int = 0
    """Only 0 (off) is accepted for training rollouts."""
    max_response_tokens: int = 2048
    """Pass-1 limit."""
    pass2: str = "fork"
    """When pass 2 starts: fork (as soon as the description closes) | barrier (after pass 1)."""
    pass2_order: str = "question_first"
    """Pass-2 prompt: question_first (what a prompt's samples share comes first, so that the prefix
    cache serves it) | description_first (as published, and as the digits' model is trained)."""
    pass2_mode: str = "generate"
    """A description is judged by: generate (answers from it) | likelihood (of the gold answer,
    by prefill alone)."""
    pass2_samples: int = 1
    """Answers a description, averaged; more than 1 needs a pass2_temperature above 0."""
    pass2_temperature: float = 0.0
    """Pass-2 temperature, >= 0; 0 is greedy."""
    max_reading_tokens: int = 1024
    """Pass-2 limit."""
    max_model_len: int = 8192
    """Engine context, tokens."""
    max_num_seqs: int = 512
    """Engine slots, for both passes together."""
    gpu_memory_utilization: float = 0.5
    """Share of a GPU's memory that the engine may take (CUDA)."""
    kv_cache_gib: int = 1
    """Key/value cache on a CPU, GiB."""
    sleep_level: int = 2
    """Engine sleep between rollouts (CUDA): 0 stays awake | 1 | 2."""
    make_room: str = "gradients"
    """What of the actor's leaves the device while the engine is awake: none | gradients (they are
    made anew) | optimizer (the gradients, and the state to host memory and back)."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    quantization: str | None = None
    """Of the engine's linear layers: fp8_per_channel | fp8_per_tensor (CUDA), anew with each sync;
    needs bfloat16 weights, and a correction of the mismatch (algorithm.importance_sampling)."""
    mismatch_bound: float = 0.0
    """Largest |engine - actor| logprob among a step's sampled tokens, nats; beyond it the run
    stops. 1e-3 suits float32 on a CPU; 0 turns it off."""
    canary_bound: float = 0.0
    """After each sync engine and actor score a fixed response to a fixed image; so many nats apart
    on a token, the run stops. 1e-3 suits float32 on a CPU; 0 leaves it out."""


@dataclass
class RewardConfig:
    """What pays."""

    recipe: str = "vision_sr1"
    """vision_sr1 | see_think (same spans, no self-reward) | vision_r1 (think and answer)."""
    function: str = ""
    """FILE.py:NAME of a function that judges answers in place of the grader, from 0 to 1, those of
    pass 1 and pass 2 alike (docs/reward.md); empty: the grader."""
    accuracy_weight: float = 0.9
    """Pays a right pass-1 answer: times 0 or 1, or what reward.function gave."""
    format_weight: float = 0.1
    """Pays the recipe's form."""
    self_reward_weight: float = 1.0
    """Pays a right pass-2 answer (vision_sr1), in the same way."""
    likelihood: str = "per_token"
    """rollout.pass2_mode=likelihood, log p of the gold answer's tokens as a number in [0, 1]:
    per_token (exp of the mean) | probability (exp of the sum) | linear (1 + sum /
    likelihood_nats, at least 0)."""
    likelihood_nats: float = 10.0
    """likelihood=linear: -log p from which on nothing is paid, nats, > 0."""
    question_baseline: bool = False
    """Read each question without a description too, once a step, and pay a self-reward only for
    what it exceeds that by."""
    pay_leaks: bool = True
    """False: a description that states the answer as a verdict earns no self-reward."""
    grader: str = "rules"
    """rules (text, options, units, lists, then algebra) | math_verify (that library alone, which
    reads LaTeX and plain expressions)."""
    grader_timeout_seconds: float = 5.0
    """Time limit of a comparison, seconds."""
    max_ungraded_share: float = 1.0
    """Stop the run where more than this share of a step's prompts has an answer that took the
    grader too long or too much memory, 0 to 1; with 1 such answers never stop it."""


@dataclass
class AlgorithmConfig:
    """The policy-gradient objective; docs/algorithms.md says what makes which published one."""

    advantage: str = "grpo"
    """Within a group: grpo (centred, divided by the deviation) | dr_grpo (centred) | rloo (less the
    mean of the others)."""
    credit: str = "scalar"
    """Of the rewards: scalar (their sum) | component (answer and visual reward normalised apart,
    then added) | span (visual advantage on the description's tokens, the answer's on the rest)."""
    answer_weight: float = 0.5
    """credit=component: of the answer's advantage, > 0."""
    visual_weight: float = 0.5
    """credit=component: of the visual advantage, > 0."""
    format_share: float = 0.1
    """credit=component and span: what format adds to accuracy and to self-reward, each worth 1."""
    std_floor: float = 1e-2
    """Smallest group standard deviation that a reward is divided by (advantage=grpo)."""
    loss: str = "token_mean"
    """Mean over an update: token_mean (its tokens) | sequence_mean (tokens, then sequences) |
    dr_grpo (sequences of a constant length, rollout.max_response_tokens) | gspo (sequence_mean
    with a ratio per sequence)."""
    clip_low: float = 0.2
    """PPO ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.3
    """PPO ratio is clipped above at 1 + clip_high."""
    gspo_clip_low: float = 3e-4
    """loss=gspo: the sequence's ratio, a mean a token, is clipped below at 1 - gspo_clip_low."""
    gspo_clip_high: float = 4e-4
    """loss=gspo: and above at 1 + gspo_clip_high."""
    dual_clip: float = 3.0
    """Bound on ratio for negative advantages, > 1."""
    kl_coefficient: float = 1e-2
    """Weight of the k3 KL to the frozen reference; 0 needs no reference model."""
    importance_sampling: str = "off"
    """Weights actor / engine on the advantages: off | token | sequence."""
    importance_cap: float = 2.0
    """Largest importance weight, >= 1."""
    mask_beyond_nats: float = 0.0
    """Sequences whose mean gap actor - engine, nats a token, is larger teach nothing; 0 keeps
    all."""
    prompts_per_update: int = 128
    """Prompts of an optimizer update; divides data.prompts_per_step."""
    filter_groups: bool = False
    """Replace prompts whose responses teach nothing (no spread of rewards) by further prompts."""
    max_refills: int = 3
    """filter_groups: rollout rounds of a step behind the first, at most, >= 1."""


@dataclass
class OptimizerConfig:
    """AdamW and the learning-rate schedule."""

    num_steps: int = 100
    """Steps (rollout batches in GRPO, updates in SFT)."""
    learning_rate: float = 1e-6
    """Peak."""
    min_learning_rate: float = 0.0
    """At the end of a decay."""
    schedule: str = "constant"
    """After warm-up: constant | linear | cosine."""
    warmup_steps: int = 0
    """Updates of linear warm-up."""
    weight_decay: float = 1e-2
    """Decoupled."""
    beta1: float = 0.9
    """Adam."""
    beta2: float = 0.999
    """Adam."""
    epsilon: float = 1e-8
    """Adam."""
    clip_grad: float = 1.0
    """Largest global gradient norm."""
    state: str = "float32"
    """Master weights and moments, shared out over data-parallel ranks (docs/memory.md):
    float32 (12 bytes a parameter) | bfloat16 (6: two moments and the weights' rounding error)."""
    gradients: str = "float32"
    """Sums of gradients, whole on every data-parallel rank: float32 (4 bytes a parameter) |
    bfloat16 (2; each micro-batch adds a rounding error of 2^-9)."""
    offload: bool = False
    """Keep the state in host memory; an update brings it to the device tensor by tensor."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: int = 20
    """Save each so many steps and at the end; 0 saves at the end only."""
    keep_last: int = 2
    """Checkpoints to keep; 0 keeps all."""
    keep_best: int = 0
    """So many of the best besides. Each save is then preceded by an evaluation of greedy answers to
    data.eval (GRPO only); 0: none."""
    best_by: str = "max accuracy"
    """keep_best: which rate, and which way: max accuracy | max self_reward | max description_exact
    | min shortcut_rate."""
    asynchronous: bool = False
    """Train on while tensors are written; the snapshot takes host memory of this rank's share."""
    max_in_flight: int = 1
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

    level: str = "info"
    """debug | info | warning."""
    wandb: str = "off"
    """off | offline | online."""
    wandb_project: str = "megatron_sr1"
    """Project in wandb."""
    wandb_samples: int = 8
    """Responses in wandb's table of samples, with their images; 0: no tables."""
    wandb_tables_every: int = 10
    """Steps from one table of samples and of verdicts in wandb to the next; the first has them."""
    rollouts: bool = True
    """Save rollouts/step_N.jsonl."""
    progress: bool = True
    """Progress bar on a terminal."""
    profile_steps: list[int] = field(default_factory=list)
    """First and last step, from 1, that torch.profiler records into profile/; empty: none."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that record, each into a file of its own."""
    peak_tflops: float = 0.0
    """Of a rank's device, for MFU, 10^12 operations a second, dense bfloat16; 0: of the GPU's name
    where it is known; otherwise no MFU is told."""


@dataclass
class LaunchConfig:
    """Ranks and deadlines."""

    num_processes: int = 0
    """Ranks on this machine when the command starts torchrun itself; 0: one a GPU, 1 on a CPU."""
    device: str = "auto"
    """auto | cpu | cuda."""
    threads: int = 0
    """Threads a rank on a CPU; 0 shares the cores out."""
    setup_deadline_seconds: float = 1800.0
    """Loading of model and engine."""
    phase_deadline_seconds: float = 3600.0
    """Any other phase."""
    save_on_sigterm: bool = False
    """SIGTERM, like SIGUSR1, has the run finish its step, save and leave, instead of ending it at
    once; only SIGKILL does that then."""


@dataclass
class Config:
    """A run."""

    stage: str = "grpo"
    """sft | grpo | eval."""
    output: str = "runs/default"
    """Run directory."""
    seed: int = 1
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
