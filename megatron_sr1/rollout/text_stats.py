"""Length and repetition of responses, for metrics and evaluation files.

In: rollouts, and a tokenizer's batch call for their descriptions. Out: the facts of each response,
and their summary. Work is per response, never per token in Python.

Source of the repetition: seq-rep-4 of Welleck et al. (arXiv 1908.04319), 1 - distinct 4-grams /
4-grams of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from megatron_sr1.records import Rollout

NGRAM = 4
"""Tokens of the n-grams whose repetition counts."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that multiplication modulo 2^64 loses nothing; from the golden ratio."""
Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class TextStats:
    """Facts about one response; their names are keys of evaluation lines.

    Attributes:
        response_tokens: sampled tokens, the end of turn included.
        description_tokens: tokens of the description by itself, without its marks; None if there is
            no closed description.
        truncated: 1 if the token limit cut the response, else 0.
        repetition: share of its 4-grams that occurred in it before; None with fewer than 4 tokens.
    """

    response_tokens: int
    description_tokens: int | None
    truncated: int
    repetition: float | None


def text_stats(rollouts: Sequence[Rollout], encode: Encode) -> list[TextStats]:
    """Return the facts of each response; `encode` tokenises many texts at once."""
    distinct = list(dict.fromkeys(r.description for r in rollouts if r.description is not None))
    lengths: dict[str | None, int] = {}
    if distinct:
        lengths |= zip(distinct, map(len, encode(distinct)), strict=True)
    shares = repeated_shares([rollout.completion.token_ids for rollout in rollouts])
    return [
        TextStats(
            response_tokens=len(rollout.completion.token_ids),
            description_tokens=lengths.get(rollout.description),
            truncated=int(rollout.completion.finish_reason == "length"),
            repetition=share,
        )
        for rollout, share in zip(rollouts, shares, strict=True)
    ]


def repeated_shares(sequences: Sequence[Sequence[int]]) -> list[float | None]:
    """Return for each sequence the share of its n-grams that occurred in it before, in [0, 1).

    None if it is shorter than one. N-grams are compared by a hash of 64 bits.
    """
    lengths = np.array([len(token_ids) for token_ids in sequences], np.int64)
    num_ngrams = np.maximum(lengths - NGRAM + 1, 0)
    sequence = np.repeat(np.arange(len(sequences)), num_ngrams)
    # The first tokens of n-grams: the last tokens of each sequence start none.
    others = lengths - num_ngrams
    starts = np.arange(len(sequence)) + np.repeat(np.cumsum(others) - others, num_ngrams)
    ids = np.array(list(chain.from_iterable(sequences)), np.uint64)
    hashed = np.zeros(len(sequence), np.uint64)
    for place in range(NGRAM):
        hashed = hashed * _MULTIPLIER + ids[starts + place]
    order = np.lexsort((hashed, sequence))
    sequence, hashed = sequence[order], hashed[order]
    again = (np.diff(hashed) == 0) & (np.diff(sequence) == 0)
    repeated = np.bincount(sequence[1:][again], minlength=len(sequences))
    pairs = zip(repeated.tolist(), num_ngrams.tolist(), strict=True)
    return [num / among if among else None for num, among in pairs]


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return mean, 95th percentile and maximum of the lengths, and the means of the shares.

    `rows` have the names of `TextStats`, such as lines of an evaluation file; what no row has is
    absent.
    """
    found: dict[str, float] = {}
    for name in ("response_tokens", "description_tokens"):
        if values := _values(rows, name):
            found[f"{name}_mean"] = float(np.mean(values))
            found[f"{name}_p95"] = float(np.percentile(values, 95))
            found[f"{name}_max"] = float(max(values))
    for name, metric in (("truncated", "truncated_share"), ("repetition", "repetition")):
        if values := _values(rows, name):
            found[metric] = float(np.mean(values))
    return found


def step_metrics(rollouts: Sequence[Rollout], encode: Encode) -> dict[str, float]:
    """Return the summary of a step's responses under its names in metrics.jsonl."""
    found = summarize([vars(stats) for stats in text_stats(rollouts, encode)])
    return {f"rollout/{name}": value for name, value in found.items()}


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]
