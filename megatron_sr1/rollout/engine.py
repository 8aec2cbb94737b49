"""The rollout engine: vLLM in this process, on the ranks that the trainer runs on.

A replica spans `tensor_parallel` neighbouring ranks. Each rank adds the same requests, runs the
same steps and samples on its own, so every request carries its own seed. Replicas work on different
prompts and do not communicate.

Logprobs are log_softmax(logits / temperature) over the whole vocabulary; banned ids are excluded
from sampling only (see `FullVocabularySampler`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import EngineError
from megatron_sr1.records import Completion, VisionInputs
from megatron_sr1.rollout import decode_steps, vllm_api, weight_sync


@dataclass(slots=True)  # frozen ones take three times as long to make
class Request:
    """A sequence to sample, or to score.

    Attributes:
        id: unique among the live requests, the same on all ranks of a replica.
        token_ids: prompt, one image-pad id per merged patch.
        vision: pixels of its images, in order; requests may share them.
        temperature: 0 is greedy.
        max_tokens: maximum number of sampled tokens, including the end of turn.
        seed: sampling seed of this request, in [0, 2**31).
        with_logprobs: whether the completion contains the engine's logprobs.
        watched_for: a step reports the request if the text of its newest token contains this; None:
            only its end is reported.
        num_scored: number of tokens at the end of the prompt to score at temperature 1, by prefill
            alone; 0: the request samples.
    """

    id: str
    token_ids: tuple[int, ...]
    vision: VisionInputs | None = None
    temperature: float = 1.0
    max_tokens: int = 16
    seed: int = 0
    with_logprobs: bool = True
    watched_for: str | None = None
    num_scored: int = 0


class Progress(NamedTuple):
    """State of one request after a step.

    `text` is what it has sampled so far, without special tokens; `completion` is the result of a
    request that is finished.
    """

    id: str
    text: str
    completion: Completion | None


class Engine:
    """One rank's part of a colocated vLLM engine replica.

    Attributes:
        replica: index of this rank's replica, of `num_replicas`; its first rank is its leader.
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
        timeout_seconds: float = 1800.0,
        adapter: AdapterConfig | None = None,
    ) -> None:
        """Load a Hugging Face directory. Collective; torch.distributed must be initialized.

        `rollout.sleep_level` is for CUDA; on a CPU the engine always runs eagerly, as compiling
        takes longer than it saves. `processor` gives the pixel limits, the size of the largest
        image and the vision tokens, which are never sampled; without it the limits are the
        directory's, every token is sampled, and prompts have no images. Raises EngineError if the
        installed vLLM is not built for `device_kind`, cpu or cuda. `dtype` is float32 or bfloat16.
        A collective of the replica may take `timeout_seconds`. With an `adapter`, its weights are
        the base and `sync_adapters` is used.
        """
        size, world = rollout.tensor_parallel, torch.distributed.get_world_size()
        assert world % size == 0, f"rollout.tensor_parallel={size} does not divide {world} ranks"
        self.num_replicas = world // size
        self.replica, place = divmod(torch.distributed.get_rank(), size)
        self.is_replica_leader = place == 0
        self.max_model_len = rollout.max_model_len
        self.weight_version = -1
        self.num_steps = 0
        self._sleep_level = rollout.sleep_level if device_kind == "cuda" else 0
        self._asleep, self._unusable = False, ""
        self._llm = vllm_api.start_vllm(
            model_dir,
            rollout,
            processor,
            device_kind=device_kind,
            dtype=dtype,
            seed=seed,
            timeout_seconds=timeout_seconds,
            adapter=adapter,
        )
        self._adapter = adapter
        self._lora: Any = None  # of vLLM, once there is one
        self._core = self._llm.llm_engine
        self._tokenizer = self._llm.get_tokenizer().backend_tokenizer
        weakref.finalize(self, vllm_api.shut_down, self._core.engine_core.engine_core)
        self._image_pad = (processor.image_pad_id, processor.merge_size) if processor else None
        self._parameters = vllm_api.Parameters()
        self._live: dict[str, Request] = {}
        self._watched: dict[str, dict[str, Sequence[int]]] = {}  # by mark and request
        self._ids_with: dict[str, frozenset[int]] = {}

    @property
    def scheduler(self) -> Any:
        """The scheduler of vLLM, which the benchmark records."""
        return self._core.engine_core.engine_core.scheduler

    @property
    def num_live(self) -> int:
        """Number of unfinished requests."""
        return len(self._live)

    def submit(self, requests: Sequence[Request]) -> None:
        """Add requests, which start with the next step.

        Raises EngineError if the engine is asleep, or a prompt does not fit or has other places for
        images than its pixels.
        """
        if self._asleep or self._unusable:
            raise EngineError(f"the engine cannot sample: {self._unusable or 'it is asleep'}")
        prompts: dict[tuple[Any, ...], Any] = {}
        for request in requests:
            sizes = len(request.token_ids), 1 if request.num_scored else request.max_tokens
            if not self.fits(*sizes):
                raise self.too_long(f"request {request.id}: it", *sizes)
            assert request.id not in self._live, f"request {request.id} is already live"
            key = (request.token_ids, id(request.vision))
            if key not in prompts:
                prompts[key] = vllm_api.engine_input(request, self._image_pad)
            added = self._core.add_request(
                request.id, prompts[key], self._parameters.of(request), lora_request=self._lora
            )
            self._live[request.id] = request
            if request.with_logprobs and not request.num_scored:
                decode_steps.keep_logprobs(self._core, added)
            if request.watched_for is not None:
                tokens = vllm_api.sampled_tokens(self._core, added)
                self._watched.setdefault(request.watched_for, {})[request.id] = tokens

    def unwatch(self, name: str) -> None:
        """Report only the end of a request from now on."""
        for watched in self._watched.values():
            watched.pop(name, None)

    def step(self) -> list[Progress]:
        """Run one engine step; return the watched requests with a new mark, then the finished ones.

        A request in both groups is returned twice. A mark is new if the last token has it.
        """
        self.num_steps += 1
        outputs = self._core.step()
        marked: dict[str, Sequence[int]] = {}
        for mark, watched in self._watched.items():
            ids = self.ids_with(mark)
            marked |= {name: seen for name, seen in watched.items() if seen and seen[-1] in ids}
        finished = [output.outputs[0].token_ids for output in outputs]
        if not marked and not outputs:
            return []
        # The tokenizers library itself, and all at once: one call for each takes ten times as long.
        texts = iter(self._tokenizer.decode_batch([*marked.values(), *finished]))
        progress = [Progress(name, text, None) for name, text in zip(marked, texts, strict=False)]
        for output, text in zip(outputs, texts, strict=True):
            name = output.request_id
            self.unwatch(name)
            completion = _completion(self._live.pop(name), output, text)
            progress.append(Progress(name, text, completion))
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
        vision: VisionInputs | None = None,
    ) -> list[float]:
        """Return the logprob of each token of a given response, nats, at temperature 1.

        Only prefill runs. Raises EngineError if prompt and response leave no token of
        `max_model_len` free.
        """
        assert not self._live, "score between rollouts"
        token_ids, num_scored = (*prompt_token_ids, *response_token_ids), len(response_token_ids)
        request = Request("score", token_ids, vision, num_scored=num_scored)
        return list(self.generate([request])[0].logprobs)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled ids without special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def ids_with(self, mark: str) -> frozenset[int]:
        """Return the ids whose text contains a mark (cached)."""
        if mark not in self._ids_with:
            ids = range(self._tokenizer.get_vocab_size())
            texts = self._tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
            found = (i for i, text in zip(ids, texts, strict=True) if mark in text)
            self._ids_with[mark] = frozenset(found)
        return self._ids_with[mark]

    @property
    def keeps_weights(self) -> bool:
        """Whether weights survive sleep, so that frozen ones need to be synced only once."""
        return self._sleep_level != 2

    def sync(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int, whole: bool = True
    ) -> None:
        """Load the actor's weights and drop every cache computed with the old ones.

        `weights` are (Hugging Face name, full tensor) pairs, the same on each rank of the replica;
        they are iterated once, layer by layer, and the iteration may be collective. Later rollouts
        carry `version`. Unless `whole`, layers that receive no tensor keep their weights. Raises
        EngineError if the engine is asleep or has live requests, or tensors are missing.
        """
        with self._syncing(version):
            weight_sync.push(self._llm, weights, version, whole)

    def sync_adapters(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load the actor's adapters, as `sync` does weights; all later requests use them.

        `tensors` are A and B under their published names, the same on each rank of the replica.
        """
        assert self._adapter is not None, "the engine was started without an adapter"
        with self._syncing(version):
            self._lora = weight_sync.push_adapters(self._llm, tensors, self._adapter, version)

    @contextmanager
    def _syncing(self, version: int) -> Iterator[None]:
        """Check that a sync is possible; an engine whose sync failed is not used again."""
        if self._unusable.startswith("weight sync"):
            raise EngineError(self._unusable)
        if self._asleep or self._live:
            state = "asleep" if self._asleep else f"working on {self.num_live} requests"
            raise EngineError(f"weight sync {version}: engine is {state}; sync between rollouts")
        self._unusable = f"weight sync {version} failed; start the run again"
        yield
        self.weight_version, self._unusable = version, ""

    def sleep(self) -> None:
        """Free encoded images, and GPU memory according to the sleep level, between rollouts."""
        if self._asleep:
            return
        assert not self._live, "sleep between rollouts"
        self._core.reset_encoder_cache()  # vLLM's sleep does so itself, except at level 0
        if self._sleep_level > 0:
            self._llm.sleep(level=self._sleep_level)
            self._asleep = True
        if not self.keeps_weights:
            self._unusable = "sleep level 2 dropped its weights; sync them first"

    def wake(self) -> None:
        """Allocate the memory again; after sleep level 2 the next call must be `sync`."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def fits(self, num_prompt: int, num_sampled: int) -> bool:
        """Return True if these tokens do not exceed the longest sequence."""
        return num_prompt + num_sampled <= self.max_model_len

    def too_long(self, what: str, num_prompt: int, num_sampled: int) -> EngineError:
        """Return the error, which names `what`, of tokens that do not fit."""
        return EngineError(
            f"{what} can take {num_prompt} prompt tokens and {num_sampled} sampled ones, which "
            f"exceeds the engine's {self.max_model_len}; raise rollout.max_model_len or lower "
            "the token limits"
        )


def _completion(request: Request, output: Any, text: str) -> Completion:
    """Return the completion of a finished request."""
    if request.num_scored:
        given = request.token_ids[-request.num_scored :]
        scores = output.prompt_logprobs.logprobs[-request.num_scored :]
        return Completion(given, tuple(scores), "", "given")
    sampled = output.outputs[0]
    return Completion(
        token_ids=tuple(sampled.token_ids),
        logprobs=() if sampled.logprobs is None else tuple(sampled.logprobs.logprobs),
        text=text,
        finish_reason=sampled.finish_reason,
    )
