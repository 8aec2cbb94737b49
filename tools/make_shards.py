"""Source files to webdataset shards.

    python tools/make_shards.py SRC DST

SRC is a parquet, jsonl or json file (columns `problem`/`question`, `answer`/`solution`, `images`;
sharegpt `messages`, `images`; alpaca `instruction`, `input`, `output`), a folder of such files, or
a folder of images with metadata.jsonl (`file_name` and the columns above). A bad sample is named,
skipped and counted; too many of them end the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import write_shards
from megatron_sr1.data.sources import count_rows, records, source_files
from megatron_sr1.errors import DataError, SR1Error


class Skipped:
    """Bad samples: each is told on stderr, and one too many raises."""

    def __init__(self, limit: int) -> None:
        """Start at none.

        Args:
            limit: how many are tolerated.
        """
        self.count, self._limit = 0, limit

    def add(self, error: DataError) -> None:
        """Count one.

        Raises:
            DataError: it is one more than tolerated.
        """
        self.count += 1
        print(f"skipped: {error}", file=sys.stderr)
        if self.count > self._limit:
            raise DataError(
                f"{self.count} bad samples, --max-skipped is {self._limit}; mend the source or "
                "raise it"
            )


def good_records(
    files: list[Path], images: Path | None, skipped: Skipped, limit: int, progress: bool
) -> Iterator[Record]:
    """The records that can be read, with a progress bar on stderr.

    Args:
        files: source files.
        images: where relative image paths start; None: beside each file.
        skipped: counts the others.
        limit: stop after so many; 0 reads all.
        progress: whether to show a bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("making shards", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not progress) as bar:
        task = bar.add_task("", total=limit or count_rows(files))
        given = 0
        for _, record in records(files, images):
            if isinstance(record, DataError):
                skipped.add(record)
                continue
            yield record
            given += 1
            bar.advance(task)
            if limit and given == limit:
                return


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("source", type=Path, metavar="SRC", help="file or folder to read")
    parser.add_argument("target", type=Path, metavar="DST", help="folder for the shards")
    parser.add_argument("--image-folder", type=Path, help="where relative image paths start")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument("--max-skipped", type=int, default=100, metavar="N")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="stop after N samples")
    options = parser.parse_args(arguments)
    if options.samples_per_shard < 1:
        parser.error("--samples-per-shard must be 1 or more")
    skipped = Skipped(options.max_skipped)
    try:
        files = source_files(options.source)
        found = good_records(
            files, options.image_folder, skipped, options.limit, sys.stderr.isatty()
        )
        written = write_shards(found, options.target, samples_per_shard=options.samples_per_shard)
    except (SR1Error, OSError) as error:  # OSError: a target that cannot be written, a full disk
        print(f"make_shards: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{options.target}: {written} samples, {skipped.count} skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
