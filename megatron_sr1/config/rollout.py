"""Settings of rollouts and their rewards: the engine, sampling, both passes, grading."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config.fields import choice, number


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
