"""Settings of training: data, objective, optimizer, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config.fields import UNSET, choice, named, number


@dataclass
class MixtureSet:
    """One of several training sets."""

    path: str = UNSET
    """Directory of webdataset shards, written by tools/make_shards.py."""
    weight: float = number(1.0, above=0)
    """The set's part of every step is its weight, divided by the sum of all weights."""


@dataclass
class DataConfig:
    """Training data, and how a step is drawn and packed."""

    train: str = ""
    """Directory of webdataset shards to train on, written by tools/make_shards.py."""
    mixture: dict[str, MixtureSet] = named(MixtureSet)
    """Several training sets by name, in place of data.train, such as `{math: {path: shards/math,
    weight: 2}, charts: {path: shards/charts}}`."""
    prompts_per_step: int = number(512, at_least=1)
    """GRPO: prompts per rollout step. SFT: sequences per update."""
    shuffle: bool = True
    """Shuffle the samples of each epoch, with the run's seed."""
    pass1_template: str = "full"
    """Prompt of pass 1: full (for published models), brief (a model trained with it, such as the
    demo's), or the path of a Jinja file (docs/prompts.md)."""
    pass2_template: str = "full"
    """Prompt of pass 2: full or brief (the question first, so that responses to a prompt share a
    prefix, which the prefix cache reuses), full_description_first or brief_description_first (the
    order published), or the path of a Jinja file."""
    system_prompt: str = ""
    """System turn of both passes, and of conversations without one; empty: what the chat template
    writes by itself."""
    image_position: str = choice("keep", "keep", "first", "last")
    """Where the only image of a question is: keep (at its mark), first (before the question's
    text), last (after it, before what the template adds, as published)."""
    chat_template: str = ""
    """Path of a Jinja file that replaces the model's chat template and is exported with the model;
    empty: the model's own."""
    packing: bool = True
    """Pack several sequences into a micro-batch; false: one sequence per micro-batch."""
    pack_tokens: int = number(8192, at_least=1)
    """Size limit of a micro-batch, tokens. An image patch counts as the fraction of a token that
    its computation costs, and what a micro-batch computes once for several samples counts once
    (docs/scaling.md). A longer sequence gets a micro-batch of its own."""
    max_prompt_tokens: int = number(6000, at_least=1)
    """Skip and count longer prompts and conversations; image tokens included."""
    image_threads: int = number(4, at_least=0)
    """Threads of a rank that read and preprocess images, those of the next step while the actor
    trains; 0: none, images are read when they are needed."""
    max_skipped: int = number(100, at_least=0)
    """Abort after more than this many unusable samples."""
    min_pixels: int = number(262144, at_least=784, at_most=2**27)
    """Smallest image area, pixels; smaller images are enlarged. A token covers 28 x 28 pixels."""
    max_pixels: int = number(4194304, at_least=784, at_most=2**27)
    """Largest image area, pixels, before rounding to whole patches (docs/data.md)."""

    @property
    def sets(self) -> dict[str, str]:
        """Directories of the training sets by name; that of `train` has the name ""."""
        return {name: each.path for name, each in self.mixture.items()} or {"": self.train}

    @property
    def shares(self) -> dict[str, float]:
        """Part of a step that each training set has, by its name."""
        total = sum(each.weight for each in self.mixture.values())
        return {name: each.weight / total for name, each in self.mixture.items()} or {"": 1.0}

    @property
    def paths(self) -> dict[str, str]:
        """Directories of the training sets by configuration key."""
        return {
            f"data.mixture.{name}.path" if name else "data.train": path
            for name, path in self.sets.items()
        }

    @property
    def row_budget(self) -> int:
        """Size limit of a micro-batch, tokens; 0 if each sequence has one of its own."""
        return self.pack_tokens if self.packing else 0


@dataclass
class AlgorithmConfig:
    """The policy-gradient objective; docs/algorithms.md has the settings of published methods."""

    advantage: str = choice("grpo", "grpo", "dr_grpo", "rloo")
    """How the rewards of a prompt's responses become advantages: grpo (minus their mean, divided by
    their standard deviation), dr_grpo (minus their mean), rloo (minus the mean of the others)."""
    credit: str = choice("scalar", "scalar", "component", "span")
    """Which reward a token is credited with: scalar (the sum of rewards), component (answer and
    visual reward are normalized separately, then added), span (the visual advantage for tokens of
    the description, that of the answer for the others)."""
    answer_weight: float = number(0.5, above=0)
    """Weight of the answer's advantage with credit=component."""
    visual_weight: float = number(0.5, above=0)
    """Weight of the visual advantage with credit=component."""
    format_share: float = number(0.1, at_least=0)
    """Weight of the format reward beside that of an answer, 1, with credit=component and span."""
    std_floor: float = number(1e-2, above=0)
    """Lower limit of the standard deviation that advantage=grpo divides by."""
    loss: str = choice("token_mean", "token_mean", "sequence_mean", "dr_grpo", "gspo")
    """What the loss is averaged over in an update: token_mean (all tokens), sequence_mean (the
    tokens of each sequence, then sequences), dr_grpo (as if each sequence had
    rollout.max_response_tokens tokens), gspo (as sequence_mean, with one ratio per sequence)."""
    clip_low: float = number(0.2, at_least=0, at_most=1)
    """The PPO ratio is clipped to at least 1 - clip_low."""
    clip_high: float = number(0.3, at_least=0)
    """The PPO ratio is clipped to at most 1 + clip_high."""
    gspo_clip_low: float = number(3e-4, at_least=0, at_most=1)
    """Replaces clip_low with loss=gspo."""
    gspo_clip_high: float = number(4e-4, at_least=0)
    """Replaces clip_high with loss=gspo."""
    dual_clip: float = number(3.0, above=1)
    """Upper limit of the ratio where the advantage is negative."""
    kl_coefficient: float = number(1e-2, at_least=0)
    """Weight of the KL penalty (k3 estimate) towards a frozen reference model; 0 needs none."""
    importance_sampling: str = choice("off", "off", "token", "sequence")
    """Weight advantages by the probability ratio of actor and engine, per token or sequence."""
    importance_cap: float = number(2.0, at_least=1)
    """Largest importance weight."""
    mask_beyond_nats: float = number(0.0, at_least=0)
    """Exclude sequences whose mean difference of actor and engine logprobs is larger, nats per
    token; 0 excludes none."""
    prompts_per_update: int = number(128, at_least=1)
    """Prompts per optimizer update; must divide data.prompts_per_step."""
    filter_groups: bool = False
    """Replace prompts whose responses all have the same reward by further prompts."""
    max_refills: int = number(3, at_least=1)
    """Most additional rollout rounds of a step with filter_groups."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    num_steps: int | None = number(100, at_least=1)
    """Steps of the run: rollout batches in GRPO, updates in SFT. Unsets num_epochs."""
    num_epochs: float | None = number(None, above=0)
    """Passes over the training data, rounded up to whole steps; unsets num_steps. An
    epoch of data.mixture is as many samples as all its sets have together."""
    learning_rate: float = number(1e-6, above=0, at_most=1)
    """Peak learning rate."""
    min_learning_rate: float = number(0.0, at_least=0, at_most=1)
    """Learning rate at the end of a decay."""
    schedule: str = choice("constant", "constant", "linear", "cosine")
    """Learning rate after warm-up: constant, or a linear or cosine decay."""
    warmup_steps: int = number(0, at_least=0)
    """Updates over which the learning rate rises linearly from 0; unsets warmup_ratio."""
    warmup_ratio: float | None = number(None, at_least=0, at_most=1)
    """The same as a share of all updates, rounded up; unsets warmup_steps."""
    weight_decay: float = number(1e-2, at_least=0)
    """Decoupled weight decay."""
    beta1: float = number(0.9, at_least=0, below=1)
    """Decay rate of Adam's first moment."""
    beta2: float = number(0.999, at_least=0, below=1)
    """Decay rate of Adam's second moment."""
    epsilon: float = number(1e-8, at_least=1e-30, at_most=1)
    """Added to the denominator of Adam's update."""
    clip_grad: float = number(1.0, at_least=0)
    """Largest global gradient norm; 0: no clipping."""
    state: str = choice("float32", "float32", "bfloat16")
    """Master weights and moments, sharded over data-parallel ranks (docs/memory.md): float32 (12
    bytes per parameter), bfloat16 (6: two moments and the rounding error of the weights)."""
    gradients: str = choice("float32", "float32", "bfloat16")
    """Accumulated gradients, on every data-parallel rank: float32 (4 bytes per parameter), bfloat16
    (2; each micro-batch adds a rounding error of 2^-9)."""
    offload: bool = False
    """Keep the optimizer state in host memory and move it to the device tensor by tensor."""


@dataclass
class CheckpointConfig:
    """Saving, resuming and exporting."""

    every_steps: int = number(20, at_least=0)
    """Steps between checkpoints; one is always saved at the end. 0: only that one."""
    keep_last: int = number(2, at_least=0)
    """Number of latest checkpoints to keep; 0 keeps all."""
    keep_best: int = number(0, at_least=0)
    """Number of best checkpoints to keep in addition (GRPO only). Each save is then preceded by an
    evaluation."""
    best_by: str = choice(
        "max accuracy",
        *("max accuracy", "max self_reward", "max description_exact", "min shortcut_rate"),
        "min loss",
    )
    """Which rate of the first of evaluation.sets makes a checkpoint one of the best, and in which
    direction."""
    asynchronous: bool = False
    """Train on while tensors are written; takes host memory for a copy of the rank's share."""
    max_in_flight: int = number(1, at_least=1)
    """Most asynchronous saves at the same time; the next one waits for the oldest."""
    resume: bool = True
    """Continue from `checkpoints/latest` in the run directory, if there is one."""
    verify: bool = True
    """Compare checksums before a Megatron checkpoint is loaded; false: file sizes only."""
    export_hf: bool = True
    """Write the Hugging Face model to `hf/` at the end of the run; with adapters, merged, and the
    adapters in PEFT's format to `adapter/`."""
