"""Processes that grade rollouts while the engine still samples.

In: rollouts as they are finished. Out: their rewards, the same as if they were graded afterwards,
one after the other, as each depends on its prompt's responses alone. The engine's loop only queues
rollouts; threads pass them on, and wait for the processes (grading_process.py). The user's function
runs there, too, so that one that hangs can be killed.
"""

from __future__ import annotations

import math
import queue
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sr1.config.rollout import RewardConfig
from megatron_sr1.errors import ConfigError, GradingError, GradingLimit
from megatron_sr1.records import Example, Reward, Rollout
from megatron_sr1.rewards.answered import Finished, Key, answered
from megatron_sr1.rewards.math_worker import EXIT_SECONDS, GraderProcess
from megatron_sr1.rewards.score import Scorer

COMMAND = (sys.executable, "-m", "megatron_sr1.rewards.grading_process")
MAX_CHUNK = 64
"""Most prompts' rollouts that a process is passed at a time; coroutines of a chunk run
concurrently."""
GRACE_SECONDS = 2.0
"""Time beyond its limit after which a call of the user's function is killed from outside."""
CLOSING_SECONDS = 5.0
Found = Reward | GradingLimit


class ProcessEnded(GradingError):
    """A grading process died; another one may grade what it was asked."""


class FunctionTraceback(Exception):
    """The traceback of another process, as text."""


class GradingPool(AbstractContextManager["GradingPool"]):
    """Grades rollouts in up to `reward.workers` processes; a context manager that stops them."""

    def __init__(
        self,
        reward: RewardConfig,
        max_response_tokens: int = 0,
        is_leader: bool = True,
    ) -> None:
        """Start no process yet, but one if there is a function, to see whether that loads.

        Args:
            reward: the recipe.
            max_response_tokens: where the penalty of `reward.overlong` ends.
            is_leader: whether this rank grades at all.

        Raises:
            ConfigError: the user's function cannot be loaded.
        """
        self._settings = {"reward": asdict(reward), "max_response_tokens": max_response_tokens}
        self._reward = reward
        self._without_answers = Scorer(RewardConfig(reward.recipe, reward.spans))
        self._changed = threading.Condition()
        self._queue: deque[list[Finished]] = deque()  # each is graded as a whole
        self._held: dict[int, list[Finished]] = {}  # prompts with responses to come
        self._known: dict[Key, Found | None] = {}  # None: not graded yet
        self._limits: dict[int, GradingLimit] = {}  # first one of a prompt
        self._failure: Exception | None = None
        self._is_grouped = self._is_closed = False
        self._num_workers = self._num_idle = 0
        self._num_unsorted = 0  # submissions that the sorting thread has not queued
        self._inbox: queue.SimpleQueue[tuple[Iterable[Finished], int] | None] = queue.SimpleQueue()
        self._sorter: threading.Thread | None = None
        self._threads: list[threading.Thread] = []
        self._processes: list[GraderProcess] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._paths: dict[int, list[Path]] = {}
        self._writing = threading.Lock()
        self._takes_batch = self._takes_images = False
        if reward.function and is_leader:
            self._start_worker(self._start())

    def submit(self, finished: Iterable[Finished], group_size: int) -> None:
        """Have rollouts graded; a thread iterates over them, so that this takes no time.

        `group_size` is the number of rollouts of each prompt, of which all are left out if one
        meets a limit; 0: they stand by themselves, and `results` follows.

        Raises:
            GradingError: an earlier rollout could not be graded.
        """
        if self._failure is not None:
            raise self._failure
        if self._sorter is None:
            self._sorter = self._started(self._sort)
        with self._changed:
            self._num_unsorted += 1
        self._inbox.put((finished, group_size))

    def results(self, finished: Sequence[Finished]) -> list[Found]:
        """Return the rewards of rollouts, in order; those that were not submitted are now.

        Raises:
            GradingError: the grader or the user's function is broken, or a gold answer.
        """
        if not finished:
            return []
        self.submit(finished, 0)
        keys = [each.key for each in finished]
        with self._changed:
            self._changed.wait_for(
                # What is sorted after its reward was taken would be graded, and kept, once more.
                lambda: (
                    self._failure
                    or not self._num_unsorted
                    and all(self._known.get(key) is not None for key in keys)
                )
            )
            if self._failure is not None:
                raise self._failure
            found = [self._known.pop(key) for key in keys]
            self._limits.clear()
        self._forget_images()
        return [each for each in found if each is not None]

    def ungraded(self, rollout: Rollout, example: Example) -> Reward:
        """Return zero rewards for a rollout that could not be graded."""
        return self._without_answers.ungraded(rollout, example)

    def _started(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, name="grading", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _sort(self) -> None:
        """Queue what is submitted, until the pool is closed or grading fails."""
        with self._failing():
            while (item := self._inbox.get()) is not None:
                finished, group_size = item
                found = list(finished)
                with self._changed:
                    self._queue_up(found, group_size)
                    self._num_unsorted -= 1

    def _queue_up(self, finished: Sequence[Finished], group_size: int) -> None:
        """Queue rollouts that are not known yet, by prompt if the function takes batches."""
        new = [each for each in finished if each.key not in self._known]
        self._known |= dict.fromkeys(each.key for each in new)
        self._is_grouped = self._is_grouped if new == [] else group_size > 0
        if not self._takes_batch:
            self._queue.extend([each] for each in new)
        for each in new if self._takes_batch else ():
            group = self._held.setdefault(each.rollout.index, [])
            group.append(each)
            if len(group) == group_size:
                self._queue.append(self._held.pop(each.rollout.index))
        if not group_size:
            self._queue.extend(self._held.values())
            self._held.clear()
        while self._num_idle < len(self._queue) and self._num_workers < self._reward.workers:
            self._start_worker()
        self._changed.notify_all()

    def _start_worker(self, process: GraderProcess | None = None) -> None:
        self._num_workers += 1
        self._num_idle += 1
        self._started(self._work, process)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Keep an exception of a thread for `submit` and `results`."""
        try:
            yield
        except Exception as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _start(self) -> GraderProcess:
        """Start a process and wait until it is ready."""
        process = GraderProcess(COMMAND, is_watched=False)
        self._processes.append(process)
        try:
            process.ask(self._settings)
            ready = process.wait_ready()
        except (OSError, ValueError) as error:
            code = process.stop(EXIT_SECONDS)
            raise GradingError(f"the grading process ended (exit status {code}): {error}") from None
        if not ready["ready"]:
            process.stop(EXIT_SECONDS)
            raise ConfigError(ready["error"])
        self._takes_batch, self._takes_images = ready["takes_batch"], ready["takes_images"]
        return process

    def _work(self, process: GraderProcess | None) -> None:
        """Have a process grade what is queued until the pool is closed or grading fails."""
        with self._failing():
            while chunk := self._take():
                process = process or self._start()
                # A prompt with a limit is left out as a whole, so the others need no time.
                left = [each for each in chunk if each.rollout.index not in self._limits]
                try:
                    found = self._graded(process, left) if left else []
                except ProcessEnded:  # such as by the system's out-of-memory killer
                    process = self._start()
                    found = self._graded(process, left)
                self._keep(chunk, dict(zip([each.key for each in left], found, strict=True)))
        if process is not None:
            process.stop(EXIT_SECONDS)

    def _keep(self, chunk: Sequence[Finished], found: Mapping[Key, Found]) -> None:
        """Make what was found about a chunk known; the others are of a prompt with a limit."""
        with self._changed:
            for each in chunk:
                index = each.rollout.index
                reward = found.get(each.key) or self._limits[index]
                self._known[each.key] = reward
                if self._is_grouped and isinstance(reward, GradingLimit):
                    self._limits.setdefault(index, reward)
            self._num_idle += 1
            self._changed.notify_all()

    def _take(self) -> list[Finished]:
        """Wait for rollouts and return this process's share of those that are queued."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed or self._failure)
            if self._is_closed or self._failure:
                return []
            self._num_idle -= 1
            share = math.ceil(len(self._queue) / self._reward.workers)
            groups = [self._queue.popleft() for _ in range(min(share, MAX_CHUNK))]
        return [each for group in groups for each in sorted(group, key=lambda each: each.key)]

    def _graded(self, process: GraderProcess, chunk: Sequence[Finished]) -> list[Found]:
        """Have a process grade rollouts.

        Raises:
            ProcessEnded: the process died, and not in the user's function.
            GradingError: the grader or the user's function is broken, or a gold answer.
        """
        given = [answered(each, self._image_paths(each)) for each in chunk]
        called, reply = "", dict[str, Any]()
        limit = self._reward.function_timeout_seconds + GRACE_SECONDS
        try:
            process.ask({"given": given, "by_prompt": self._is_grouped})
            while "found" not in reply:
                reply = process.reply(limit if called else math.inf)
                called = reply.get("calling", called)
                if "error" in reply:
                    raise GradingError(reply["error"]) from FunctionTraceback(reply["trace"])
        except TimeoutError:
            process.abort()
            took = f"took more than {limit - GRACE_SECONDS:g} s (reward.function_timeout_seconds)"
            what = f"{called}: reward.function={self._reward.function} {took}"
            raise GradingError(f"{what}; its stack is above") from None
        except (OSError, ValueError) as error:
            code = process.stop(EXIT_SECONDS)
            ended = f"the grading process ended (exit status {code}): {error}"
            if called:
                what = f"{called}: reward.function={self._reward.function}"
                raise GradingError(f"{what}: {ended}") from None
            raise ProcessEnded(f"{chunk[0].name} to {chunk[-1].name}: {ended}") from None
        found = reply["found"]
        return [Reward(**e["reward"]) if "reward" in e else GradingLimit(e["limit"]) for e in found]

    def _image_paths(self, finished: Finished) -> Sequence[str]:
        """Return the files of a sample's images, written once, for a function that takes them."""
        index = finished.rollout.index
        if not self._takes_images or finished.image_files is None:
            return ()
        with self._writing:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="megatron_sr1_images_")
            if index not in self._paths:
                files = list(enumerate(finished.image_files()))
                folder = Path(self._folder.name)
                self._paths[index] = [folder / f"{index}.{number}" for number, _ in files]
                for path, (_, data) in zip(self._paths[index], files, strict=True):
                    path.write_bytes(data)
            return [str(path) for path in self._paths[index]]

    def _forget_images(self) -> None:
        """Remove the images of the rollouts that are graded."""
        with self._writing:
            for path in (path for paths in self._paths.values() for path in paths):
                path.unlink()
            self._paths.clear()

    def __exit__(self, *_: object) -> None:
        """Stop all processes, busy or not."""
        with self._changed:
            self._is_closed = True
            self._inbox.put(None)
            self._changed.notify_all()
            for process in self._processes:
                process.close_input()
        for thread in self._threads:
            thread.join(CLOSING_SECONDS)
        if self._folder is not None:
            self._folder.cleanup()
