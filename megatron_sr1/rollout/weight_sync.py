"""Streams the actor's weights into the engine, in process, via vLLM's weight-transfer interface.

With `rollout.lora=engine` the adapters alone are sent, and vLLM's own LoRA computes with them.

The payload of vLLM's `update` is the iterator itself, as trainer and engine share the process. Each
tensor is copied into the engine's weights as it arrives; only a quantised engine keeps it until its
layer is complete. The first sync records vLLM's copies, and later ones repeat them without it. The
source may therefore create each tensor on request, and the whole model never exists twice. A source
that reuses a buffer must refill it at layer boundaries only, when the next layer is requested.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.rollout import LARGEST_LORA_RANK
from megatron_sr1.errors import EngineError

BACKEND = "megatron_sr1_in_process"
LORA_ID = 1
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, LARGEST_LORA_RANK)
"""Ranks that vLLM's layers may have (vllm/config/lora.py); a smaller adapter is padded."""

READ_AHEAD = 8
"""At least as many tensors as vLLM has requested of a sync before it copies the first of them."""


def register() -> str:
    """Register the in-process transfer with vLLM and return the backend's name."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, _transfer_class())
    return BACKEND


def push(llm: Any, weights: Iterable[tuple[str, torch.Tensor]], version: int, whole: bool) -> None:
    """Run a weight update, then drop every cache computed with the old weights.

    The arguments are those of `Engine.sync`; `llm` is vLLM's `LLM`, awake and without requests.
    Raises EngineError if a tensor is missing or unknown, or has another shape.
    """
    last = "none"

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal last
        for name, tensor in weights:
            last = f"{name} {list(tensor.shape)}"
            yield name, tensor.detach()

    llm.start_weight_update()
    try:
        llm.update_weights({"update_info": {"weights": stream(), "whole": whole}})
    except (KeyError, ValueError, AssertionError) as error:
        raise EngineError(
            f"weight sync {version}: the engine rejected a tensor, {last} or one shortly before "
            f"it: {error}; expected the names and shapes of the checkpoint it was started from"
        ) from error
    llm.finish_weight_update(str(version))
    _reset_caches(llm, version)


def push_adapters(
    llm: Any, tensors: Iterable[tuple[str, torch.Tensor]], adapter: AdapterConfig, version: int
) -> Any:
    """Replace the engine's LoRA, then drop every cache computed with the old one.

    vLLM would read it from PEFT's files (vllm/lora/worker_manager.py); this makes its `LoRAModel`
    of the actor's tensors. `llm` was started with `lora_arguments`. Returns vLLM's name of it,
    which each request carries. Raises EngineError if the engine has no such module.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest

    worker = llm.llm_engine.model_executor.driver_worker.model_runner.lora_manager
    manager = worker._adapter_manager
    rslora = adapter.scaling == "rslora"
    made = LoRAModel.from_lora_tensors(
        LORA_ID,
        # Copies: vLLM multiplies B by the scale in place.
        {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors},
        PEFTHelper(adapter.rank, adapter.alpha, target_modules=[], use_rslora=rslora),
        device="cpu",  # as vLLM does; the layers have a copy on their device
        dtype=worker.lora_config.lora_dtype,
        weights_mapper=manager.model.hf_to_vllm_mapper.get_rename_mapper(),
    )
    parts = (name for names in manager.packed_modules.values() for name in names)
    unknown = sorted(made.loras.keys() - manager.modules.keys() - set(parts))
    if unknown:  # vLLM would leave them out
        raise EngineError(
            f"weight sync {version}: the engine has no LoRA for {len(unknown)} modules: "
            f"{', '.join(unknown[:3])}; set rollout.lora=merged"
        )
    manager.remove_adapter(LORA_ID)
    manager.add_adapter(made)
    manager.activate_adapter(LORA_ID)
    _reset_caches(llm, version)
    return LoRARequest("actor", LORA_ID, "in memory")


def lora_arguments(adapter: AdapterConfig) -> dict[str, Any]:
    """Return vLLM's arguments for one LoRA of this rank, in the model's type."""
    rank = min(rank for rank in LORA_RANKS if rank >= adapter.rank)
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}


def _reset_caches(llm: Any, version: int) -> None:
    """Drop keys and values, and vision embeddings, of the old weights."""
    if not llm.reset_prefix_cache():
        raise EngineError(f"weight sync {version}: the prefix cache is in use and was not reset")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def keep_linear_weights() -> None:
    """Let vLLM's layers on a CPU compute with their weights, not with a packed copy of them.

    Packing after each sync takes longer than it saves, and packed weights cannot be written to.
    """
    from vllm.model_executor.layers import utils

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def _absent_parts(names: Collection[str], fused: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the tensors that are absent of a layer that arrived in part, as k and v beside q.

    `fused` has the parts of each fused layer by its name.
    """
    siblings = {
        name.replace(f".{part}.", f".{sibling}.")
        for parts in fused.values()
        for part in parts
        for name in names
        if f".{part}." in name
        for sibling in parts
    }
    return siblings - set(names)


@dataclass(frozen=True)
class _Copies:
    """The copies that vLLM makes of a tensor of this shape and these strides.

    Each is a view of the engine's weights, and the offset, shape and strides of the part of the
    tensor that is copied to it.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    parts: list[tuple[torch.Tensor, int, torch.Size, tuple[int, ...]]]

    def fit(self, tensor: torch.Tensor) -> bool:
        """Return True if these are the copies of `tensor`, too."""
        return tensor.shape == self.shape and tensor.stride() == self.strides

    def repeat(self, tensor: torch.Tensor) -> None:
        """Copy the parts of a tensor."""
        for place, offset, shape, strides in self.parts:
            place.copy_(tensor.as_strided(shape, strides, tensor.storage_offset() + offset))


class _CopyRecorder(TorchFunctionMode):
    """Within a block, records how vLLM copies the tensors of a sync into the engine's weights.

    vLLM searches its modules anew for the place of each tensor, which takes longer than the copy.
    """

    def __init__(self) -> None:
        """Record nothing yet."""
        super().__init__()
        self._recent: deque[tuple[str, int, int]] = deque(maxlen=READ_AHEAD)  # name, address, bytes
        self._found: dict[str, _Copies] = {}
        self._is_complete = True

    def watched(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the sync."""
        for name, tensor in weights:
            self._recent.appendleft((name, tensor.data_ptr(), tensor.nbytes))
            self._found[name] = _Copies(tensor.shape, tensor.stride(), [])
            yield name, tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call torch's function, and record what it copies."""
        if func is torch.Tensor.copy_:
            place, part = args[:2]
            for name, address, num_bytes in self._recent:
                if 0 <= (offset := part.data_ptr() - address) < num_bytes:
                    which = place, offset // part.itemsize, part.shape, part.stride()
                    self._found[name].parts.append(which)
                    break
            else:
                self._is_complete = False
        return func(*args, **(kwargs or {}))

    def copies(self) -> dict[str, _Copies]:
        """Return the copies of tensors that were copied, by name.

        There are none if something was copied that is no part of a tensor of the sync.
        """
        return {n: c for n, c in self._found.items() if c.parts} if self._is_complete else {}


@functools.cache
def _transfer_class() -> type:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader import reload

    @dataclass
    class Update(WeightTransferUpdateInfo):
        """The stream of weights."""

        weights: Iterator[tuple[str, torch.Tensor]]
        whole: bool

    class InProcessTransfer(
        WeightTransferEngine[WeightTransferInitInfo, Update]  # type: ignore[misc]
    ):
        """Loads the weights that the trainer in the same process yields, layer by layer."""

        init_info_cls = WeightTransferInitInfo  # empty: trainer and engine share one process
        update_info_cls = Update

        def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
            self._held = {name for name, _ in self.model.named_parameters()}
            self._is_quantised = self.model_config.quantization is not None
            self._copies: dict[str, _Copies] = {}
            self._sent = set[str]()  # by the first whole sync, which recorded its copies

        def start_weight_update(self) -> None:
            if self._is_quantised:
                reload.initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Update) -> None:
            # Excludes the scales of quantised layers, which exist only between two syncs, and the
            # name of a tied layer, which exists only during one.
            expected = set[str]()
            if not self._sent:
                expected = self._held & {name for name, _ in self.model.named_parameters()}
            names = set()

            def noted() -> Iterator[tuple[str, torch.Tensor]]:
                for name, tensor in update_info.weights:
                    names.add(name)
                    copies = self._copies.get(name)
                    if copies and copies.fit(tensor):
                        copies.repeat(tensor)
                    else:
                        yield name, tensor

            recorder = None
            if update_info.whole and not self._sent and not self._is_quantised:
                recorder = _CopyRecorder()
            with torch.no_grad(), recorder or contextlib.nullcontext():
                weights = recorder.watched(noted()) if recorder else noted()
                loaded = set(self.model.load_weights(weights))
            absent = (self._sent - names) | (expected - loaded) if update_info.whole else set()
            missing = sorted(absent | _absent_parts(names, self.model.packed_modules_mapping))
            if missing:
                raise EngineError(
                    f"{len(missing)} layers or tensors of the engine are missing or incomplete: "
                    f"{', '.join(missing[:3])}; send all tensors of the checkpoint"
                )
            if recorder:
                self._copies, self._sent = recorder.copies(), names

        def finish_weight_update(self) -> None:
            if self._is_quantised:
                reload.finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    return InProcessTransfer
