"""Snapshots in the layout of the hub's cache, made without a hub."""

import hashlib
import os
from pathlib import Path


def add_snapshot(home, name, source, kind="model", commit="a" * 40, ref="main"):
    """Store a directory's files as a commit of a repository, below HF_HOME; returns the snapshot.

    As huggingface_hub does: the contents lie in blobs/, and the snapshot has relative links.
    """
    repository = Path(home) / "hub" / f"{kind}s--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for path in sorted(p for p in Path(source).rglob("*") if p.is_file()):
        data = path.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
        link = snapshot / path.relative_to(source)
        for each in (blob, link):
            each.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return snapshot
