"""Convert between a Hugging Face directory and a Megatron distributed checkpoint, both ways.

The Megatron format does not depend on the layout: what is written here loads under any tensor,
pipeline and data parallelism, and what any layout wrote converts back. The conversion runs in one
process on the CPU, one tensor at a time: it needs memory for the largest one twice. One that was
stopped continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

TO_MEGATRON, TO_HF = "hf-to-megatron", "megatron-to-hf"
EPILOG = """
examples:
  python tools/convert_checkpoint.py hf-to-megatron Qwen2.5-VL-7B-Instruct qwen25vl_7b_megatron
  python tools/convert_checkpoint.py megatron-to-hf runs/digits/checkpoints exported_hf --verify
  python tools/convert_checkpoint.py megatron-to-hf runs/lora/checkpoints merged --adapter merge
  python tools/convert_checkpoint.py megatron-to-hf runs/lora/checkpoints lora --adapter export

A Megatron checkpoint holds the configuration, tokenizer and weight files' headers of the model that
it came from (hf_files/), so that the way back gives the same names, types and files. One of a run
with adapters holds these alone: they are merged into their base, or exported in PEFT's format.
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ways = parser.add_subparsers(dest="way", required=True, metavar="WAY")
    text = "safetensors to a Megatron distributed checkpoint"
    to_megatron = ways.add_parser(TO_MEGATRON, help=text).add_argument
    to_megatron("source", type=Path, help="Hugging Face directory, or a name on the hub")
    to_megatron("target", type=Path, help="new directory for the checkpoint")
    dtypes = ("auto", "float32", "bfloat16")
    text = "type of the stored weights; auto keeps the source's (default: %(default)s)"
    to_megatron("--revision", default="main", help="of a name on the hub (default: %(default)s)")
    to_megatron("--dtype", choices=dtypes, default="auto", help=text)
    text = "a Megatron checkpoint to safetensors"
    to_hf = ways.add_parser(TO_HF, help=text).add_argument
    text = "directory of checkpoints (takes the latest) or a step_N directory"
    to_hf("source", type=Path, help=text)
    to_hf("target", type=Path, help="new Hugging Face directory")
    text = "of a run with adapters: merge them into their base, or export them in PEFT's format"
    to_hf("--adapter", choices=("merge", "export"), help=text)
    text = "the adapters' base model for --adapter merge (default: model.path of the run)"
    to_hf("--base", default="", help=text)
    text = "compare only the sizes of the checkpoint's files with its manifest"
    to_hf("--no-checksums", dest="checksums", action="store_false", help=text)
    for add in (to_megatron, to_hf):
        add(
            "--verify",
            action="store_true",
            help="afterwards read the target back from the disk and compare it with the source "
            "bit by bit; where the target is finished already, do only that",
        )
        add(
            "--dry-run",
            action="store_true",
            help="list what would be moved, with sizes and memory, and move nothing; headers or, "
            "of a Hugging Face directory, config.json are enough",
        )
    arguments = parser.parse_args(argv)
    if getattr(arguments, "adapter", None) and (arguments.verify or arguments.dry_run):
        parser.error("--adapter goes with neither --verify nor --dry-run")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit status."""
    arguments = parse(argv)
    # The conversion needs no GPU and must not take one from a run.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Large tensors in large pages, so that they cost less to make; read when torch is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megatron_sr1.errors import SR1Error

    started = time.monotonic()
    try:
        run(arguments, Progress())
    except SR1Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not arguments.dry_run:
        print(f"done in {time.monotonic() - started:.1f} s: {arguments.target}")
    return 0


def run(arguments: argparse.Namespace, report: Progress) -> None:
    """Convert, compare, or list what would be moved.

    Raises `CheckpointError` if the source is of the other kind, or the target is not empty.
    """
    import torch

    from megatron_sr1.checkpoint.folders import LATEST, resolve_model
    from megatron_sr1.conversion import convert, plan
    from megatron_sr1.errors import CheckpointError
    from megatron_sr1.runtime.hub import model_directory

    if getattr(arguments, "adapter", None):
        return convert_adapter(arguments, report)
    target, to_published = arguments.target, arguments.way == TO_HF
    revision = "" if to_published else arguments.revision
    source = model_directory(arguments.source, revision, weights=not arguments.dry_run)
    dtype = None if to_published else getattr(torch, arguments.dtype, None)
    if arguments.dry_run and not to_published:  # config.json is enough, which is no model yet
        print("\n".join(plan.rows(plan.plan_to_megatron(source, dtype))))
        return
    found = resolve_model(source)
    if to_published and found.kind != "megatron":
        raise CheckpointError(f"{source} is a Hugging Face directory already; use {TO_MEGATRON}")
    if not to_published and found.kind != "huggingface":
        raise CheckpointError(f"{source} is a Megatron checkpoint already; use {TO_HF}")
    if arguments.dry_run:
        print("\n".join(plan.rows(plan.plan_to_hf(found))))
        return
    is_finished = (target / ("config.json" if to_published else LATEST)).is_file()
    if not (arguments.verify and is_finished):
        if to_published:
            convert.megatron_to_hf(found, target, arguments.checksums, report)
        else:
            convert.hf_to_megatron(source, target, dtype, report)
    if arguments.verify:
        published, checkpoint = (target, found) if to_published else (source, resolve_model(target))
        convert.verify_conversion(published, checkpoint, report, to_published=to_published)


def convert_adapter(arguments: argparse.Namespace, report: Progress) -> None:
    """Merge or export the adapters of a checkpoint."""
    from megatron_sr1.conversion.adapters import StoredAdapter, export_adapter, merge_checkpoint

    stored, target = StoredAdapter(arguments.source), arguments.target
    if arguments.adapter == "export":
        export_adapter(stored, target, arguments.checksums)
    else:
        merge_checkpoint(stored, arguments.base, target, arguments.checksums, report)


class Progress:
    """Progress and rate: one line in place on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        """Nothing was done yet."""
        self.on_terminal = sys.stdout.isatty()
        self.what, self.started, self.first_bytes, self.shown = "", 0.0, 0, 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Show how far it is."""
        from megatron_sr1.checkpoint.disk import size_text

        now = time.monotonic()
        if what != self.what:
            self.what, self.started, self.first_bytes, self.shown = what, now, done_bytes, now
        is_last = done_bytes == total_bytes
        if now - self.shown < (0.2 if self.on_terminal else 5.0) and not is_last:
            return
        self.shown = now
        rate = (done_bytes - self.first_bytes) / max(now - self.started, 1e-3)
        line = f"{what}: {size_text(done_bytes)} of {size_text(total_bytes)}"
        line += f", {size_text(int(rate))}/s"
        line += "" if is_last or not rate else f", {(total_bytes - done_bytes) / rate:.0f} s left"
        start = "\r" if self.on_terminal else ""
        end = "" if self.on_terminal and not is_last else "\n"
        print(f"{start}{line:<{76 if start else 0}}", end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
