"""The commands that show what a model or a run does: `ask` and `compare`.

In: their arguments. Out: text on standard output, and an exit status.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sr1.errors import SR1Error
from megatron_sr1.runtime.logs import configure_logging, silence_native_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_sr1.evaluation.ask import Answered, Session

MIN_COLUMNS = 150
"""Width of tables of results, also where the output is a file; a narrower terminal wraps them."""


def ask_command(arguments: argparse.Namespace) -> int:
    """Run `ask`: start an engine, then answer one question or those of standard input."""
    from megatron_sr1.evaluation.asked_model import ask_config
    from megatron_sr1.launch import torchrun

    with tempfile.TemporaryDirectory(prefix="megatron_sr1_ask_") as directory:
        settings = (Path(directory), arguments.number, arguments.temperature)
        config = ask_config(arguments.model, arguments.overrides, *settings)
        os.environ.update(torchrun.cuda_environment(config))
        os.environ.update(torchrun.rank_environment(config.launch, 1))
        silence_native_warnings(config.logging.level)
        configure_logging(config.logging.level)
        from megatron_sr1.evaluation.ask import open_session, read_images
        from megatron_sr1.stages import joined_ranks

        images = read_images(arguments.images)
        with joined_ranks(config) as groups:
            session = open_session(config, groups)
            if arguments.question is not None:
                print_answers(session.ask(arguments.question, images))
            else:
                answer_lines(session, images)
    return 0


def answer_lines(session: Session, images: tuple[bytes, ...]) -> None:
    """Answer the lines of standard input until it ends; a question that fails is reported."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("A question about the image per line; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            question = (input("> ") if is_terminal else next(sys.stdin)).strip()
        except (EOFError, StopIteration):
            return
        if not question:
            continue
        if not is_terminal:
            print(f"> {question}")
        try:
            print_answers(session.ask(question, images))
        except SR1Error as error:
            print(f"megatron-sr1: error: {error}", file=sys.stderr)


def print_answers(found: list[Answered]) -> None:
    """Print responses, numbered if there are several."""
    from megatron_sr1.evaluation.ask import answer_table

    console = wide_console()
    for number, answered in enumerate(found, start=1):
        if len(found) > 1:
            console.print(f"{number} of {len(found)}", style="dim", highlight=False)
        console.print(answer_table(answered))
        console.print()
    sys.stdout.flush()


def compare_command(arguments: argparse.Namespace) -> int:
    """Run `compare`: print the tables, then notes and the path of the page."""
    from megatron_sr1.report.compare import comparison_tables, write_comparison
    from megatron_sr1.report.compared import read_runs

    runs = read_runs(arguments.runs)
    console = wide_console()
    for table in comparison_tables(runs):
        console.print(table)
        console.print()
    for note in runs.notes:
        print(f"Note: {note}")
    print(f"Page: {write_comparison(runs, arguments.output, arguments.inline)}")
    return 0


def wide_console() -> Console:
    """Return a console for tables of results."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, MIN_COLUMNS)
    return console
