"""Convert between a Hugging Face directory and a Megatron distributed checkpoint, both ways.

The Megatron format knows nothing of layouts: what is written here loads under any tensor, pipeline
and data parallelism, and what any layout wrote converts back. The conversion runs in one process
on the CPU and needs memory for the weights once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

EPILOG = """
examples:
  python tools/convert_checkpoint.py hf-to-megatron Qwen2.5-VL-7B-Instruct qwen25vl_7b_megatron
  python tools/convert_checkpoint.py megatron-to-hf runs/digits/checkpoints exported_hf

A Megatron checkpoint carries configuration, tokenizer and the weight files' headers of the model
that it came from (hf_files/), so that the way back gives the same names, types and files.
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
    to_megatron = ways.add_parser(
        "hf-to-megatron", help="safetensors to a Megatron distributed checkpoint"
    )
    to_megatron.add_argument("source", type=Path, help="Hugging Face directory")
    to_megatron.add_argument("target", type=Path, help="new folder for the checkpoint")
    to_megatron.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="type of the stored weights; auto keeps the source's (default: %(default)s)",
    )
    to_hf = ways.add_parser("megatron-to-hf", help="a Megatron checkpoint to safetensors")
    to_hf.add_argument(
        "source", type=Path, help="folder of checkpoints (its latest is taken) or a step_N folder"
    )
    to_hf.add_argument("target", type=Path, help="new Hugging Face directory")
    to_hf.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="compare only the sizes of the checkpoint's files, not their checksums",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit status."""
    arguments = parse(argv)
    # The conversion needs no GPU and must not take one from a run.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_sr1.errors import SR1Error

    started = time.monotonic()
    try:
        if arguments.way == "hf-to-megatron":
            hf_to_megatron(arguments.source, arguments.target, arguments.dtype)
        else:
            megatron_to_hf(arguments.source, arguments.target, arguments.verify)
    except SR1Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"done in {time.monotonic() - started:.1f} s: {arguments.target}")
    return 0


def hf_to_megatron(source: Path, target: Path, dtype: str) -> None:
    """Read safetensors and write a Megatron checkpoint.

    Raises:
        CheckpointError: the source is no such model, or the target is not empty.
    """
    import torch

    from megatron_sr1.checkpoint.distributed import save_checkpoint
    from megatron_sr1.checkpoint.hf import load_hf
    from megatron_sr1.checkpoint.model_source import resolve_model
    from megatron_sr1.errors import CheckpointError
    from megatron_sr1.model.hf_config import read_hf_config

    if resolve_model(source).kind != "huggingface":
        raise CheckpointError(f"{source} is a Megatron checkpoint already; use megatron-to-hf")
    _need_empty(target)
    config = read_hf_config(source)
    stored = source_dtype(source) if dtype == "auto" else getattr(torch, dtype)
    chunks, groups = build(config, stored)
    tell("reading", source)
    load_hf(chunks, source, config, groups)
    tell("writing", target)
    state = {"converted_from": source.resolve().name}
    save_checkpoint(target, 0, chunks, None, None, groups, state, source_directory=source)


def megatron_to_hf(source: Path, target: Path, verify: bool = True) -> None:
    """Read a Megatron checkpoint and write safetensors like those that it came from.

    `verify` compares the digests of its files first, and not only their sizes.

    Raises:
        CheckpointError: the source is no such checkpoint, or the target is something else.
    """
    from megatron_sr1.checkpoint.hf import save_hf
    from megatron_sr1.checkpoint.model_source import load_model, resolve_model
    from megatron_sr1.checkpoint.untrusted import stored_dtype
    from megatron_sr1.errors import CheckpointError
    from megatron_sr1.model.hf_config import read_hf_config

    found = resolve_model(source)
    if found.kind != "megatron":
        raise CheckpointError(f"{source} is a Hugging Face directory already; use hf-to-megatron")
    _need_empty(target)
    config = read_hf_config(found.hf_files)
    chunks, groups = build(config, stored_dtype(found.weights))
    tell("reading", found.weights)
    load_model(chunks, found, config, groups, verify)
    tell("writing", target)
    save_hf(chunks, config, groups, found.hf_files, target)


def build(config: Any, dtype: Any) -> tuple[list[Any], Any]:
    """An empty model on one rank of the CPU, and its groups."""
    from megatron_sr1.config import ParallelConfig
    from megatron_sr1.model.qwen25_vl import build_model
    from megatron_sr1.runtime import cpu
    from megatron_sr1.runtime.device import Device, start_distributed
    from megatron_sr1.runtime.groups import make_groups

    device = Device("cpu")
    start_distributed(device)
    groups = make_groups(ParallelConfig(), device)
    with cpu.megatron_mode():
        return build_model(config, groups, dtype=dtype), groups


def source_dtype(directory: Path) -> Any:
    """Type of all tensors of a Hugging Face directory; float32 holds a mixture without loss."""
    import torch

    from megatron_sr1.checkpoint.source import HFSource

    types = {tensor.dtype for tensor in HFSource(directory).tensors.values()}
    return types.pop() if len(types) == 1 else torch.float32


def tell(what: str, path: Path) -> None:
    """One line of progress, with the size of the files that are there."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{what} {path}" + (f" ({size / 2**30:.2f} GiB)" if size else ""), flush=True)


def _need_empty(target: Path) -> None:
    from megatron_sr1.errors import CheckpointError

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already; name a new or an empty folder")


if __name__ == "__main__":
    sys.exit(main())
