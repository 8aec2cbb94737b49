"""Repositories of the Hugging Face hub by name, as local directories.

In: `OWNER/NAME` and a revision. Out: the directory of its snapshot in the hub's cache, into which
missing files are downloaded first. huggingface_hub follows HF_HOME, HF_HUB_OFFLINE and the user's
token; a snapshot that is complete needs no network. The directory is named by the commit, and its
files are links into the cache. Free of torch.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from megatron_sr1.errors import ConfigError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
"""Configuration, tokenizer and processor, without weights; never Python files."""
WEIGHT_FILES = ("*.safetensors",)
MAX_REASON = 300


def is_hub_name(path: str | Path) -> bool:
    """Return True for `OWNER/NAME`, unless there is such a path on this machine."""
    return HUB_NAME.fullmatch(str(path)) is not None and not Path(path).exists()


def model_directory(path: str | Path, revision: str = "", weights: bool = True) -> Path:
    """Return the local directory of a model, which may be a hub name.

    Without `weights`, those of a hub name are not downloaded. Raises ConfigError, as `snapshot`.
    """
    if not is_hub_name(path):
        return Path(path)
    return snapshot(str(path), revision or "main", "model", MODEL_FILES + WEIGHT_FILES * weights)


def snapshot(name: str, revision: str, kind: str, files: tuple[str, ...] = ()) -> Path:
    """Return the directory of a repository's snapshot, after downloading what is missing.

    Args:
        name: OWNER/NAME.
        revision: branch, tag or commit.
        kind: model or dataset.
        files: patterns of the files that are needed, at the top of the repository; none: all.

    Raises:
        ConfigError: it is not in the cache and cannot be downloaded; says why, and what to do.
    """
    found = _find(name, revision, kind, files)
    if isinstance(found, ConfigError):
        raise found
    return found


@functools.cache
def _find(name: str, revision: str, kind: str, files: tuple[str, ...]) -> Path | ConfigError:
    """Look up a snapshot once: where there is no network, that takes seconds."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        advice = "pip install huggingface_hub, or give a local directory"
        return ConfigError(f"{name}: a {kind} of the hub needs huggingface_hub; {advice}")
    try:
        return Path(
            snapshot_download(
                name,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(files) or None,
                ignore_patterns=["*/*"] if files else None,
            )
        )
    except Exception as error:  # of the hub, of the HTTP library below it, of the disk
        reason, what_to_do = _explain(error, name, revision, kind)
        return ConfigError(f"{name} at revision {revision}: {reason}; {what_to_do}")


def _explain(error: Exception, name: str, revision: str, kind: str) -> tuple[str, str]:
    """Return why a snapshot cannot be had, and what to do about it."""
    from huggingface_hub import constants, errors

    dataset = " --repo-type dataset" if kind == "dataset" else ""
    command = f"hf download {name}{dataset}" + f" --revision {revision}" * (revision != "main")
    download = (
        f"download it where there is a network, with HF_HOME on a file system that this machine "
        f"sees: {command}"
    )
    if isinstance(error, errors.IncompleteSnapshotError):
        return f"the hub's cache {constants.HF_HUB_CACHE} has a part of it only", download
    if isinstance(error, errors.LocalEntryNotFoundError):
        off = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"not in the hub's cache {constants.HF_HUB_CACHE}, and {off}", download
    if isinstance(error, errors.GatedRepoError):
        return "access to it must be granted", "ask for it on its page, then: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such {kind}, or it is private", "correct it, or: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such branch, tag or commit", "correct the revision"
    if isinstance(error, errors.HFValidationError):
        return "no valid name", "expected OWNER/NAME"
    text = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
    return f"cannot be downloaded ({text})", download
