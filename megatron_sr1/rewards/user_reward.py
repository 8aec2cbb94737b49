"""The user's own reward function, which replaces the grader.

No other code of the user is executed, and this only if `reward.function` names it. Any failure in
it stops the run and names sample and function, instead of scoring 0.
"""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from megatron_sr1.errors import ConfigError, GradingError

ARGUMENTS = ("response", "gold", "question", "description", "metadata")
"""The function's keyword arguments."""
MODULE = "megatron_sr1_user_reward"
MAX_SHOWN_CHARACTERS = 200
BROKEN = (Exception, SystemExit)
"""Includes SystemExit: sys.exit(0) would end this rank as if it had succeeded."""


class UserReward:
    """The function that `reward.function` names, with its results checked."""

    def __init__(self, named: str) -> None:
        """Load the function `FILE.py:NAME`; a relative path starts in the working directory.

        Raises:
            ConfigError: file or function is missing, the file cannot be loaded, or the function
                does not accept ARGUMENTS.
        """
        self._setting = f"reward.function={named}"
        file, _, name = named.rpartition(":")
        self._path = Path(file).resolve()
        if self._path.suffix != ".py" or not name.isidentifier():
            raise ConfigError(f"{self._setting}; expected FILE.py:NAME")
        if not self._path.is_file():
            raise ConfigError(f"{self._setting}: {self._path}: no such file")
        spec = importlib.util.spec_from_file_location(MODULE, self._path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BROKEN as error:
            raise ConfigError(f"{self._setting}: {self._describe(error)}") from error
        self._call: Any = getattr(module, name, None)
        if not callable(self._call):
            functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
            available = f"it has {', '.join(functions)}" if functions else "it has no function"
            raise ConfigError(f"{self._setting}: no function {name} in the file; {available}")
        try:
            inspect.signature(self._call).bind(**dict.fromkeys(ARGUMENTS))
        except TypeError as error:
            raise ConfigError(
                f"{self._setting}: {error}; it is called with {', '.join(ARGUMENTS)} as keywords"
            ) from None

    def __call__(self, sample_name: str, **given: str | None | Mapping[str, Any]) -> float:
        """Call the function with ARGUMENTS and return its result, in [0, 1].

        Raises:
            GradingError: the function raised, or returned anything but such a number.
        """
        where = f"{sample_name}: {self._setting}"
        try:
            value = self._call(**given)
        except BROKEN as error:
            raise GradingError(f"{where} {self._describe(error)}") from error
        if not isinstance(value, Real) or not 0 <= float(value) <= 1:
            shown = repr(value)[:MAX_SHOWN_CHARACTERS]
            raise GradingError(f"{where} returned {shown}; expected a number from 0 to 1")
        return float(value)

    def _describe(self, error: BaseException) -> str:
        """Describe an exception and the last line of the user's file in its traceback."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self._path)]
        place = f" ({self._path.name} line {lines[-1]})" if lines else ""
        return f"raised {type(error).__name__}: {error}{place}"
