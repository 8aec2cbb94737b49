"""What grades each held-out set: the rules, or a function of the user's.

In: the configuration. Out: a scorer by the name of each set, as long as an evaluation needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from megatron_sr1.config.run import Config
from megatron_sr1.rewards.score import Scorer


@contextmanager
def evaluation_scorers(
    config: Config, names: Iterable[str] | None = None
) -> Iterator[dict[str, Scorer]]:
    """Yield the scorer of each set, by its name; sets with the same function share one.

    By default the sets are those of `evaluation.sets`; one that is not among them has no function
    of its own. With see_think descriptions are read too, so that the tables can be compared.
    """
    recipe = "vision_r1" if config.reward.recipe == "vision_r1" else "vision_sr1"
    by_function: dict[str, Scorer] = {}
    by_name: dict[str, Scorer] = {}
    with ExitStack() as stack:
        for name in config.evaluation.sets if names is None else names:
            function = function_of(config, name)
            if function not in by_function:
                reward = replace(config.reward, recipe=recipe, function=function)
                by_function[function] = stack.enter_context(Scorer(reward))
            by_name[name] = by_function[function]
        yield by_name


def function_of(config: Config, name: str) -> str:
    """Return the reward function of a set: its own, that of evaluations, or that of training."""
    own = config.evaluation.sets[name].function if name in config.evaluation.sets else None
    return own if own is not None else config.evaluation.function or config.reward.function
