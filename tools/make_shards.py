r"""Write webdataset shards from source files or from a data set of the Hugging Face hub.

SRC is a parquet, jsonl or json file, a directory of such files, a directory of images with
metadata.jsonl (file_name and the columns below), or hf:OWNER/NAME@SPLIT (hf:OWNER/NAME:CONFIG@SPLIT
for one of several configurations), which is downloaded if the hub's cache lacks it; or
benchmark:NAME, a published benchmark on the hub (docs/evaluation.md). Columns with a meaning:

  problem, question or prompt      the question; <image> marks an image (\<image>: the text)
  answer or solution               the gold answer, or a list of accepted answers
  images or image                  paths, bytes, data: URIs
  messages or conversations        turns {role, content} or {from, value}; content may be parts
  instruction, input, output       a conversation as in alpaca; with history
  prompt, reward_model             as in verl: a list of messages, and a ground_truth
  system                           a system turn, with any of them

All others are kept as metadata. A row that cannot be used is reported, skipped and counted; rows
without an image are fine. At the end the kinds of faults are listed with their counts; examples of
each are in DST/report.json. Killed and started again with the same options, it continues after the
last whole shard.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sr1.data.benchmarks import BENCHMARKS
from megatron_sr1.data.ingest import Conversion, make_shards
from megatron_sr1.data.rows import ALPACA_GAPS, COLUMNS
from megatron_sr1.data.sources import open_source
from megatron_sr1.data.tally import Tally
from megatron_sr1.errors import SR1Error
from megatron_sr1.runtime.files import write_text

EPILOG = """\
examples:
  python tools/make_shards.py questions.jsonl shards/questions
  python tools/make_shards.py data/ shards/mine --image-folder pictures --max-skipped 5%
  python tools/make_shards.py hf:hiyouga/geometry3k@train shards/geometry --workers 8
  python tools/make_shards.py rows.parquet shards/rows --model DIR --max-prompt-tokens 4096
  python tools/make_shards.py rows.parquet shards/rows --column problem=prompt.0.content \\
      --column answer=extra_info.answer

exit status: 0 if the shards are written, 1 if more rows were skipped than --max-skipped allows or
the source cannot be read (nothing usable is left in DST then), 2 for a wrong option.
"""
REPORT_FILE = "report.json"
SECONDS_BETWEEN_LINES = 15.0
"""Of progress, where stderr is no terminal."""


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


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(total: int | None) -> Iterator[Callable[[Tally], None]]:
    """Yield what shows the rows read, their rate and the time left: a bar, or lines."""
    if sys.stderr.isatty():
        with bar(total) as show:
            yield show
    else:
        yield lines(total, SECONDS_BETWEEN_LINES)


@contextmanager
def bar(total: int | None) -> Iterator[Callable[[Tally], None]]:
    """Yield what moves a progress bar on the terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        "making shards",
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        task = None

        def show(tally: Tally) -> None:
            nonlocal task
            if task is None:  # what an earlier call did is not part of the rate
                task = shown.add_task("", total=total, completed=tally.rows, rate="")
            per_second = shown.tasks[0].speed
            rate = "" if per_second is None else f"{per_second:,.0f} rows/s"
            shown.update(task, completed=tally.rows, rate=rate)

        yield show


def lines(total: int | None, seconds: float) -> Callable[[Tally], None]:
    """Return what prints a line to stderr every so many seconds."""
    started = last = time.monotonic()
    first = None

    def show(tally: Tally) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = tally.rows if first is None else first
        if now - last < seconds:
            return
        last, rate = now, (tally.rows - first) / (now - started)
        of = "" if total is None else f" of {total:,}"
        left = "" if total is None or not rate else f", {(total - tally.rows) / rate:,.0f} s left"
        say(f"{tally.rows:,}{of} rows, {rate:,.1f} rows/s{left}, {tally.skipped:,} skipped")

    return show


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="file, directory or hf:OWNER/NAME@SPLIT to read")
    add("target", type=Path, metavar="DST", help="directory for the shards")
    add("--revision", default="main", help="branch, tag or commit of hf:…; default: main")
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
    text = (
        "read rows as those of a published benchmark: question, options, numbered images, answer "
    )
    text += f"and category; NAME is one of {', '.join(BENCHMARKS)}"
    add("--benchmark", choices=BENCHMARKS, metavar="NAME", help=text)
    add("--limit", type=int, default=0, metavar="N", help="stop after N samples; default: all")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="per tar; default: 1000")
    text = "processes that verify images; the shards are the same with any number; default: 1"
    add("--workers", type=int, default=1, metavar="N", help=text)
    text = "count the tokens of each prompt with the tokenizer of a Hugging Face directory, a "
    text += "checkpoint or a name on the hub, and print their distribution"
    add("--model", metavar="DIR", help=text)
    text = "with --model: the run's configuration, for its limits of pixels and its prompts; "
    text += "default: that of the configuration reference"
    add("--config", type=Path, metavar="YAML", help=text)
    text = "with --model: leave out longer prompts, images included; they are counted, not skipped"
    add("--max-prompt-tokens", type=int, metavar="N", help=text)
    options = parser.parse_args(arguments)
    prefix, _, name = options.source.partition(":")
    if prefix == "benchmark":
        if name not in BENCHMARKS:
            parser.error(f"benchmark:{name}: expected one of {', '.join(BENCHMARKS)}")
        options.source, options.benchmark = BENCHMARKS[name].source_name, name
    if options.samples_per_shard < 1 or options.limit < 0 or options.workers < 1:
        parser.error("--samples-per-shard and --workers must be 1 or more, --limit 0 or more")
    if options.model is None and (options.config or options.max_prompt_tokens is not None):
        parser.error("--config and --max-prompt-tokens need --model, whose tokens are counted")
    if options.max_prompt_tokens is not None and options.max_prompt_tokens < 1:
        parser.error("--max-prompt-tokens must be 1 or more")
    return options


def conversion(options: argparse.Namespace) -> Conversion:
    """Return how rows become samples; raises an SR1Error for a model that cannot be read."""
    measure = None
    if options.model is not None:
        from megatron_sr1.checkpoint.folders import tokenizer_directory
        from megatron_sr1.config.loading import load_config
        from megatron_sr1.data.lengths import PromptLength
        from megatron_sr1.rewards.answers import question_options

        directory = tokenizer_directory(options.model)
        config = load_config(options.config, [f"model.path={directory}"])
        settings = repr((config.data, config.reward.recipe))
        measure = PromptLength(directory, options.config, question_options, settings)
        measure.load()
    return Conversion(
        options.image_folder,
        dict(options.column),
        ALPACA_GAPS[options.alpaca_gap],
        measure,
        options.max_prompt_tokens,
        options.benchmark or "",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    options = parse(arguments)
    columns = dict(options.column)
    tally = Tally(options.max_skipped, columns.get("images") or columns.get("image") or "", say)
    written, failure = 0, None
    try:
        convert, source = conversion(options), open_source(options.source, options.revision)
        with progress(options.limit or source.num_rows) as watch:
            written = make_shards(
                source,
                options.target,
                convert,
                tally,
                limit=options.limit,
                samples_per_shard=options.samples_per_shard,
                workers=options.workers,
                watch=watch,
            )
        too_long = f", {tally.too_long} too long" if options.max_prompt_tokens else ""
        print(f"{options.target}: {written} samples, {tally.skipped} skipped{too_long}")
    except (SR1Error, OSError) as error:  # OSError: a target that cannot be written, a full disk
        failure = error
    except KeyboardInterrupt:
        return 130
    report = tally.report(written)
    try:
        if tally.rows:
            write_text(options.target / REPORT_FILE, json.dumps(report) + "\n")
    except OSError as error:
        failure = failure or error
    for kind in report["kinds"]:
        print(f"{kind['count']:8d}  {kind['kind']}: first {kind['examples'][0]}")
    if tally.skipped:
        print(f"{'':10}more in {options.target / REPORT_FILE}")
    print_lengths(report.get("prompt_tokens", {}))
    if failure:
        print(f"make_shards: {failure}", file=sys.stderr)
    return int(failure is not None)


def print_lengths(found: dict[str, dict[str, dict[str, int]]]) -> None:
    """Print the histogram of the prompts' lengths, a column for text, images and both."""
    if not found:
        return
    ends = sorted({int(end) for each in found.values() for end in each["up_to"]})
    print("prompts by tokens" + "".join(f"{name:>10}" for name in found))
    for end in ends:
        counts = (each["up_to"].get(str(end), 0) for each in found.values())
        print(f"  up to {end:9,}" + "".join(f"{count:10,}" for count in counts))
    for percent in next(iter(found.values()))["percentiles"]:
        of = "longest" if percent == "100" else f"{percent} % up to"
        values = (each["percentiles"][percent] for each in found.values())
        print(f"  {of:>15}" + "".join(f"{value:10,}" for value in values))


if __name__ == "__main__":
    sys.exit(main())
