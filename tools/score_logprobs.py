"""Score given responses with a backend, a logprob per token, to see where backends disagree.

Each input line is a JSON object: {"prompt": [token ids, each image one expanded run of image-pad
ids], "response": [token ids], "images": ["path", ...]}. The output has the same lines with
"logprobs": [...], one per response token, in nats at temperature 1. The tool starts its own ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.errors import ConfigError, DataError, SR1Error
from megatron_sr1.runtime.files import replacing


@dataclass(frozen=True)
class Line:
    """A checked line of the input; `content` is the whole object, `where` names file and line."""

    where: str
    content: dict[str, Any]
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    images: tuple[Path, ...] = ()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="score_logprobs.py", description=__doc__)
    add = parser.add_argument
    text = "Hugging Face or Megatron checkpoint directory, or a name on the hub"
    add("--model", type=Path, required=True, help=text)
    add("--revision", default="main", help="of a name on the hub; default: main")
    add("--input", type=Path, required=True, help="jsonl file")
    add("--output", type=Path, required=True, help="jsonl file to write")
    add("--backend", choices=("megatron", "vllm", "transformers"), required=True)
    add("--tensor-parallel", type=int, default=1, metavar="N", help="default: 1")
    add("--pipeline-parallel", type=int, default=1, metavar="N", help="megatron only; default: 1")
    add("--context-parallel", type=int, default=1, metavar="N", help="megatron only; default: 1")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--spec", choices=("local", "transformer_engine"), default="local", help="default: local")
    add("--pack-tokens", type=int, default=8192, help="megatron: tokens per row; default: 8192")
    add("--min-pixels", type=int, help="smallest image area; default: the model's")
    add("--max-pixels", type=int, help="largest image area; default: the model's")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Score, or start the ranks that do; return the exit status."""
    arguments = parse(argv)
    try:
        num_ranks = check(arguments)
        lines = read_lines(arguments.input)
        if "RANK" in os.environ or num_ranks == 1:
            return score(arguments, lines)
        return start_ranks(sys.argv[1:] if argv is None else argv, num_ranks)
    except SR1Error as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1


def check(arguments: argparse.Namespace) -> int:
    """Return the number of ranks; raise a ConfigError if the backend has no such layout."""
    kinds = ("tensor", "pipeline", "context")
    possible = {"megatron": kinds, "vllm": kinds[:1], "transformers": ()}
    num_ranks = 1
    for kind in kinds:
        size = getattr(arguments, f"{kind}_parallel")
        option = f"--{kind}-parallel {size}"
        if size < 1:
            raise ConfigError(f"{option}: expected 1 or more")
        if size > 1 and kind not in possible[arguments.backend]:
            raise ConfigError(f"{option}: the {arguments.backend} backend has one such rank")
        num_ranks *= size
    return num_ranks


def read_lines(path: Path) -> list[Line]:
    """Read and check the input; a DataError names file and line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected one JSON object a line")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path} line {number}"
        if not text.strip():
            continue
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        if not isinstance(content, dict):
            raise DataError(f"{where}: expected an object with prompt and response")
        for key in ("prompt", "response"):
            ids = content.get(key)
            if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
                raise DataError(f"{where}: {key} must be a list of token ids")
        if not content["prompt"]:
            raise DataError(f"{where}: prompt is empty; the first token has no logprob")
        names = content.get("images") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: images must be a list of paths")
        ids = (tuple(content[key]) for key in ("prompt", "response"))
        lines.append(Line(where, content, *ids, find_images(names, path.parent, where)))
    return lines


def find_images(names: list[str], directory: Path, where: str) -> tuple[Path, ...]:
    """Return the images' files, as named or beside the input."""
    paths = tuple(Path(name) if Path(name).is_file() else directory / name for name in names)
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise DataError(f"{where}: image {name} does not exist, nor does {path}")
    return paths


def start_ranks(argv: list[str], num_ranks: int) -> int:
    """Run this file under torchrun; return its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(Path(__file__).resolve()), *argv]
    threads = max(len(os.sched_getaffinity(0)) // num_ranks, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    return subprocess.run(command, env=environment, check=False).returncode


def score(arguments: argparse.Namespace, lines: list[Line]) -> int:
    """Score all lines on this rank; the first rank writes the output."""
    from scoring_backends import BACKENDS

    from megatron_sr1.checkpoint.folders import resolve_model
    from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed

    source = resolve_model(arguments.model, arguments.revision)
    device = select_device(arguments.device)
    start_distributed(device)
    try:
        found = BACKENDS[arguments.backend](arguments, source, device, lines)
    finally:
        stop_distributed()
    if os.environ.get("RANK", "0") == "0":
        write_lines(arguments.output, lines, found)
        print(f"{len(lines)} lines scored with {arguments.backend}: {arguments.output}")
    return 0


def write_lines(path: Path, lines: list[Line], found: list[list[float]]) -> None:
    """Write the output, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for line, logprobs in zip(lines, found, strict=True):
            assert len(logprobs) == len(line.response), line.where
            file.write(json.dumps({**line.content, "logprobs": logprobs}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
