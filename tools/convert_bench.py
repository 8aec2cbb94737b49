"""Measure the conversion of a model of any shape: rate against copying, peak memory, round trip.

In: a model's config.json, published or made up. Random weights are made for it, in files as they
are published, then converted there and back by tools/convert_checkpoint.py, each way between two
copies of the files that it reads, to the same disk. Before each of these the files are dropped
from memory, after each they are brought to the disk. What is made is removed again.

    python tools/convert_bench.py tests/published/qwen25vl_3b.json --directory /data/bench
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_sr1.checkpoint.disk import flush_and_evict

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
GIB = 2**30
PUBLISHED_FILE_BYTES = 4 * 10**9  # gives the 2, 5, 18 and 38 files of the published sizes


def write_random_model(
    directory: Path, config_path: Path, max_file_bytes: int, dtype: str = "BF16", seed: int = 0
) -> None:
    """Write a new model directory with random finite weights, BF16 or F32, and no tokenizer.

    `config_path` becomes its config.json; a file has at most `max_file_bytes` of tensors, unless
    one tensor is larger.
    """
    from safetensors.torch import save_file

    from megatron_sr1.checkpoint.mapping import entries
    from megatron_sr1.model.hf_config import read_hf_config

    directory.mkdir(parents=True)
    shutil.copyfile(config_path, directory / "config.json")
    files: list[dict[str, tuple[int, ...]]] = []
    space_bytes = 0
    for entry in entries(read_hf_config(directory)):
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True):
            size = math.prod(shape) * {"BF16": 2, "F32": 4}[dtype]
            if size > space_bytes:
                files.append({})
                space_bytes = max_file_bytes
            files[-1][name] = shape
            space_bytes -= size
    generator, weight_map = np.random.Generator(np.random.SFC64(seed)), dict[str, str]()
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map.update(dict.fromkeys(shapes, name))
        tensors = {tensor: _random(shape, dtype, generator) for tensor, shape in shapes.items()}
        save_file(tensors, directory / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _random(shape: tuple[int, ...], dtype: str, generator: np.random.Generator) -> torch.Tensor:
    """Return random finite values: the top bit of the exponent is 0."""
    import torch

    if dtype == "BF16":
        bits = generator.integers(0, 2**16, shape, np.uint16) & np.uint16(0xBFFF)
        return torch.from_numpy(bits).view(torch.bfloat16)
    bits = generator.integers(0, 2**32, shape, np.uint32) & np.uint32(0xBFFFFFFF)
    return torch.from_numpy(bits).view(torch.float32)


def busy_seconds(who: int) -> float:
    """Return the CPU seconds of this process (RUSAGE_SELF) or of its ended children."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def run_watched(command: list[str]) -> tuple[float, int]:
    """Run a command that must succeed; returns its seconds and the most anonymous bytes it held."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=output.extend, args=(process.stdout,))
    reader.start()
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        # The kernel's own counter: reading smaps would walk all pages, and hold the process up.
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    seconds = time.monotonic() - started
    reader.join()
    if process.returncode:
        raise RuntimeError(f"{command} left with {process.returncode}: {''.join(output)}")
    return seconds, peak


def copy_files(source: Path, target: Path) -> float:
    """Copy a directory's files to the disk and remove the copy; return the seconds of copying."""

    def copy(source: str, target: str) -> None:
        shutil.copyfile(source, target)
        flush_and_evict(Path(target))  # and so it is on the disk

    forget(source)
    started = time.monotonic()
    shutil.copytree(source, target, copy_function=copy)
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def forget(folder: Path) -> None:
    """Drop a directory's files from the page cache."""
    for path in files_under(folder):
        flush_and_evict(path)


def files_under(folder: Path) -> Iterator[Path]:
    """Return all files below a directory."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def measure_way(way: str, source: Path, target: Path) -> dict[str, float]:
    """Convert between two copies of the source; rates count the source's bytes."""
    num_bytes = sum(path.stat().st_size for path in files_under(source))
    before = busy_seconds(resource.RUSAGE_SELF), busy_seconds(resource.RUSAGE_CHILDREN)
    copies = [copy_files(source, target.with_name("copy"))]
    forget(source)
    seconds, peak_bytes = run_watched([sys.executable, str(TOOL), way, str(source), str(target)])
    copies.append(copy_files(source, target.with_name("copy")))
    copy_seconds = sum(copies) / len(copies)
    copy_busy = (busy_seconds(resource.RUSAGE_SELF) - before[0]) / len(copies)
    busy = busy_seconds(resource.RUSAGE_CHILDREN) - before[1]
    print(
        f"{way}: {num_bytes / GIB:.2f} GiB in {seconds:.1f} s, {num_bytes / seconds / 2**20:.0f} "
        f"MiB/s; copies {copies[0]:.1f} and {copies[1]:.1f} s, "
        f"{num_bytes / copy_seconds / 2**20:.0f} MiB/s; ratio {copy_seconds / seconds:.2f}; peak "
        f"anonymous memory {peak_bytes / 2**20:.0f} MiB; CPU {busy:.1f} s, "
        f"a copy {copy_busy:.1f} s",
        flush=True,
    )
    return {
        "bytes": num_bytes,
        "seconds": seconds,
        "copy_seconds": copy_seconds,
        "ratio": copy_seconds / seconds,
        "peak_anonymous_bytes": peak_bytes,
        "cpu_seconds": busy,
        "copy_cpu_seconds": copy_busy,
    }


def measure(config_path: Path, folder: Path, max_file_bytes: int) -> dict[str, object]:
    """Make a model, convert it both ways, compare; all within a new directory."""
    hf, megatron, again = folder / "hf", folder / "megatron", folder / "again"
    report: dict[str, object] = {"config": config_path.name}
    write_random_model(hf, config_path, max_file_bytes)
    print(f"made {len(list(hf.glob('*.safetensors')))} files of weights", flush=True)
    report["hf-to-megatron"] = measure_way("hf-to-megatron", hf, megatron)
    report["megatron-to-hf"] = measure_way("megatron-to-hf", megatron, again)
    names = [path.relative_to(hf).as_posix() for path in files_under(hf)]
    same, *different = filecmp.cmpfiles(hf, again, names, shallow=False)
    report["round_trip_is_bitwise"] = not any(different) and len(same) == len(names)
    print(f"round trip bitwise: {report['round_trip_is_bitwise']} ({len(same)} files)", flush=True)
    return report


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="config.json of the model")
    parser.add_argument("--directory", type=Path, required=True, help="new directory on the disk")
    parser.add_argument("--file-bytes", type=int, default=PUBLISHED_FILE_BYTES)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args(argv)
    arguments.directory.mkdir(parents=True)
    try:
        report = measure(arguments.config, arguments.directory, arguments.file_bytes)
    finally:
        shutil.rmtree(arguments.directory)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["round_trip_is_bitwise"] else 1


if __name__ == "__main__":
    sys.exit(main())
