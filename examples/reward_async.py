r"""A reward function that asks a model of an OpenAI-compatible endpoint, many calls at a time.

    megatron-sr1 train examples/digits_cpu.yaml reward.function=examples/reward_async.py:judged \
        reward.arguments.base_url=http://127.0.0.1:8000/v1 reward.arguments.model=NAME

docs/reward.md describes the arguments of such functions and what happens if one fails.
"""

from __future__ import annotations

from functools import cache

import openai

PROMPT = "Question: {question}\nRight answer: {gold}\nResponse: {response}\nIs it right? Yes or no:"


@cache
def client(base_url: str) -> openai.AsyncOpenAI:
    """Return the connections to an endpoint, which all calls of a process share."""
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=4)


async def judged(*, response: str, gold: str, question: str, base_url: str, model: str) -> float:
    """Return 1 if the model says that a response is right; a request that fails stops the run."""
    text = PROMPT.format(question=question, gold=gold, response=response)
    ask = client(base_url).chat.completions.create
    reply = await ask(model=model, messages=[{"role": "user", "content": text}], max_tokens=4)
    return float((reply.choices[0].message.content or "").strip().lower().startswith("yes"))
