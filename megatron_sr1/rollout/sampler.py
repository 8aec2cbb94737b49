"""Sampling that excludes banned ids but reports logprobs of the full softmax.

In: the engine's logits of one step. Out: one id per sequence and its logprob

    log_softmax(logits / temperature)[id]        (temperature 1 for greedy sequences)

over the whole vocabulary, so that an actor that does not know the bans computes the same number.
The id is sampled from that softmax restricted to the ids that are not banned: its logprob under the
restricted distribution would be larger by -log(1 - mass of the banned ids), the same for every id
of a position.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_GREEDY_BELOW = 1e-5


class FullVocabularySampler(torch.nn.Module):
    """Replaces vLLM's sampler in its model runner.

    Not supported, as no request uses them: penalties, stop-word bans, min-p, top-k, top-p, the
    logprobs of alternatives, and ranks.
    """

    logprobs_mode = "raw_logprobs"

    def __init__(self, draw: torch.nn.Module, outputs: Any, banned_token_ids: Iterable[int]):
        """Wrap vLLM's `TopKTopPSampler`, which uses each request's generator; never sample bans.

        `outputs` is vLLM's module of output records.
        """
        super().__init__()
        self.topk_topp_sampler = draw
        self._outputs = outputs
        self._banned = torch.tensor(sorted(set(banned_token_ids)), dtype=torch.int64)

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: Any,
        predict_bonus_token: bool = False,
        logprobs_mode_override: str | None = None,
    ) -> Any:
        """Sample one id per row of logits [sequences, vocabulary], which are overwritten.

        Returns:
            vLLM's `SamplerOutput`. The last two arguments, which vLLM passes, are not used.
        """
        logits = logits.float()
        temperature = sampling_metadata.temperature
        if temperature is not None:
            greedy = temperature < _GREEDY_BELOW
            logits.div_(temperature.masked_fill(greedy, 1.0).unsqueeze(1))
        wanted = sampling_metadata.max_num_logprobs is not None
        log_total = logits.logsumexp(dim=-1, keepdim=True) if wanted else None
        if self._banned.numel():
            self._banned = self._banned.to(logits.device)
            logits.index_fill_(1, self._banned, float("-inf"))
        if sampling_metadata.all_greedy:
            drawn = logits.argmax(dim=-1)
        else:
            drawn = self._draw(logits, sampling_metadata.generators)
            if not sampling_metadata.all_random:
                drawn = torch.where(greedy, logits.argmax(dim=-1), drawn)
        tensors = None
        if log_total is not None:
            logprobs = logits.gather(1, drawn.unsqueeze(1)) - log_total
            tensors = self._tensors(drawn.unsqueeze(1), logprobs)
        return self._outputs.SamplerOutput(drawn.int().unsqueeze(1), tensors)

    def _draw(self, logits: torch.Tensor, generators: dict[int, torch.Generator]) -> torch.Tensor:
        """Sample with each row's generator; preserves the trainer's CPU random state."""
        state = torch.get_rng_state()
        drawn, _ = self.topk_topp_sampler(logits, generators, None, None)
        torch.set_rng_state(state)
        return drawn.long().view(-1)

    @staticmethod
    def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
        """Return float32 logprobs; vLLM calls it for prompt positions."""
        return logits.log_softmax(dim=-1, dtype=torch.float32)

    def gather_logprobs(
        self, logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
    ) -> Any:
        """Select logprobs [tokens, vocabulary] of given tokens; vLLM calls it for prompts."""
        assert num_logprobs == 0, "alternatives are not supported"
        columns = token_ids.unsqueeze(1)
        return self._tensors(columns, logprobs.gather(1, columns))

    def _tensors(self, token_ids: torch.Tensor, logprobs: torch.Tensor) -> Any:
        ranks = torch.zeros(len(token_ids), dtype=torch.int64, device=token_ids.device)
        return self._outputs.LogprobsTensors(token_ids.int(), logprobs, ranks)
