"""Parquet files in the forms of the three sets that EasyR1 gives as examples for one's own data.

math12k has text alone, geometry3k one image, journeybench-multi-image-vqa several
(tests/unit/test_data_schemas.py has their columns in detail). The rows are made up.
"""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.pictures import png
from tools.make_shards import main

NUM_IMAGES = {"math12k": 0, "geometry3k": 1, "journeybench": 3}


def _image(number: int) -> dict:
    color = number % 256, number // 256, 0
    return {"bytes": png(color, (84, 28)), "path": f"{number}.png"}


def _rows(name: str, count: int) -> list[dict]:
    if name == "math12k":
        return [{"problem": f"{n} + 1 = ?", "answer": rf"\frac{{{n}}}{{7}}"} for n in range(count)]
    each = NUM_IMAGES[name]
    asked = "<image>Find $x$." if each == 1 else "Which shows {n}? <image><image><image>"
    return [
        {
            "images": [_image(each * n + k) for k in range(each)],
            "problem" if each == 1 else "question": asked.format(n=n),
            "answer": str(n),
        }
        for n in range(count)
    ]


def make_sets(folder: Path, **counts: int) -> dict[str, Path]:
    """Write shards of each named set, of so many rows, from parquet; return their directories."""
    for name, count in counts.items():
        table = pyarrow.Table.from_pylist(_rows(name, count))
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
        assert main([str(folder / f"{name}.parquet"), str(folder / name)]) == 0
    return {name: folder / name for name in counts}


def mixture(sets: dict[str, Path], **weights: float) -> list[str]:
    """Return the overrides that train on some of the sets."""
    keys = [f"data.mixture.{name}.path={sets[name]}" for name in weights]
    return keys + [f"data.mixture.{name}.weight={weight}" for name, weight in weights.items()]
