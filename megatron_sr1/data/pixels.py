"""Images of a data set as inputs of the vision tower, read by threads before they are needed.

In: indices of samples, in the order of their use. Out: pixels, which engine and trainer of a rank
share, so that it preprocesses an image once a step. Decoding, resizing and hashing release Python's
lock, so threads read the next step's images while this one trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from megatron_sr1.data.guards import located
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.records import Example, VisionInputs


class PixelReader:
    """Reads the images of samples, in threads if `start` was called before.

    Attributes:
        started: what is read ahead and was not asked for yet, by index.
    """

    def __init__(
        self,
        reader: ShardReader,
        processor: Processor,
        example: Callable[[int], Example],
        num_threads: int,
    ) -> None:
        """Read nothing yet; without threads everything is read when it is needed."""
        self._reader, self._processor, self._example = reader, processor, example
        self._pool = ThreadPoolExecutor(num_threads, "images") if num_threads else None
        self.started: dict[int, Future[VisionInputs | None]] = {}
        self._held: dict[int, VisionInputs | None] = {}

    def start(self, indices: Iterable[int]) -> None:
        """Start to read samples that are needed soon; `get` raises their errors."""
        if self._pool is None:
            return
        for index in indices:
            if index not in self._held and index not in self.started:
                self.started[index] = self._pool.submit(self._read, index)

    def finish(self) -> None:
        """Wait until the threads are idle: a process that forks must not hold their locks."""
        wait(self.started.values())

    def get(self, index: int) -> VisionInputs | None:
        """Return the pixels of a sample, None if it has no images, and keep them.

        Raises:
            DataError: an image cannot be read.
        """
        if index not in self._held:
            started = self.started.pop(index, None)
            self._held[index] = started.result() if started else self._read(index)
        return self._held[index]

    def forget(self) -> None:
        """Free what `get` returned; what is being read ahead stays."""
        self._held.clear()

    def _read(self, index: int) -> VisionInputs | None:
        images = self._reader.images(index)
        with located(self._example(index).where):
            return self._processor.vision(images)
