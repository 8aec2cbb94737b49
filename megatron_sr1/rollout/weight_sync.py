"""Streaming the actor's weights into the engine, in process, over vLLM's weight-transfer interface.

In: an iterator of (Hugging Face name, full tensor). Out: the engine computes with them, vision
tower included, on every rank of its tensor parallelism.

vLLM's four phases (`init`, `start`, `update`, `finish`) are kept; the payload of `update` is the
iterator itself, as trainer and engine share the process. vLLM loads a layer as soon as the last of
its tensors has come and lets go of them then: the source may make each tensor when asked for it,
and the whole model never exists twice. A tensor must not be written to again before the next layer
was asked for; a source with a buffer that it refills cuts it at layer borders.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sr1.errors import EngineError

log = logging.getLogger(__name__)

BACKEND = "megatron_sr1_in_process"


def register() -> str:
    """Make the in-process transfer known to vLLM; returns the name to configure."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, _transfer_class())
    return BACKEND


def connect(llm: Any) -> None:
    """First phase, once an engine."""
    llm.init_weight_transfer_engine({"init_info": {}})


def push(
    llm: Any, weights: Iterable[tuple[str, torch.Tensor]], version: int, whole: bool = True
) -> None:
    """The other three phases, then drop every cache that was computed with the old weights.

    Args:
        llm: vLLM's `LLM`, without live requests, its weights awake.
        weights: (Hugging Face name, full tensor) of the whole model, any dtype; on each rank of an
            engine the same. Iterated once; may be collective.
        version: number that vLLM reports from now on.
        whole: False: layers of which nothing comes keep what they have.

    Raises:
        EngineError: a tensor of the model did not come, or one is unknown or of another shape.
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
            f"weight sync {version}: the engine refused a tensor, {last} or one shortly before: "
            f"{error}; expected the names and shapes of the checkpoint that it was started from"
        ) from error
    with contextlib.nullcontext() if whole else _quiet():
        llm.finish_weight_update(str(version))
    # Keys and values, processed images and vision embeddings of the old weights.
    if not llm.reset_prefix_cache():
        raise EngineError(f"weight sync {version}: the prefix cache is in use and was not reset")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's warning for each layer that kept its weights."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _unfinished(model: torch.nn.Module) -> set[str]:
    """Fused layers of which only a part came, as q without k.

    An embedding is padded to a round number of rows and never full; it has one tensor, so that it
    came at all is enough.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    names = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        padded = hasattr(layer, "num_embeddings_padded")
        if info.can_load() and not padded and 0 < info.load_numel < info.load_numel_total:
            names.add(name)
    return names


def _repack_output_layer(model: torch.nn.Module) -> None:
    """Pack an output layer's weight again after it came.

    One that is tied to the embedding gets no tensor of its own, so the reload does not process it;
    but on a CPU it computes with a packed copy, made when it was first loaded.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


@functools.cache
def _transfer_class() -> type:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader import reload

    @dataclass
    class Init(WeightTransferInitInfo):
        """Nothing to agree on: one process."""

    @dataclass
    class Update(WeightTransferUpdateInfo):
        """The stream itself."""

        weights: Iterator[tuple[str, torch.Tensor]]
        whole: bool

    class InProcessTransfer(WeightTransferEngine[Init, Update]):  # type: ignore[misc]
        """Loads layer by layer what the trainer in the same process yields."""

        init_info_cls = Init
        update_info_cls = Update

        def init_transfer_engine(self, init_info: Init) -> None:
            self._held = {name for name, _ in self.model.named_parameters()}

        def start_weight_update(self) -> None:
            reload.initialize_layerwise_reload(self.model)
            # Without the scales of quantised layers, which exist only between two syncs, and
            # without the name of a tied layer, which exists only during one.
            self._expected = self._held & {name for name, _ in self.model.named_parameters()}

        def receive_weights(self, update_info: Update) -> None:
            with torch.no_grad():
                loaded = set(self.model.load_weights(update_info.weights))
            absent = self._expected - loaded if update_info.whole else set()
            missing = sorted(absent | _unfinished(self.model))
            if missing:
                raise EngineError(
                    f"{len(missing)} layers or tensors of the engine's did not come whole, among "
                    f"them {', '.join(missing[:3])}; send all tensors of the checkpoint"
                )

        def finish_weight_update(self) -> None:
            reload.finalize_layerwise_reload(self.model, self.model_config)
            _repack_output_layer(self.model)

        def shutdown(self) -> None:
            pass

    return InProcessTransfer
