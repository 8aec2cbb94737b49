"""Counts of a data set that becomes shards: rows, faults by kind, prompts by length.

It can be saved between two rows and restored, so that a report does not depend on interruptions.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_sr1.errors import DataError

log = logging.getLogger(__name__)
NUM_EXAMPLES = 3
"""Messages of each kind of fault in the report."""
NUM_SHOWN = 10
"""Messages of each kind of fault that are reported while reading."""
BUCKETS = tuple(2**n for n in range(4, 26))
"""Upper ends of the histogram's first buckets, tokens."""
PERCENTILES = (50, 90, 99, 100)


class Length(NamedTuple):
    """Tokens of a prompt: of its text, and of its images."""

    text: int
    image: int


@dataclass
class Tally:
    """Counts the rows read, those skipped by kind of fault, and prompts by length.

    Attributes:
        limit: how many rows may be skipped, a count or a percentage of those read.
        image_path: column where images must be found; empty if any row may have none.
        say: called with a line about the first rows of each kind that are skipped.
        kinds: kind of fault -> (count, first messages).
        given: good rows so far, and of these `with_images` have images.
        too_long: rows left out as their prompts are too long.
        lengths: (text, image) tokens -> prompts, those left out included.
    """

    limit: str = "0"
    image_path: str = ""
    say: Callable[[str], None] = log.warning
    rows: int = 0
    skipped: int = 0
    given: int = 0
    with_images: int = 0
    too_long: int = 0
    kinds: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    lengths: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add_fault(self, where: str, error: DataError) -> None:
        """Count a row that cannot be used."""
        self.skipped += 1
        kind = kind_of(str(error), where)
        count, examples = self.kinds.get(kind, (0, []))
        examples = [*examples, str(error)] if count < NUM_EXAMPLES else examples
        self.kinds[kind] = count + 1, examples
        if count < NUM_SHOWN:
            self.say(f"skipped: {error}")
        elif count == NUM_SHOWN:
            self.say(f"skipped: more of this kind ({kind}); counted from here on")

    def too_many(self) -> bool:
        """Return True if more rows were skipped than the limit allows, of those read so far."""
        allowed = float(self.limit.rstrip("%"))
        return self.skipped > (allowed * self.rows / 100 if self.limit.endswith("%") else allowed)

    def check(self) -> None:
        """Raise DataError if too many rows were skipped, or no image was found where expected."""
        if self.too_many():
            raise DataError(
                f"{self.skipped} of {self.rows} rows ({self.skipped / self.rows:.1%}) cannot be "
                f"used, --max-skipped is {self.limit}; correct the source, or raise it to "
                f"{self.skipped} to leave them out"
            )
        if self.image_path and not self.with_images:
            raise DataError(
                f"no row has an image at {self.image_path}, where --column looks; correct the path"
            )

    def state(self) -> dict[str, Any]:
        """Return the counts as a JSON value."""
        lengths = [[*length, count] for length, count in sorted(self.lengths.items())]
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "kinds": self.kinds, "lengths": lengths}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the counts over from `state`."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.kinds = {kind: (count, texts) for kind, (count, texts) in state["kinds"].items()}
        self.lengths = Counter({(text, image): n for text, image, n in state["lengths"]})

    def report(self, written: int) -> dict[str, Any]:
        """Return the contents of report.json, the most frequent kind first."""
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1][0])
        found = {
            "rows": self.rows,
            "written": written,
            "skipped": self.skipped,
            "max_skipped": self.limit,
            "kinds": [{"kind": k, "count": c, "examples": texts} for k, (c, texts) in kinds],
        }
        if self.lengths:
            found |= {"too_long": self.too_long, "prompt_tokens": self.histograms()}
        return found

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Return buckets and percentiles of the prompts' lengths: text, image and total."""
        parts = {"text": lambda n: n[0], "image": lambda n: n[1], "total": sum}
        found = {}
        for name, part in parts.items():
            counts: Counter[int] = Counter()
            for length, count in self.lengths.items():
                counts[part(length)] += count
            found[name] = {"percentiles": _percentiles(counts), "up_to": _buckets(counts)}
        return found


_COUNTS = ("rows", "skipped", "given", "with_images", "too_long")


def kind_of(message: str, where: str) -> str:
    """Return a message without the row's name and without what differs from row to row."""
    text = re.sub("^: (image [0-9]+: )?", "", message.removeprefix(where))
    return re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[0-9]+", "…", text)[:80]


def _percentiles(counts: Counter[int]) -> dict[str, int]:
    """Return the least length that as many percent of the prompts do not exceed."""
    found, seen, total = {}, 0, counts.total()
    left = iter(sorted(counts.items()))
    length = 0
    for percent in PERCENTILES:
        while seen * 100 < percent * total:
            length, count = next(left)
            seen += count
        found[str(percent)] = length
    return found


def _buckets(counts: Counter[int]) -> dict[str, int]:
    """Return how many prompts have a length up to each end, and above the one before it."""
    found: dict[str, int] = {}
    ends: Iterable[int] = (0, *BUCKETS)
    for length, count in counts.items():
        end = str(next(each for each in ends if length <= each))
        found[end] = found.get(end, 0) + count
    return {str(end): found[str(end)] for end in ends if str(end) in found}
