"""Frozen records that are passed between stages.

    shards -> Example -> Prompt -> Rollout -> Reward -> TrainSample -> PackedBatch -> loss

Images are never sent between ranks: their pixels are read from the shard, by the sample's index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `content` may contain `<image>` marks (data/examples.py)."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A sample of a dataset as stored in its shard, without pixels.

    Attributes:
        index: position in the dataset; identifies the sample on every rank.
        key: webdataset key of the sample inside its shard.
        shard: path of the shard, for messages.
        messages: one user turn for reinforcement learning; a conversation that ends with an
            assistant turn for supervised fine-tuning.
        answer: gold answer; None for supervised fine-tuning.
        num_images: equals the number of `<image>` marks in `messages`.
        metadata: further columns, JSON values.
        other_answers: further gold answers; a response is right if it matches any of them.
    """

    index: int
    key: str
    shard: str
    messages: tuple[Message, ...]
    answer: str | None
    num_images: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    other_answers: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The sample's place for messages: its shard and key."""
        return f"{self.shard} sample {self.key}"

    @property
    def golds(self) -> tuple[str, ...]:
        """All gold answers, in order; empty if there is no answer."""
        return () if self.answer is None else (self.answer, *self.other_answers)

    @property
    def question(self) -> str:
        """Content of the last user turn, `<image>` marks included."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt.

    Attributes:
        token_ids: each image is a run of image-pad ids, one per merged patch.
        vision: pixels of its images, in order; None without images.
    """

    example: Example
    token_ids: tuple[int, ...]
    vision: VisionInputs | None = None

    @property
    def image_grid_thw(self) -> tuple[tuple[int, int, int], ...]:
        """Grid of each image, (t, h, w) in patches."""
        return () if self.vision is None else self.vision.grids


@dataclass(frozen=True)
class Completion:
    """What the engine sampled for one request.

    Attributes:
        token_ids: includes the end-of-turn id if it was sampled.
        logprobs: the engine's logprob of each id under the distribution that it was sampled from
            (temperature applied), nats; empty if not requested.
        text: decoded, without special tokens.
        finish_reason: "stop" (end of turn), "length" (cut by a token limit), "given" (the ids were
            scored at temperature 1, not sampled; no text) or "failed" (an endpoint gave no answer;
            the text says why). An endpoint's answers have a text alone.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Reading:
    """Result of the second pass: sampled answers, or the gold answer with its logprobs."""

    answers: tuple[Completion, ...]

    @property
    def gold_logprobs(self) -> tuple[float, ...] | None:
        """The engine's logprob of each token of the gold answer, nats; None if it was sampled."""
        (first, *_) = self.answers
        return first.logprobs if first.finish_reason == "given" else None

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of the sampled answers; empty if the gold answer was scored."""
        return tuple(a.text for a in self.answers if a.finish_reason not in ("given", "failed"))

    @property
    def failure(self) -> str | None:
        """Why the endpoint did not give all answers; None if it did, or none was asked."""
        return next((a.text for a in self.answers if a.finish_reason == "failed"), None)


@dataclass(frozen=True)
class Rollout:
    """One sampled response, and what the second pass answered from its description alone.

    Attributes:
        sample: index of this response among those of its prompt.
        prompt_token_ids: as `Prompt.token_ids`.
        description: text of the description span; None if the recipe has none or it is not closed.
        reading: pass 2, from description and question without the image; None if it did not run.
        weight_version: number of the weight sync that the engine sampled with.
        question_only: the same from the question alone, for comparison; None if it did not run.
        replica: index of the engine replica that sampled it.
    """

    index: int
    sample: int
    prompt_token_ids: tuple[int, ...]
    completion: Completion
    description: str | None
    reading: Reading | None
    weight_version: int
    question_only: Reading | None = None
    replica: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """What names the rollout in a step."""
        return self.index, self.sample


def texts(rollout: Rollout, example: Example) -> dict[str, Any]:
    """Return the texts of a rollout, as the files of a run hold them.

    `reading` holds the answers of pass 2, or the likelihood of the gold answer.
    """
    reading = None
    if rollout.reading is not None:
        reading, scores = "\n".join(rollout.reading.texts), rollout.reading.gold_logprobs
        if scores is not None:
            reading = f"(log p of the gold answer: {sum(scores):.3f} over {len(scores)} tokens)"
    others = {"other_golds": list(example.other_answers)} if example.other_answers else {}
    return {
        "question": example.question,
        "gold": example.answer,
        **others,
        "response": rollout.completion.text,
        "description": rollout.description,
        "reading": reading,
    }


RIGHT_FROM = 0.5
"""Verdicts of at least this value count as right in tables; the grader's are 0 and 1."""


@dataclass(frozen=True)
class Reward:
    """Verdicts on one rollout and their sum.

    Attributes:
        accuracy: 1 if the pass-1 answer is right, else 0; a user's function may return any value
            in its range.
        format: 1 if the response has the recipe's form, else 0.
        self_reward: mean verdict on the pass-2 answers, or the gold answer's likelihood in [0, 1];
            minus that of the question alone, if configured. None if there is no pass 2 by design
            (a text-only sample, a recipe without it), 0 if the description is missing.
        leak: True if the description states the answer as a conclusion.
        total: the recipe's weighted sum, or what a user's function for it returned; less the
            penalty for length.
        answer: content of the box of pass 1; None without one.
        reading_answer: the same of the first answer of pass 2.
        uncomparable: exception that a library raised on an answer, which then counts as wrong.
        because: the grader's rule that decided on the answer; "function" if a user's one did.
        reading_because: the same for the first answer of pass 2.
        overlong: penalty for length before its weight, from 0 to 1; None if there is none.
        metrics: further metrics that a user's function returned.
    """

    accuracy: float
    format: float
    self_reward: float | None
    leak: bool
    total: float
    answer: str | None
    reading_answer: str | None
    uncomparable: str | None = None
    because: str | None = None
    reading_because: str | None = None
    overlong: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSample:
    """One sequence to train on; entry t of each array refers to token t.

    Attributes:
        index: of the example, from which its images are read; -1 for one without images.
        token_ids: [tokens] int64, prompt and response, with runs of image-pad ids.
        loss_mask: [tokens] bool, True where the token is a target. Never True at token 0.
        advantages: [tokens] float32 or None (supervised).
        old_logprobs: [tokens] float32, the actor's before this batch's updates, or None.
        engine_logprobs: [tokens] float32, as sampled, or None.
        reference_logprobs: [tokens] float32, of the frozen reference, or None.
    """

    index: int
    num_images: int
    token_ids: np.ndarray
    loss_mask: np.ndarray
    image_grid_thw: tuple[tuple[int, int, int], ...] = ()
    advantages: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    engine_logprobs: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None

    @cached_property
    def num_prompt_tokens(self) -> int:
        """Number of tokens before the first target; 0 if there is no target."""
        return int(self.loss_mask.argmax())


@dataclass(frozen=True)
class VisionInputs:
    """Pixels of images, as the vision tower's input.

    Attributes:
        pixel_values: [patches, 3 * temporal_patch * patch * patch] float32 or, for a tower that
            computes in it, bfloat16; normalised.
        image_grid_thw: [images, 3] int64, (t, h, w) in patches.
        occurrences: [places] int64 on the host, which image is at each place of the row; None: each
            image once, in order.
        digests: names each image by its content, for the engine's caches; empty in rows.
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    occurrences: torch.Tensor | None = None
    digests: tuple[str, ...] = ()

    @cached_property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Grid of each image, (t, h, w) in patches."""
        return tuple((t, h, w) for t, h, w in self.image_grid_thw.tolist())


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch: sequences packed one after the other into a row of T tokens.

    Per-token tensors are aligned with the *predicting* position: entry t refers to the token that
    the logits at position t predict, so `labels[t]` is token t + 1 of the same sequence. At the
    last token of a sequence and in padding, `loss_mask` and `labels` are 0. Padding follows the
    last sequence, and each sequence if the layout requires it.

    Attributes:
        sample_ids: indices of the samples in the list that was packed, in order.
        input_ids: [1, T] int64.
        labels: [1, T] int64.
        loss_mask: [1, T] float32, 0 or 1.
        position_ids: [3, 1, T] int64, mRoPE rows (time, height, width), restarting at each
            sequence; 0 in padding.
        cu_seqlens: [sequences + 1] int32, boundaries in the row, each sequence's padding included;
            padding after the last one is a sequence of its own.
        vision: images of all sequences, each only once; None if there are none.
        shared_tokens: [sequences] int32, how many tokens at a sequence's start equal those of the
            sequence before, and are computed there alone; None: all are computed.
        advantages, old_logprobs, engine_logprobs, reference_logprobs: [1, T] float32 or None, as in
            `TrainSample`.
    """

    sample_ids: tuple[int, ...]
    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    vision: VisionInputs | None = None
    shared_tokens: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    engine_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
