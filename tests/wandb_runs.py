"""What an offline run of wandb holds on the disk, read from its files."""

import json
import time
from pathlib import Path

from PIL import Image

from megatron_sr1.observability.wandb_sink import records


def messages(run_dir, kind):
    """wandb's records of a kind, in the order of the files."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for record in map(wandb_internal_pb2.Record.FromString, records(path)):
            if record.WhichOneof("record_type") == kind:
                yield getattr(record, kind)


def history(run_dir, awaited=0):
    """All steps that were logged: number, values by name; wandb may write a moment later."""
    until = time.monotonic() + 20
    while True:
        found = []
        for message in messages(run_dir, "history"):
            values = {}
            for item in message.item:
                *outer, name = item.nested_key or [item.key]
                inner = values
                for key in outer:
                    inner = inner.setdefault(key, {})
                inner[name] = json.loads(item.value_json)
            found.append((message.step.num, values))
        if len(found) >= awaited or time.monotonic() > until:
            return found
        time.sleep(0.1)


def read_table(run_dir, value):
    """Columns and rows of a logged table; an image is opened.

    What `wandb sync` would upload: the files of an artifact, which its record names.
    """
    assert value["_type"] == "table-file"
    artifact, _, name = value["artifact_path"].partition("://")[2].partition("/")
    (contents,) = [
        {c.path: Path(c.local_path) for c in message.manifest.contents}
        for message in messages(run_dir, "artifact")
        if message.client_id == artifact
    ]
    table = json.loads(contents[name].read_text())
    assert (value["nrows"], value["ncols"]) == (len(table["data"]), len(table["columns"]))
    return table["columns"], [[_cell(contents, cell) for cell in row] for row in table["data"]]


def _cell(contents, cell):
    if not isinstance(cell, dict):
        return cell
    assert cell["_type"] == "image-file"
    return Image.open(contents[cell["path"]]).convert("RGB")
