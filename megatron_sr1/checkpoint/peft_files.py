"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT itself is not imported. In the file a tensor is named as today's transformers names its module,
after `base_model.model.` (peft/utils/save_and_load.py); here it has the published name:

    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight   today
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight                  before 4.52
    model.layers.0.self_attn.q_proj.lora_A.weight                                   here

A is [rank, in] and B [out, rank]; the product of both, times the scale, is added to the weight.
Reading names and shapes, for the checks before a start, needs no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sr1.checkpoint.disk import listed
from megatron_sr1.checkpoint.mapping import ADAPTER_A, ADAPTER_B, canonical_hf_name
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
DTYPES = ("F64", "F32", "F16", "BF16")
A, B = f".{ADAPTER_A}.weight", f".{ADAPTER_B}.weight"

# What may be set without changing what the tensors mean: where the adapter comes from, how its
# modules were chosen (its tensors show which they are), how it was initialised, and two defaults
# of features that others switch on.
_NEUTRAL = frozenset(
    "auto_mapping base_model_name_or_path revision inference_mode peft_type peft_version task_type "
    "target_modules exclude_modules layers_to_transform layers_pattern eva_config runtime_config "
    "ensure_weight_tying megatron_core qalora_group_size "
    "r lora_alpha lora_dropout use_rslora bias init_lora_weights".split()
)
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# subtract something from it, so that such an adapter is not one for the published weights.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


class PeftAdapter:
    """An adapter's directory: its configuration, and the shapes of its tensors.

    Attributes:
        settings: rank, alpha, dropout and scaling; the others have their defaults.
        modules: published module name -> (in, out), for example `model.layers.0.mlp.up_proj`.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read everything but values.

        Raises:
            CheckpointError: no such adapter, or one that uses what is not supported here.
        """
        self.directory = Path(directory)
        self.settings = _read_settings(self.directory)
        self._stored = self._read_names()
        self.modules = self._read_modules()

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor by its name here, in the type of the file."""
        from safetensors import safe_open

        with safe_open(str(self.directory / WEIGHTS), framework="pt") as file:
            tensor = file.get_tensor(self._stored[name][0])
        return tensor  # type: ignore[no-any-return]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all tensors, A and B of a module one after the other."""
        for module in self.modules:
            for part in (A, B):
                yield module + part, self.read(module + part)

    def check(self, settings: AdapterConfig, modules: Iterable[str]) -> None:
        """Compare with the settings of a run and the modules that its targets match.

        Raises:
            ConfigError: they differ; it says what to set.
        """
        ours = (settings.rank, settings.alpha, settings.scaling)
        theirs = (self.settings.rank, self.settings.alpha, self.settings.scaling)
        if ours != theirs:
            names = ("rank", "alpha", "scaling")
            given, wanted = (
                " ".join(
                    f"adapter.{name}={_short(v)}" for name, v in zip(names, values, strict=True)
                )
                for values in (ours, theirs)
            )
            raise ConfigError(
                f"adapter.path={self.directory} is of another shape than {given}; set {wanted}"
            )
        wanted_modules = set(modules)
        left, extra = self.modules.keys() - wanted_modules, wanted_modules - self.modules.keys()
        problems = [
            f"{len(names)} modules {what}: {listed(sorted(names))}"
            for names, what in ((left, "not among the targets"), (extra, "that it lacks"))
            if names
        ]
        if problems:
            raise ConfigError(
                f"adapter.path={self.directory} does not fit adapter.targets; it has "
                f"{'; and '.join(problems)}; set targets that match exactly its modules"
            )

    def _read_names(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the name in the file and the shape of each tensor, by its name here."""
        from safetensors import SafetensorError, safe_open

        path = self.directory / WEIGHTS
        if not path.is_file():
            pickled = (self.directory / PICKLED).is_file()
            advice = f"; {PICKLED} is not read: save it as safetensors" if pickled else ""
            raise CheckpointError(f"{path}: no such file{advice}")
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        try:
            with safe_open(str(path), framework="np") as file:
                for stored in file.keys():  # noqa: SIM118 (no mapping)
                    name, part = published_name(stored), file.get_slice(stored)
                    if name is None or part.get_dtype() not in DTYPES:
                        raise CheckpointError(
                            f"{path}: tensor {stored} ({part.get_dtype()}) is none of LoRA's A and "
                            "B of a linear layer in float or bfloat16; other kinds of adapters and "
                            "saved base weights are not supported"
                        )
                    if name in found:
                        raise CheckpointError(f"{path}: tensor {name} is there twice")
                    found[name] = stored, tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a safetensors file, or cut off: {error}") from None
        return found

    def _read_modules(self) -> dict[str, tuple[int, int]]:
        rank, found = self.settings.rank, dict[str, tuple[int, int]]()
        for module in dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in self._stored):
            shapes = [self._stored.get(module + part, ("", ()))[1] for part in (A, B)]
            if [len(s) for s in shapes] != [2, 2] or shapes[0][0] != rank or shapes[1][1] != rank:
                raise CheckpointError(
                    f"{self.directory / WEIGHTS}: {module} has A {list(shapes[0])} and "
                    f"B {list(shapes[1])}; expected [{rank}, in] and [out, {rank}], as {CONFIG} "
                    f"has r={rank}"
                )
            found[module] = shapes[0][1], shapes[1][0]
        if not found:
            raise CheckpointError(f"{self.directory / WEIGHTS}: no tensors")
        return found


def is_adapter(directory: str | Path) -> bool:
    """Return True if a directory holds an adapter in PEFT's format."""
    return (Path(directory) / CONFIG).is_file()


def write_adapter(
    directory: str | Path,
    settings: AdapterConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    base: str = "",
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads, replacing an earlier one.

    Args:
        directory: new, empty, or an adapter's.
        settings: rank, alpha, dropout and scaling.
        tensors: A and B of each module under their names here; written in their own type.
        base: path or hub name of the base model, for `base_model_name_or_path`.

    Raises:
        CheckpointError: the directory holds something else.
    """
    from safetensors.torch import save_file

    from megatron_sr1.checkpoint.hf_files import replace_directory

    target = Path(directory)
    if target.exists() and not (
        target.is_dir() and (is_adapter(target) or not any(target.iterdir()))
    ):
        raise CheckpointError(f"{target} holds no adapter ({CONFIG}); name another directory")
    held = {PREFIX + transformers_name(n): t.detach().cpu().contiguous() for n, t in tensors}
    modules = {name[len(PREFIX) :].removesuffix(A).removesuffix(B) for name in held}
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text = json.dumps(_peft_config(settings, sorted(modules), base), indent=2) + "\n"
    (partial / CONFIG).write_text(text, encoding="utf-8")
    save_file(held, str(partial / WEIGHTS), metadata={"format": "pt"})
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    replace_directory(partial, target)


def transformers_name(name: str) -> str:
    """Return the name that today's transformers has for a published module or tensor."""
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.", "model.language_model.", name)


def published_name(stored: str) -> str | None:
    """Return the name here of a tensor in an adapter's file, of old and new names alike.

    None if it is neither A nor B of a linear layer.
    """
    if not stored.startswith(PREFIX) or not stored.endswith((A, B)):
        return None
    return canonical_hf_name(stored.removeprefix(PREFIX))


def _peft_config(settings: AdapterConfig, modules: list[str], base: str) -> dict[str, Any]:
    """Return the content of adapter_config.json; what is absent has PEFT's default.

    Modules are listed by their full names: a short one such as up_proj would match the tower's too.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.scaling == "rslora",
        "bias": "none",
        "target_modules": modules,
    }


def _read_settings(directory: Path) -> AdapterConfig:
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} came, expected settings")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the directory of an adapter") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON of an adapter: {error}") from None
    _refuse_unsupported(path, content)
    rank: Any = content.get("r")
    alpha = content.get("lora_alpha", 8)  # PEFT's default
    dropout = content.get("lora_dropout", 0.0)
    for name, value, is_right in (
        ("r", rank, type(rank) is int and rank > 0),
        ("lora_alpha", alpha, _is_number(alpha) and alpha > 0),
        ("lora_dropout", dropout, _is_number(dropout) and 0 <= dropout < 1),
    ):
        if not is_right:
            raise CheckpointError(f"{path}: {name} is {str(value)[:40]!r}")
    scaling = "rslora" if content.get("use_rslora") else "standard"
    return AdapterConfig(rank=rank, alpha=float(alpha), dropout=float(dropout), scaling=scaling)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _refuse_unsupported(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if an adapter is more than A and B of one rank, plainly scaled."""
    kind = content.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {str(kind)[:40]!r}; only LORA is supported")
    wrong = [name for name, value in content.items() if value and name not in _NEUTRAL]
    wrong += ["bias"] if content.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if content.get("init_lora_weights", True) not in _INITS else []
    if wrong:
        shown = listed([f"{name}={str(content[name])[:60]}" for name in wrong])
        raise CheckpointError(
            f"{path}: {shown}: not supported; an adapter has one rank and one alpha, and leaves "
            "all other weights as they are"
        )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
