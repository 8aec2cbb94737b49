"""Jinja templates as untrusted programs: in a sandbox, within limits of time and size.

A chat template comes with a model and is rendered by transformers, whose sandbox has no limits. A
prompt template is a file of the user's; it is rendered in the same kind of sandbox. Both run inside
`run_limited`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from jinja2 import Template, TemplateSyntaxError, meta
from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_sr1.data.guards import MAX_TEXT_CHARACTERS, printable, read_file
from megatron_sr1.errors import ConfigError, DataError

T = TypeVar("T")
TEMPLATE_SECONDS = 10.0
"""Limit of processor time per rendering; usual templates take milliseconds."""
MAX_RENDERED_CHARACTERS = 4 * MAX_TEXT_CHARACTERS
MAX_TEMPLATE_BYTES = 2**18


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


_SANDBOX = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
)
"""Configured as transformers does for chat templates."""
_SANDBOX.globals["raise_exception"] = _raise
_SANDBOX.filters["tojson"] = _to_json  # jinja's own escapes characters of HTML


def read_template(key: str, path: str) -> str:
    """Return the text of a template file that a key of the configuration names.

    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    try:
        return read_file(Path(path), MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={path}: not UTF-8: {error.reason}") from None
    except DataError as error:
        raise ConfigError(f"{key}={path}: {error}; expected a Jinja file") from None


def compile_template(source: str, name: str) -> tuple[Template, frozenset[str]]:
    """Return a compiled template and the names of the variables that it uses.

    Raises:
        DataError: it does not parse; the message has `name` and the line.
    """

    def compiled() -> tuple[Template, frozenset[str]]:
        used = meta.find_undeclared_variables(_SANDBOX.parse(source))
        template = _SANDBOX.from_string(source)
        template.globals = dict(template.globals)  # else a ChainMap, copied key by key each time
        return template, frozenset(used - _SANDBOX.globals.keys())

    return run_limited(compiled, name)


def render(call: Callable[[], list[str]], name: str) -> list[str]:
    """Return the texts that `call` renders.

    Raises:
        DataError: the template fails, takes too long or writes too much; the message has `name`.
    """
    texts = run_limited(call, name)
    longest = max(map(len, texts))
    if longest > MAX_RENDERED_CHARACTERS:
        limit = f"{longest} characters; the limit is {MAX_RENDERED_CHARACTERS}"
        raise DataError(f"{name} writes {limit}")
    return texts


def run_limited(call: Callable[[], T], name: str) -> T:
    """Return what `call` returns; a DataError, with `name`, if it raises or takes too long.

    A call within another has the outer one's time, as setting a limit takes as long as a rendering.
    """
    try:
        with _time_limit(TEMPLATE_SECONDS):
            return call()
    except DataError:  # of a rendering within a call that renders several
        raise
    except TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {printable(error.message or '')}"
        raise DataError(f"{name} does not parse: {problem}") from None
    except Exception as error:  # a template can raise anything, as can the sandbox
        reason = printable(f"{type(error).__name__}: {error}")
        raise DataError(f"{name} fails: {reason}") from None


class _Stop:
    """Handler of the signal that ends a call; `is_set` within such a call."""

    is_set = False

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {self._seconds:g} s")


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after this much processor time, which does not depend on machine load."""
    # Only the main thread receives signals.
    if _Stop.is_set or threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGPROF, _Stop(seconds))
    left, _ = signal.setitimer(signal.ITIMER_PROF, seconds)
    _Stop.is_set = True
    try:
        yield
    finally:
        _Stop.is_set = False
        signal.setitimer(signal.ITIMER_PROF, left)  # the caller's own timer; 0: none
        signal.signal(signal.SIGPROF, before)
