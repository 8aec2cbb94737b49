"""Settings of rollouts and rewards: engine, sampling, both passes, grading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_sr1.config.endpoint import EndpointConfig
from megatron_sr1.config.fields import any_keys, choice, number

BOXED = "boxed"
r"""Name of an answer's span that is `\boxed{…}`."""
LARGEST_LORA_RANK = 512
"""Of vLLM's own LoRA (vllm/config/lora.py)."""


@dataclass
class RolloutConfig:
    """The vLLM engine and sampling."""

    tensor_parallel: int = number(1, at_least=1)
    """Ranks per engine replica; independent of the actor's layout."""
    samples_per_prompt: int = number(8, at_least=1)
    """Responses per prompt."""
    temperature: float = number(1.0, at_least=0.01, at_most=2)
    """Sampling temperature of pass 1. The limits are those of vLLM."""
    top_p: float = number(1.0, above=0, at_most=1)
    """Must be 1: rollouts are sampled from the whole distribution."""
    top_k: int = number(0, at_least=0)
    """Must be 0 (off), for the same reason."""
    max_response_tokens: int = number(2048, at_least=1)
    """Token limit of a response in pass 1."""
    pass2: str = choice("fork", "fork", "barrier")
    """When pass 2 of a response starts: fork (after its description), barrier (after pass 1)."""
    pass2_mode: str = choice("generate", "generate", "likelihood", "endpoint")
    """How a description is judged: generate (by answers sampled from it), likelihood (by the
    likelihood of the gold answer given the description, from prefill alone), endpoint (by answers
    of the model at rollout.endpoint, which reads while the engine samples)."""
    pass2_samples: int = number(1, at_least=1)
    """Answers per description; verdicts are averaged. More than 1 needs pass2_temperature > 0."""
    pass2_temperature: float = number(0.0, at_least=0, at_most=2)
    """Sampling temperature of pass 2; 0 is greedy."""
    max_reading_tokens: int = number(1024, at_least=1)
    """Token limit of an answer in pass 2."""
    max_model_len: int = number(8192, at_least=2)
    """Context length of the engine, tokens."""
    max_num_seqs: int = number(512, at_least=1, at_most=8192)
    """Most sequences in the engine at the same time, of both passes together. vLLM refuses more
    than the token limit of an engine step."""
    gpu_memory_utilization: float = number(0.5, above=0, at_most=1)
    """Fraction of a GPU's memory that the engine may use."""
    kv_cache_gib: float = number(1.0, above=0)
    """Size of the key/value cache on a CPU, GiB."""
    lora: str = choice("merged", "merged", "engine")
    """How the engine gets adapters: merged (their layers' weights with the adapters added), engine
    (the adapters alone, for vLLM's own LoRA; adapters of the language model's layers only, and a
    sleep level below 2)."""
    sleep_level: int = number(2, at_least=0, at_most=2)
    """vLLM's sleep level between rollouts on a GPU; 0 keeps the engine awake."""
    make_room: str = choice("gradients", "none", "gradients", "optimizer", "weights")
    """What the actor releases while the engine is awake: none, gradients (allocated again later),
    optimizer (gradients, and the optimizer state is moved to host memory and back), weights
    (gradients, and weights that are not trained, of which host memory keeps a copy)."""
    enforce_eager: bool = False
    """Run the engine without CUDA graphs."""
    quantization: str | None = choice(None, None, "fp8_per_channel", "fp8_per_tensor")
    """FP8 quantization of the engine's linear layers, repeated with each sync (CUDA). Needs
    bfloat16 weights and a correction of the mismatch (algorithm.importance_sampling)."""
    mismatch_bound: float = number(0.0, at_least=0)
    """Stop the run if logprobs of engine and actor differ by more than this on a sampled token,
    nats. 1e-3 suits float32 on a CPU; 0: no limit."""
    canary_bound: float = number(0.0, at_least=0)
    """After each sync, engine and actor score a fixed response to a fixed image; stop the run if
    they differ by more than this on a token, nats. 1e-3 suits float32 on a CPU; 0: no such check.
    """
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class SpansConfig:
    r"""The spans of a response; one with the name NAME is `<NAME>…</NAME>`."""

    description: str = "description"
    """Name of the span that describes the image."""
    think: str = "think"
    """Name of the span with the thoughts."""
    answer: str = BOXED
    r"""Name of the span with the answer; boxed is LaTeX's `\boxed{…}`."""
    think_first: bool = False
    """The thoughts come first, before a description, and their opening mark may be in the prompt:
    for models whose chat template opens `<think>` itself, such as Qwen3's."""


@dataclass
class OverlongConfig:
    """Soft penalty of long responses, as in DAPO (arXiv 2503.14476, equation 13)."""

    cache_tokens: int = number(0, at_least=0)
    """Last tokens of rollout.max_response_tokens over which the penalty grows from 0 to 1; 0: no
    penalty. DAPO has 4,096 of 20,480."""
    weight: float = number(1.0, at_least=0)
    """Weight of the penalty, which is subtracted from the total."""


@dataclass
class RewardConfig:
    """What is rewarded, and how answers are graded."""

    recipe: str = choice("vision_sr1", "vision_sr1", "see_think", "vision_r1")
    """Form of the response: vision_sr1 (description, thought, answer; with self-reward), see_think
    (the same without self-reward), vision_r1 (thought, answer)."""
    spans: SpansConfig = field(default_factory=SpansConfig)
    function: str = ""
    """FILE.py:NAME of a function of your own (docs/reward.md); empty: none."""
    function_for: str = choice("accuracy", "accuracy", "total")
    """What reward.function replaces: accuracy (it grades answers in place of the grader, in pass 1
    and pass 2 alike), total (it gives each response's total reward, and the grader still judges
    both passes)."""
    function_range: list[float] = number([0.0, 1.0], at_least=-1000000, at_most=1000000)
    """Lowest and highest value that reward.function may return; any other stops the run."""
    function_timeout_seconds: float = number(60.0, above=0, at_most=86400)
    """Time limit per call of reward.function, and of a function of an evaluation, seconds."""
    arguments: dict[str, Any] = any_keys()
    """Further keyword arguments of reward.function by name, such as `{tolerance: 0.1}`."""
    accuracy_weight: float = number(0.9, at_least=0)
    """Weight of the pass-1 answer's grade, which is 0 or 1, or what a reward.function for accuracy
    returned."""
    format_weight: float = number(0.1, at_least=0)
    """Weight of the response having the recipe's form."""
    self_reward_weight: float = number(1.0, at_least=0)
    """Weight of the pass-2 answer's grade (recipe=vision_sr1)."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    likelihood: str = choice("per_token", "per_token", "probability", "linear")
    """How rollout.pass2_mode=likelihood maps the gold answer's token logprobs to [0, 1]: per_token
    (exp of their mean), probability (exp of their sum), linear (1 + sum / likelihood_nats, at
    least 0)."""
    likelihood_nats: float = number(10.0, above=0)
    """Negative log-likelihood at which likelihood=linear reaches 0, nats."""
    question_baseline: bool = False
    """Subtract from the self-reward the result of answering from the question alone."""
    pay_leaks: bool = True
    """Give a self-reward to descriptions that state the answer as a conclusion."""
    grader: str = choice("rules", "rules", "math_verify")
    """rules (text, options, units, lists, then algebra), math_verify (that library alone)."""
    grader_timeout_seconds: float = number(5.0, above=0, at_most=3600)
    """Time limit per comparison, seconds."""
    workers: int = number(2, at_least=1, at_most=64)
    """Most processes per engine replica that grade while the engine samples. They start when
    needed, and each has the grader, or reward.function, loaded."""
    max_ungraded_share: float = number(1.0, at_least=0, at_most=1)
    """Stop the run if more than this share of a step's prompts has an answer that exceeded the
    grader's time or memory limit; 1 never stops it."""
