"""Measure how many samples a second make_shards writes, beside webdataset's own TarWriter.

Both read the same parquet rows, each with one JPEG, and write the same members, in one process.
Twice: as people use them, with every image decoded before it is written, by both; and writing
alone, of samples in memory, with no image decoded by either. Runs alternate, and the median counts,
in seconds of processor time, which other programs on the machine hardly change. With --workers the
tool's wall time with so many processes is measured as well.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from megatron_sr1.data.examples import Record, stored
from megatron_sr1.data.images import decode_image
from megatron_sr1.data.ingest import Conversion, make_shards
from megatron_sr1.data.rows import record_from_row
from megatron_sr1.data.shards import write_shards
from megatron_sr1.data.sources import open_source
from megatron_sr1.data.tally import Tally

QUESTION = "<image>Which of the shapes is the largest?\nA. the first\nB. the second\nC. none"


def write_rows(path: Path, count: int, width: int, height: int) -> None:
    """Write rows with smooth random pictures, which compress as photographs do."""
    import pyarrow
    import pyarrow.parquet

    rows, random = [], np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(256, size=(height // 8, width // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(buffer, format="JPEG", quality=90)
        image = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"problem": QUESTION, "answer": "A", "images": [image], "id": number})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)


def tar_writer(samples: Iterator[dict[str, Any]], folder: Path, per_shard: int) -> None:
    """Write samples with webdataset, a TarWriter per shard."""
    import webdataset

    sink, path = None, folder / "x.tar"
    for number, sample in enumerate(samples):
        if number % per_shard == 0:
            if sink is not None:
                sink.close()
            path = folder / f"{number // per_shard:06d}.tar"
            sink = webdataset.TarWriter(str(path))
        sink.write({"__key__": f"{number:09d}", **sample})
    if sink is not None:
        sink.close()


def sample_of(record: Record) -> dict[str, Any]:
    """Return a sample as webdataset takes it."""
    images = {f"{place}.jpeg": data for place, data in enumerate(record.images)}
    return {"json": stored(record), **images}


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows as a plain script reads and checks them: columns, and each image decoded."""
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            images = [image["bytes"] for image in row["images"]]
            for data in images:
                decode_image(data)
            text = {"messages": [{"role": "user", "content": row["problem"]}]}
            text |= {"answer": row["answer"], "num_images": len(images)}
            text |= {"metadata": {"id": row["id"]}}
            yield {"json": text, **{f"{place}.jpeg": data for place, data in enumerate(images)}}


def measured(writers: dict[str, Callable[[Path], None]], repeats: int) -> dict[str, float]:
    """Return the median processor time of each writer, seconds, in alternating runs."""
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(repeats):
        for name, write in writers.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.process_time()
                write(Path(folder))
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000, metavar="N", help="default: 2000")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("W", "H"))
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="default: 1")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_rows(path, options.rows, *options.size)
        source = open_source(str(path))

        def tool(target: Path, workers: int = 1) -> None:
            make_shards(source, target / "out", Conversion(), Tally(), workers=workers)

        both = {"make_shards": tool, "TarWriter": lambda to: tar_writer(rows_of(path), to, 1000)}
        report("images decoded by both", measured(both, options.repeats), options.rows)
        records = [record_from_row(row.columns(), path.parent, {}) for row in source.rows(0)]
        samples = [sample_of(record) for record in records]
        both = {
            "make_shards": lambda to: write_shards(records, to / "out") and None,
            "TarWriter": lambda to: tar_writer(iter(samples), to, 1000),
        }
        report("writing alone, no image decoded", measured(both, options.repeats), options.rows)
        if options.workers > 1:
            for workers in (1, options.workers):
                with tempfile.TemporaryDirectory() as target:
                    started = time.perf_counter()
                    tool(Path(target), workers)
                    rate = options.rows / (time.perf_counter() - started)
                print(f"make_shards, {workers} workers: {rate:,.0f} samples/s of wall time")
    return 0


def report(what: str, seconds: dict[str, float], rows: int) -> None:
    """Print the rates and their ratio."""
    rates = {name: rows / each for name, each in seconds.items()}
    text = ", ".join(f"{name} {rate:,.0f} samples/s" for name, rate in rates.items())
    print(f"{what}: {text}, ratio {rates['make_shards'] / rates['TarWriter']:.2f}")


if __name__ == "__main__":
    sys.exit(main())
