"""Settings of models that are asked over HTTP: a judge of answers, a reader of descriptions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config.fields import choice, number


@dataclass
class EndpointConfig:
    """A chat model behind an OpenAI-compatible endpoint, such as `vllm serve`."""

    base_url: str = ""
    """Address up to and including /v1, such as http://127.0.0.1:8000/v1; empty: none."""
    model: str = ""
    """Name of the model at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key, which is written to no file. A local
    endpoint (127.0.0.1, localhost) needs none; empty: no key is sent."""
    concurrency: int = number(16, at_least=1, at_most=1024)
    """Requests that are in progress at the same time."""
    timeout_seconds: float = number(60.0, above=0, at_most=3600)
    """Time limit of an attempt, seconds. With all its retries and the waits between them, a request
    takes at most (retries + 1) times as long."""
    retries: int = number(4, at_least=0, at_most=20)
    """Further attempts after 408, 409, 429, a 5xx status, no connection or no reply in time, with
    growing waits between them, or those that the endpoint asks for."""


@dataclass
class JudgeConfig(EndpointConfig):
    """A model that judges answers beside the rules (docs/judging.md); without base_url, none."""

    when: str = choice("rule_failed", "never", "rule_failed", "always")
    """Which answers it judges: rule_failed (those that the rules call wrong; an answer is right if
    either calls it right), always (all; its verdict counts), never."""
    temperature: float | None = number(0.0, at_least=0, at_most=2)
    """Sampling temperature of the judge; null: the endpoint's own, as some reasoning models take no
    other."""
    max_calls: int = number(0, at_least=0)
    """Most requests of one start of the command, retries not counted; what is beyond stays
    unjudged. 0: no limit."""
    cache: str = ""
    """Directory of the judge's verdicts, to share them between runs; empty: judge/ in the run
    directory."""
    max_unjudged_share: float = number(1.0, at_least=0, at_most=1)
    """If more than this share of the answers to be judged in a set got no verdict, the command
    exits with 1, after everything is written; 1 never does."""

    @property
    def is_asked(self) -> bool:
        """True if there is a judge."""
        return bool(self.base_url) and self.when != "never"
