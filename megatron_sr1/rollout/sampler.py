"""Our sampler in place of vLLM's: banned ids, full-vocabulary logprobs, draws by seed and position.

Each id is the inverse of the cumulative distribution at one uniform number, which is a hash of the
request's seed and the position in its sequence. So a sequence is the same in any batch and after a
preemption, up to rounding on CUDA, and between devices. No kernel is launched per sequence, as vLLM
does for requests with generators of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy, as in vLLM."""
SCORED_TOKENS = 256
"""Tokens of a prompt whose logits are in float32 at the same time."""
_GOLDEN, _FIRST, _SECOND = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class FullVocabularySampler(torch.nn.Module):
    """Replaces vLLM's sampler: excludes banned ids, but reports logprobs of the full softmax.

    A step of the engine samples one id per sequence from the softmax restricted to the ids that are
    not banned. Its logprob is log_softmax(logits / temperature)[id] over the whole vocabulary
    (temperature 1 for greedy sequences), so that an actor that does not know the bans computes the
    same number: under the restricted distribution it would be larger by -log(1 - mass of the banned
    ids), the same for every id of a position.

    Not supported, as no request uses them: penalties, stop-word bans, min-p, top-k, top-p, the
    logprobs of alternatives, and ranks.
    """

    logprobs_mode = "raw_logprobs"

    def __init__(
        self, positions: Callable[[], np.ndarray], outputs: Any, banned_token_ids: Iterable[int]
    ) -> None:
        """Prepare for one engine.

        Args:
            positions: returns the number of tokens of each sequence so far, in the batch's order.
            outputs: vLLM's module of output records.
            banned_token_ids: ids that are never sampled.
        """
        super().__init__()
        self._positions, self._outputs = positions, outputs
        self._banned = torch.tensor(sorted(set(banned_token_ids)), dtype=torch.int64)

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: Any,
        predict_bonus_token: bool = False,
        logprobs_mode_override: str | None = None,
    ) -> Any:
        """Sample one id per row of logits [sequences, vocabulary], which are overwritten.

        Returns vLLM's `SamplerOutput`. The last two arguments, which vLLM passes, are not used.
        """
        logits = logits.float()
        temperature = sampling_metadata.temperature
        if temperature is not None:
            greedy = temperature < GREEDY_BELOW
            logits.div_(temperature.masked_fill(greedy, 1.0).unsqueeze(1))
        wanted = sampling_metadata.max_num_logprobs is not None
        log_total = logits.logsumexp(dim=-1, keepdim=True) if wanted else None
        if self._banned.numel():
            self._banned = self._banned.to(logits.device)
            logits.index_fill_(1, self._banned, float("-inf"))
        if sampling_metadata.all_greedy:
            drawn = logits.argmax(dim=-1)
        else:
            drawn = draw(logits, self._uniforms(sampling_metadata.generators, len(logits)))
            if not sampling_metadata.all_random:
                drawn = torch.where(greedy, logits.argmax(dim=-1), drawn)
        tensors = None
        if log_total is not None:
            logprobs = logits.gather(1, drawn.unsqueeze(1)) - log_total
            tensors = self._tensors(drawn.unsqueeze(1), logprobs)
        return self._outputs.SamplerOutput(drawn.int().unsqueeze(1), tensors)

    def _uniforms(self, generators: Mapping[int, torch.Generator], num_rows: int) -> np.ndarray:
        """Return a number in [0, 1) for each row; `generators` have the seeds of the rows."""
        seeds = np.zeros(num_rows, np.uint64)
        for row, generator in generators.items():
            seeds[row] = generator.initial_seed()
        return uniforms(seeds, self._positions()[:num_rows])

    @staticmethod
    def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
        """Return the logits, for `gather_logprobs`; vLLM calls both for a prompt's positions.

        In float32 the logprobs of all positions would take 600 KB a token beside the engine's
        memory limit.
        """
        return logits

    def gather_logprobs(
        self, logits: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
    ) -> Any:
        """Return the float32 logprobs of given tokens by logits [tokens, vocabulary]."""
        assert num_logprobs == 0, "alternatives are not supported"
        columns = token_ids.unsqueeze(1)
        parts = logits.split(SCORED_TOKENS)
        totals = torch.cat([part.float().logsumexp(dim=-1, keepdim=True) for part in parts])
        return self._tensors(columns, logits.gather(1, columns).float() - totals)

    def _tensors(self, token_ids: torch.Tensor, logprobs: torch.Tensor) -> Any:
        ranks = torch.zeros(len(token_ids), dtype=torch.int64, device=token_ids.device)
        return self._outputs.LogprobsTensors(token_ids.int(), logprobs, ranks)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return float64 numbers in [0, 1), independent for different seeds or positions.

    Source: SplitMix64 (Steele, Lea and Flood 2014), a counter's value mixed, here twice: by the
    seed, then by the position.
    """
    counted = _mixed(seeds.astype(np.uint64) + _GOLDEN) + positions.astype(np.uint64) * _GOLDEN
    return (_mixed(counted) >> np.uint64(11)) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def draw(logits: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
    """Return the id of each row of float32 logits [rows, vocabulary] at a uniform number [rows].

    An id of logit -inf is never drawn.
    """
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    if len(logits) == 1:  # CUDA adds up a single row in an order that varies, and ranks must agree
        weights = weights.repeat(2, 1)
    ends = weights.cumsum_(dim=-1)[: len(logits)]
    total = ends[:, -1:].clone()
    numbers = torch.from_numpy(uniform).to(torch.float32)
    if logits.is_cuda:  # else the host would wait for the GPU
        numbers = numbers.pin_memory()
    wanted = numbers.to(logits.device, non_blocking=True).unsqueeze(1) * total
    # Below the total even after rounding, so that some id's end lies above it.
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(ends, torch.minimum(wanted, below), right=True).squeeze(1)
