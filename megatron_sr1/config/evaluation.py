"""Settings of evaluations: the held-out sets, how they are answered, and when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_sr1.config.endpoint import JudgeConfig
from megatron_sr1.config.fields import UNSET, named, number


@dataclass
class EvaluationSet:
    """A set of held-out questions. null: the value of the key of the same name in `evaluation`."""

    path: str = UNSET
    """Directory of webdataset shards, written by tools/make_shards.py."""
    samples_per_prompt: int | None = number(None, at_least=1)
    """Responses per question."""
    temperature: float | None = number(None, at_least=0, at_most=2)
    """Sampling temperature of pass 1; 0 is greedy."""
    max_samples: int | None = number(None, at_least=0)
    """Ask only this many questions, the first ones; 0: all."""
    function: str | None = None
    """FILE.py:NAME of a function that grades the answers to this set."""
    weight: float = number(1.0, at_least=0)
    """Weight of the set in the weighted average over all sets, such as 1/3 for each of three
    variants of the same questions; 0: not in it."""


@dataclass
class EvaluationConfig:
    """Held-out questions, and when they are asked."""

    sets: dict[str, EvaluationSet] = named(EvaluationSet)
    """Sets of questions by name, such as `{mmstar: {path: shards/mmstar}}`."""
    generate: bool = False
    """SFT: start an engine and answer the questions that have gold answers, besides the loss of
    held-out conversations, which needs none."""
    every_steps: int = number(0, at_least=0)
    """Steps between evaluations while training; 0: only one, after the last step."""
    at_start: bool = False
    """Evaluate before the first step, too."""
    samples_per_prompt: int = number(1, at_least=1)
    """Responses per question. With more than 1, accuracy is their mean, and the results have the
    share of questions with a right response (pass@k) and with a right most frequent answer
    (majority@k); needs a temperature above 0."""
    temperature: float = number(0.0, at_least=0, at_most=2)
    """Sampling temperature of pass 1; 0 is greedy."""
    max_samples: int = number(0, at_least=0)
    """Ask only this many questions of each set, the first ones; 0: all."""
    function: str = ""
    """FILE.py:NAME of a function that grades answers in evaluations; empty: as in training."""
    category: str = "category"
    """Column of the data sets' metadata by whose values the results of a set are divided."""
    chunk_prompts: int = number(512, at_least=1)
    """Questions that are read and answered at a time, over all ranks; bounds the memory that their
    images take."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def setting(self, name: str, key: str) -> Any:
        """Return what a key is for a set: its own value, or without one that of all sets."""
        own = getattr(self.sets[name], key)
        return getattr(self, key) if own is None else own
