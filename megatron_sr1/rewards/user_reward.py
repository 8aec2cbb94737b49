"""The user's own reward function: it grades answers, or gives the total reward.

In: what the function may be told of answers. Out: scores, each checked, with further metrics. The
function is passed the arguments that its signature names; one that names `responses` is called
once for all answers to a prompt, and coroutines run concurrently. No other code of the user is
executed, and this only if the configuration names it. Any failure in it stops the run and names
sample and function, instead of scoring 0.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import ConfigError, GradingError

PLURAL = {"response": "responses", "description": "descriptions", "num_tokens": "num_tokens"}
"""Argument that differs between the answers to a prompt -> its name if the function takes them all,
which is then a list."""
PLURAL_OF_TOTAL = {
    **{"reading": "readings", "accuracy": "accuracies", "format": "formats"},
    **{"self_reward": "self_rewards", "leak": "leaks", "total": "totals"},
}
"""The same, for a function that gives the total."""
SHARED = ("gold", "question", "metadata", "images", "image_paths")
ALWAYS = ("response", "gold", "question", "description", "metadata")
"""Arguments that a function with `**rest` is passed even if it does not name them."""
RESERVED = {
    *("accuracy", "format", "total", "overlong", "self_reward", "shortcut_rate", "leak_rate"),
    *("uncomparable", "ungraded", "ungraded_share"),
}
"""Names of metrics of the trainer's own."""
MODULE = "megatron_sr1_user_reward"
MAX_SHOWN_CHARACTERS = 200
BROKEN = (Exception, SystemExit, asyncio.CancelledError)
"""Includes SystemExit: sys.exit(0) would end this process as if it had succeeded."""


@dataclass(frozen=True)
class Call:
    """An answer to be scored.

    Attributes:
        golds: gold answers; the function is called for each, and the best score counts.
        given: the other arguments by name, of which the function gets those that it names.
        image_paths: files of the sample's images.
    """

    sample_name: str
    golds: Sequence[str]
    given: Mapping[str, Any]
    image_paths: Sequence[str] = ()


@dataclass(frozen=True)
class Score:
    """What the function returned for an answer."""

    value: float
    metrics: Mapping[str, float]


class UserReward:
    """A function that the configuration names, with its results checked.

    Attributes:
        takes_batch: it is called once for all answers to a prompt.
        takes_images: it is passed the images of the sample.
        is_async: it is a coroutine function.
    """

    def __init__(
        self,
        named: str,
        reward: RewardConfig | None = None,
        on_call: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Load the function `FILE.py:NAME`; a relative path starts in the working directory.

        Args:
            named: the function.
            reward: what it is for, its range, time limit and further arguments; by default it
                grades answers from 0 to 1.
            on_call: is passed the name of a sample before the function is called about it.

        Raises:
            ConfigError: file or function is missing, the file cannot be loaded, or the function
                does not accept its arguments.
        """
        reward = reward or RewardConfig()
        self._setting = f"reward.function={named}"
        self._range, self._on_call = reward.function_range, on_call
        self._timeout_seconds = reward.function_timeout_seconds
        self._path = Path(named.rpartition(":")[0]).resolve()
        self._call = self._load(named)
        self.is_async = any(map(inspect.iscoroutinefunction, (self._call, self._call.__call__)))
        self._runner = asyncio.Runner()
        parameters = self._signature().parameters
        self.takes_batch = "responses" in parameters
        plural = PLURAL | (PLURAL_OF_TOTAL if reward.function_for == "total" else {})
        self._plural = {name: plural[name] if self.takes_batch else name for name in plural}
        has_rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        always = [self._plural.get(name, name) for name in ALWAYS]
        known = list(dict.fromkeys([*always, *self._plural.values(), *SHARED]))
        self._names = [n for n in known if n in parameters or (has_rest and n in always)]
        self.takes_images = not {"images", "image_paths"}.isdisjoint(self._names)
        self._arguments = self._checked_arguments(reward.arguments, known)

    def _load(self, named: str) -> Any:
        path, name = self._path, named.rpartition(":")[2]
        if path.suffix != ".py" or not name.isidentifier():
            raise ConfigError(f"{self._setting}; expected FILE.py:NAME")
        if not path.is_file():
            raise ConfigError(f"{self._setting}: {path}: no such file")
        spec = importlib.util.spec_from_file_location(MODULE, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BROKEN as error:
            raise ConfigError(f"{self._setting}: {self._describe(error)}") from error
        call = getattr(module, name, None)
        if not callable(call):
            functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
            available = f"it has {', '.join(functions)}" if functions else "it has no function"
            raise ConfigError(f"{self._setting}: no function {name} in the file; {available}")
        return call

    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self._call)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self._setting}: {error}; expected a Python function") from None

    def _checked_arguments(
        self, arguments: Mapping[str, Any], known: Sequence[str]
    ) -> dict[str, Any]:
        """Return `reward.arguments`, if the function can be called with them."""
        for name in arguments:
            if name in known:
                problem = "is what the trainer passes; choose another name"
                raise ConfigError(f"{self._setting}: reward.arguments.{name} {problem}")
        try:
            self._signature().bind(**dict.fromkeys([*self._names, *arguments]))
        except TypeError as error:
            raise ConfigError(
                f"{self._setting}: {error}; it is called with {', '.join(known)} as keywords, as "
                f"far as it names them, and with reward.arguments"
            ) from None
        return dict(arguments)

    def __call__(self, sample_name: str, *, gold: str, **given: Any) -> float:
        """Return the score of one answer; the keywords are the arguments of a single one.

        Raises:
            GradingError: the function raised, or returned anything but a score.
        """
        ((score,),) = self.judge([[Call(sample_name, (gold,), given)]])
        return score.value

    def judge(self, prompts: Sequence[Sequence[Call]]) -> list[list[Score]]:
        """Return the scores of answers, which are grouped by prompt.

        Raises:
            GradingError: the function raised, or returned anything but scores.
        """
        units = prompts if self.takes_batch else [[call] for calls in prompts for call in calls]
        if self.is_async:
            found = self._runner.run(self._concurrently([self._judge(unit) for unit in units]))
        else:
            found = [_finished(self._judge(unit)) for unit in units]
        scores = chain.from_iterable(found)
        return [[next(scores) for _ in calls] for calls in prompts]

    async def _concurrently(self, units: Sequence[Any]) -> list[list[Score]]:
        found = await asyncio.gather(*units, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return [each for each in found if isinstance(each, list)]

    async def _judge(self, calls: Sequence[Call]) -> list[Score]:
        """Return the best scores over the gold answers of one prompt."""
        best: list[Score] = []
        for gold in calls[0].golds or ("",):
            found = await self._score(calls, gold)
            best = [max(p, key=lambda s: s.value) for p in zip(best or found, found, strict=True)]
            if all(score.value == self._range[1] for score in best):
                break
        return best

    async def _score(self, calls: Sequence[Call], gold: str) -> list[Score]:
        """Call the function about answers to one prompt and check what it returns."""
        where = f"{calls[0].sample_name}: {self._setting}"
        given = self._given(calls, gold)
        self._on_call(calls[0].sample_name)
        limit = asyncio.timeout(self._timeout_seconds) if self.is_async else None
        try:
            found = self._call(**given, **self._arguments)
            if limit is not None:
                async with limit:
                    found = await found
        except BROKEN as error:
            if limit is not None and limit.expired():
                raise GradingError(self.timed_out(calls[0].sample_name)) from None
            raise GradingError(f"{where} {self._describe(error)}") from error
        if not self.takes_batch:
            return [self._checked(where, found)]
        has_items = hasattr(found, "__len__") and not isinstance(found, (str, bytes, Mapping))
        if not has_items or len(found) != len(calls):
            said = f"{len(found)} scores" if has_items else repr(found)[:MAX_SHOWN_CHARACTERS]
            raise GradingError(f"{where} returned {said} for {len(calls)} responses")
        names = [call.sample_name for call in calls]
        both = zip(names, found, strict=True)
        return [self._checked(f"{name}: {self._setting}", value) for name, value in both]

    def timed_out(self, sample_name: str) -> str:
        """Return the message of a call that took too long."""
        limit = f"more than {self._timeout_seconds:g} s (reward.function_timeout_seconds)"
        return f"{sample_name}: {self._setting} took {limit}"

    def _given(self, calls: Sequence[Call], gold: str) -> dict[str, Any]:
        """Return the arguments that the function names."""
        first = {**calls[0].given, "gold": gold, "image_paths": list(calls[0].image_paths)}
        if isinstance(first.get("metadata"), Mapping):
            first["metadata"] = dict(first["metadata"])
        if "images" in self._names:
            from PIL import Image

            first["images"] = [Image.open(p).convert("RGB") for p in calls[0].image_paths]
        given = {name: first[name] for name in SHARED if name in self._names}
        for name, as_named in self._plural.items():
            if as_named in self._names:
                values = [call.given.get(name) for call in calls]
                given[as_named] = values if self.takes_batch else values[0]
        return given

    def _checked(self, where: str, value: Any) -> Score:
        """Return what the function returned for one answer, if it is a score."""
        low, high = self._range
        metrics = dict(value) if isinstance(value, Mapping) else {}
        score = metrics.pop("score", None) if isinstance(value, Mapping) else value
        if not isinstance(score, Real) or not low <= float(score) <= high:
            shown, among = repr(value)[:MAX_SHOWN_CHARACTERS], "" if not metrics else " as 'score'"
            expected = f"expected a number from {low:g} to {high:g}{among} (reward.function_range)"
            raise GradingError(f"{where} returned {shown}; {expected}")
        for name, metric in metrics.items():
            if name in RESERVED or not str(name).isidentifier():
                problem = "expected a name of letters, digits and _ that the trainer does not have"
                raise GradingError(f"{where} returned the metric {name!r}; {problem}")
            if not isinstance(metric, Real) or not math.isfinite(float(metric)):
                shown = f"{name!r}: {repr(metric)[:MAX_SHOWN_CHARACTERS]}"
                raise GradingError(f"{where} returned the metric {shown}; expected a finite number")
        return Score(float(score), {str(name): float(metrics[name]) for name in metrics})

    def _describe(self, error: BaseException) -> str:
        """Describe an exception and the last line of the user's file in its traceback."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self._path)]
        place = f" ({self._path.name} line {lines[-1]})" if lines else ""
        return f"raised {type(error).__name__}: {error}{place}"

    def close(self) -> None:
        """Cancel what coroutines are still doing."""
        self._runner.close()


def _finished(coroutine: Coroutine[Any, Any, list[Score]]) -> list[Score]:
    """Return the result of a coroutine that never waits, without an event loop.

    So a plain function may start a loop of its own.
    """
    try:
        coroutine.send(None)
    except StopIteration as finished:
        return list(finished.value)
    raise AssertionError("it waits")
