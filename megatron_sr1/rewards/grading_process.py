"""A process that grades rollouts, by the grader or by the user's function.

`python -m megatron_sr1.rewards.grading_process` reads lines of JSON: first `{"reward",
"max_response_tokens"}`, the settings, and says `{"ready": true, "takes_batch", "takes_images"}`, or
`{"ready": false, "error": str}` if the user's function cannot be loaded. Then it answers each line
`{"given": [Answered, …], "by_prompt": bool}` with `{"found": [{"reward"} or {"limit": str}, …]}`,
or with `{"error": str, "trace": str}` if the run must stop; before it calls the user's function it
says `{"calling": sample}`, so that grading_pool.py can kill it at a time limit. It exits at the end
of its input.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from megatron_sr1.config.rollout import OverlongConfig, RewardConfig, SpansConfig
from megatron_sr1.errors import ConfigError, GradingError
from megatron_sr1.records import Reward
from megatron_sr1.rewards.answered import Answered, Read
from megatron_sr1.rewards.score import Scorer
from megatron_sr1.runtime.signals import end_children


def reward_config(given: Mapping[str, Any]) -> RewardConfig:
    """Return the settings that JSON holds."""
    groups = {
        "spans": SpansConfig(**given["spans"]),
        "overlong": OverlongConfig(**given["overlong"]),
    }
    return RewardConfig(**{**given, **groups})


def answered(given: Mapping[str, Any]) -> Answered:
    """Return the record that JSON holds."""
    names = ("reading", "question_only")
    read = {name: None if given[name] is None else Read(**given[name]) for name in names}
    return Answered(**{**given, **read})


def graded(scorer: Scorer, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply about some rollouts."""
    try:
        found = scorer.score_all([answered(each) for each in asked["given"]], asked["by_prompt"])
    except GradingError as error:
        return {"error": str(error), "trace": traceback.format_exc()}
    is_reward = [isinstance(each, Reward) for each in found]
    both = zip(found, is_reward, strict=True)
    return {"found": [{"reward": each} if yes else {"limit": str(each)} for each, yes in both]}


def serve(replies: Any) -> None:
    """Answer requests until standard input ends, even if the user's function is still at work."""
    asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            asked.put(json.loads(line))
        end_children()
        os._exit(0)

    def say(reply: Mapping[str, Any]) -> None:
        try:
            replies.write(json.dumps(reply, default=vars) + "\n")
        except BrokenPipeError:  # the run is gone, and has said why
            end_children()
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    settings = asked.get()
    try:
        reward, longest = reward_config(settings["reward"]), settings["max_response_tokens"]
        scorer = Scorer(reward, longest, lambda name: say({"calling": name}))
    except ConfigError as error:
        say({"ready": False, "error": str(error)})
        return
    takes = {
        name: getattr(scorer.function, name, False) for name in ("takes_batch", "takes_images")
    }
    say({"ready": True, **takes})
    while True:
        say(graded(scorer, asked.get()))


def main() -> None:
    """Reserve standard output for replies, then serve."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that output of the user's function is not taken for a reply
    faulthandler.enable()  # shows where a function hangs if it is killed by SIGABRT
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    serve(replies)


if __name__ == "__main__":
    main()
