"""Settings of training: data, objective, optimizer, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config.fields import choice, number


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
