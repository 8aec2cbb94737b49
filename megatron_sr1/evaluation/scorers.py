"""What grades each held-out set: the rules, or a function of the user's.

In: the configuration. Out: what grades each set, by its name, as long as an evaluation needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from megatron_sr1.config.rollout import OverlongConfig, RewardConfig
from megatron_sr1.config.run import Config
from megatron_sr1.rewards.grading_pool import GradingPool


@contextmanager
def evaluation_scorers(
    config: Config, names: Iterable[str] | None = None, is_leader: bool = True
) -> Iterator[dict[str, GradingPool]]:
    """Yield what grades each set, by its name; sets with the same function share it.

    By default the sets are those of `evaluation.sets`; one that is not among them has no function
    of its own. `is_leader` says whether this rank grades.
    """
    by_function: dict[str, GradingPool] = {}
    by_name: dict[str, GradingPool] = {}
    with ExitStack() as stack:
        for name in config.evaluation.sets if names is None else names:
            function = function_of(config, name)
            if function not in by_function:
                pool = GradingPool(reward_of(config, function), is_leader=is_leader)
                by_function[function] = stack.enter_context(pool)
            by_name[name] = by_function[function]
        yield by_name


def reward_of(config: Config, function: str) -> RewardConfig:
    """Return what an evaluation with a function grades by, or with the grader if it has none.

    With see_think descriptions are read too, so that the tables can be compared. Range and
    arguments are those of `reward.function`, and another function has none.
    """
    reward, plain = config.reward, RewardConfig()
    recipe = "vision_r1" if reward.recipe == "vision_r1" else "vision_sr1"
    given = reward if function == _for_accuracy(reward) else plain
    return replace(
        reward,
        recipe=recipe,
        function=function,
        function_for="accuracy",
        function_range=given.function_range,
        arguments=given.arguments,
        overlong=OverlongConfig(),
    )


def function_of(config: Config, name: str) -> str:
    """Return the function that grades a set: its own, that of evaluations, or that of training.

    A function for the total grades no answers.
    """
    own = config.evaluation.sets[name].function if name in config.evaluation.sets else None
    if own is not None:
        return own
    return config.evaluation.function or _for_accuracy(config.reward)


def _for_accuracy(reward: RewardConfig) -> str:
    return reward.function if reward.function_for == "accuracy" else ""
