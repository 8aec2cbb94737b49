"""Model directories that the checkpoint tests share, and their contents as bytes."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file


def write_two_files(tiny_model, target, in_memory=False, dtype=torch.bfloat16):
    """The tiny model in two bfloat16 files with an index, as large models are published."""
    shutil.copytree(tiny_model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(tiny_model / "model.safetensors")
    rename = {}
    for name in tensors:
        inner = name.replace("model.", "model.language_model.", 1)
        inner = "model." + name if name.startswith("visual.") else inner
        rename[name] = inner if in_memory else name
    names = sorted(tensors)
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        part = {rename[n]: tensors[n].to(dtype) for n in chosen}
        save_file(part, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def files_of(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }
