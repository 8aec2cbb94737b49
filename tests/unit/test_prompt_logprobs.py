"""Logprobs of a prompt, as vLLM asks our sampler for them: few of them in float32 at a time.

Not covered: that vLLM asks so; tests/parity has scored responses of the engine.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sr1.rollout.sampler import FullVocabularySampler

NUM_TOKENS, VOCABULARY = 1000, 301


class Tensors(NamedTuple):
    """vLLM's record of the same name."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor


class Outputs:
    LogprobsTensors = Tensors


class Largest(TorchDispatchMode):
    """Records the largest float32 tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


def test_chosen_logprobs_are_exact_and_take_float32_memory_for_few_tokens():
    generator = torch.Generator().manual_seed(3)
    logits = (9 * torch.randn(NUM_TOKENS, VOCABULARY, generator=generator)).bfloat16()
    chosen = torch.randint(0, VOCABULARY, (NUM_TOKENS,), generator=generator)
    sampler = FullVocabularySampler(lambda: np.zeros(0), Outputs, ())
    with Largest() as largest:
        found = sampler.gather_logprobs(sampler.compute_logprobs(logits), 0, chosen)
    assert largest.numel < 0.3 * NUM_TOKENS * VOCABULARY
    exact = logits.double().log_softmax(-1).gather(1, chosen[:, None])
    assert (
        found.logprobs.dtype == torch.float32 and found.token_ids[:, 0].tolist() == chosen.tolist()
    )
    torch.testing.assert_close(found.logprobs.double(), exact, rtol=0, atol=2e-5)
