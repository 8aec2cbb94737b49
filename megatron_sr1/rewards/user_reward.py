"""A reward function of the user's, in place of the grader.

In: `FILE.py:NAME` and, a rollout at a time, a response, its gold answer, question, description and
metadata. Out: a number from 0 to 1. The file is the one thing of a user's that is executed, and
only where `reward.function` names it; what it is given stays text. Whatever goes wrong in it
stops the run and names sample and function: nothing of this scores 0.
"""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from megatron_sr1.errors import ConfigError, GradingError

ARGUMENTS = ("response", "gold", "question", "description", "metadata")
"""Names of what the function is called with, all by name."""
MODULE = "megatron_sr1_own_reward"
MAX_SHOWN_CHARACTERS = 200
BROKEN = (Exception, SystemExit)
"""sys.exit(0) would end this rank as if all were done."""


class UserReward:
    """The function that `reward.function` names, and its result checked."""

    def __init__(self, named: str) -> None:
        """Load the file and take the function.

        Args:
            named: `FILE.py:NAME`; a relative path starts in the working directory.

        Raises:
            ConfigError: no such file or name, the file cannot be loaded, or the function does not
                take what it would be given.
        """
        self._setting = f"reward.function={named}"
        file, _, self._name = named.rpartition(":")
        self._path = Path(file).resolve()
        self._call = self._load()
        try:
            inspect.signature(self._call).bind(**dict.fromkeys(ARGUMENTS))
        except TypeError as error:
            raise ConfigError(
                f"{self._setting}: {error}; it is called with {', '.join(ARGUMENTS)}, all by name"
            ) from None

    def _load(self) -> Callable[..., Any]:
        if self._path.suffix != ".py" or not self._name.isidentifier():
            raise ConfigError(f"{self._setting}; expected FILE.py:NAME")
        if not self._path.is_file():
            raise ConfigError(f"{self._setting}: {self._path}: no such file")
        spec = importlib.util.spec_from_file_location(MODULE, self._path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BROKEN as error:
            raise ConfigError(f"{self._setting}: {self._told(error)}") from error
        found = getattr(module, self._name, None)
        if not callable(found):
            functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
            held = f"it has {', '.join(functions)}" if functions else "it has no function"
            raise ConfigError(f"{self._setting}: no function {self._name} in the file; {held}")
        return found

    def __call__(self, sample_name: str, **given: str | None | Mapping[str, Any]) -> float:
        """The function's reward of one text.

        Args:
            sample_name: for messages.
            given: ARGUMENTS.

        Returns:
            a number in [0, 1].

        Raises:
            GradingError: it raised, or returned anything else.
        """
        where = f"{sample_name}: {self._setting}"
        try:
            value = self._call(**given)
        except BROKEN as error:
            raise GradingError(f"{where} {self._told(error)}") from error
        if not isinstance(value, Real) or not 0 <= float(value) <= 1:
            shown = repr(value)[:MAX_SHOWN_CHARACTERS]
            raise GradingError(f"{where} returned {shown}; expected a number from 0 to 1")
        return float(value)

    def _told(self, error: BaseException) -> str:
        """What was raised, and the last line of the user's file on the way there."""
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(self._path)
        ]
        place = f" ({self._path.name} line {lines[-1]})" if lines else ""
        return f"raised {type(error).__name__}: {error}{place}"
