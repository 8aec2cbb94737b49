r"""Write webdataset shards from source files.

SRC is a parquet, jsonl or json file, a directory of such files, or a directory of images with
metadata.jsonl (file_name and the columns below). Columns with a meaning:

  problem, question or prompt      the question; <image> marks an image (\<image>: the text)
  answer or solution               the gold answer, or a list of accepted answers
  images or image                  paths, bytes, data: URIs
  messages or conversations        turns {role, content} or {from, value}; content may be parts
  instruction, input, output       a conversation as in alpaca; with history
  prompt, reward_model             as in verl: a list of messages, and a ground_truth
  system                           a system turn, with any of them

All others are kept as metadata. A row that cannot be used is reported, skipped and counted; rows
without an image are fine. At the end the kinds of faults are listed with their counts; examples of
each are in DST/report.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import write_shards
from megatron_sr1.data.sources import ALPACA_GAPS, COLUMNS, count_rows, records, source_files
from megatron_sr1.errors import DataError, SR1Error
from megatron_sr1.runtime.files import write_text

EPILOG = """\
examples:
  python tools/make_shards.py questions.jsonl shards/questions
  python tools/make_shards.py data/ shards/mine --image-folder pictures --max-skipped 5%
  python tools/make_shards.py rows.parquet shards/rows --column problem=prompt.0.content \\
      --column answer=extra_info.answer

exit status: 0 if the shards are written, 1 if more rows were skipped than --max-skipped allows or
the source cannot be read (nothing usable is left in DST then), 2 for a wrong option.
"""
REPORT_FILE = "report.json"
NUM_EXAMPLES = 3
"""Messages of each kind of fault in the report."""
NUM_SHOWN = 10
"""Messages of each kind of fault on stderr while reading."""


def max_skipped(text: str) -> str:
    """Return the limit of skipped rows, which must be a count or a percentage."""
    share = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text)
    if re.fullmatch("[0-9]{1,12}", text) or (share and float(share[1]) <= 100):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}; expected a count or a share, as 100 or 5%")


def column(text: str) -> tuple[str, str]:
    """Split `NAME=PATH`; the name must be a column with a meaning."""
    name, mark, path = text.partition("=")
    if not mark or not path or name not in COLUMNS:
        known = ", ".join(sorted(COLUMNS))
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=PATH, NAME one of {known}")
    return name, path


@dataclass
class Faults:
    """Counts the rows read, and those skipped by kind of fault.

    Attributes:
        limit: how many rows may be skipped, a count or a percentage of those read.
        image_path: where --column takes the images from; empty if it does not.
        kinds: kind of fault -> (count, first messages).
        num_with_images: good rows that have images.
    """

    limit: str
    image_path: str
    rows: int = 0
    count: int = 0
    kinds: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    num_with_images: int = 0

    def add(self, where: str, error: DataError) -> None:
        """Count a row; the first ones of each kind are reported on stderr."""
        self.count += 1
        kind = kind_of(str(error), where)
        count, examples = self.kinds.get(kind, (0, []))
        examples = [*examples, str(error)] if count < NUM_EXAMPLES else examples
        self.kinds[kind] = count + 1, examples
        if count < NUM_SHOWN:
            print(f"skipped: {error}", file=sys.stderr)
        elif count == NUM_SHOWN:
            print(f"skipped: more of this kind ({kind}); counted from here on", file=sys.stderr)

    def too_many(self) -> bool:
        """Return True if more rows were skipped than the limit allows, of those read so far."""
        allowed = float(self.limit.rstrip("%"))
        return self.count > (allowed * self.rows / 100 if self.limit.endswith("%") else allowed)

    def check(self) -> None:
        """Raise DataError if too many rows were skipped, or no image was found with --column."""
        if self.too_many():
            raise DataError(
                f"{self.count} of {self.rows} rows ({self.count / self.rows:.1%}) cannot be used, "
                f"--max-skipped is {self.limit}; correct the source, or raise it to "
                f"{self.count} to leave them out"
            )
        if self.image_path and not self.num_with_images:
            raise DataError(
                f"no row has an image at {self.image_path}, where --column looks; correct the path"
            )

    def report(self, written: int) -> dict[str, Any]:
        """Return the contents of report.json, the most frequent kind first."""
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1][0])
        return {
            "rows": self.rows,
            "written": written,
            "skipped": self.count,
            "max_skipped": self.limit,
            "kinds": [{"kind": k, "count": c, "examples": texts} for k, (c, texts) in kinds],
        }


def kind_of(message: str, where: str) -> str:
    """Return a message without the row's name and without what differs from row to row."""
    text = re.sub("^: (image [0-9]+: )?", "", message.removeprefix(where))
    return re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[0-9]+", "…", text)[:80]


def good_records(
    source: Iterator[tuple[str, Record | DataError]], faults: Faults, limit: int, total: int | None
) -> Iterator[Record]:
    """Yield the records that can be read, with a progress bar on a terminal's stderr.

    Errors are counted by `faults`: above its limit nothing is yielded, but all is still read, and
    `Faults.check` raises at the end. `limit` is the number of records to stop after, 0 for none;
    `total` that of the rows to come, if known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("making shards", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=limit or total)
        given = 0
        for where, record in source:
            faults.rows += 1
            if isinstance(record, DataError):
                faults.add(where, record)
            elif faults.limit.endswith("%") or not faults.too_many():
                faults.num_with_images += bool(record.images)
                yield record
                given += 1
            bar.advance(task)
            if limit and given == limit:
                break
    faults.check()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="file or directory to read")
    add("target", type=Path, metavar="DST", help="directory for the shards")
    text = "directory of relative image paths, which must not lead out of it; default: that of the "
    text += "file that names them"
    add("--image-folder", type=Path, metavar="DIR", help=text)
    text = "read the column NAME from another column or from a value nested in one, as in "
    text += "problem=prompt.0.content; may be repeated"
    add("--column", type=column, action="append", default=[], metavar="NAME=PATH", help=text)
    text = (
        "between instruction and input of alpaca: a blank line (default), or one newline as in the "
    )
    text += "published cold start"
    add("--alpaca-gap", choices=ALPACA_GAPS, default="blank-line", help=text)
    text = "number of rows that may be skipped, or their share of the rows read; all rows are read "
    text += "before it is checked; default: 100"
    add("--max-skipped", type=max_skipped, default="100", metavar="N|N%", help=text)
    add("--limit", type=int, default=0, metavar="N", help="stop after N samples; default: all")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="per tar; default: 1000")
    options = parser.parse_args(arguments)
    if options.samples_per_shard < 1 or options.limit < 0:
        parser.error("--samples-per-shard must be 1 or more, --limit 0 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    options = parse(arguments)
    columns = dict(options.column)
    faults = Faults(options.max_skipped, columns.get("images") or columns.get("image") or "")
    written, failure = 0, None
    try:
        files = source_files(options.source)
        rows = records(files, options.image_folder, columns, ALPACA_GAPS[options.alpaca_gap])
        found = good_records(rows, faults, options.limit, count_rows(files))
        written = write_shards(found, options.target, samples_per_shard=options.samples_per_shard)
        print(f"{options.target}: {written} samples, {faults.count} skipped")
    except (SR1Error, OSError) as error:  # OSError: a target that cannot be written, a full disk
        failure = error
    except KeyboardInterrupt:
        return 130
    report = faults.report(written)
    try:
        if faults.rows:
            write_text(options.target / REPORT_FILE, json.dumps(report) + "\n")
    except OSError as error:
        failure = failure or error
    for kind in report["kinds"]:
        print(f"{kind['count']:8d}  {kind['kind']}: first {kind['examples'][0]}")
    if faults.count:
        print(f"{'':10}more in {options.target / REPORT_FILE}")
    if failure:
        print(f"make_shards: {failure}", file=sys.stderr)
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(main())
