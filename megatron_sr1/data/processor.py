"""Converts chat messages to token ids, and images to the input of the vision tower.

In token ids an image is a run of image-pad ids, one per merged patch. Engine and trainer get the
same ids and the same pixels, which are made once. The image processor is the class that vLLM loads
for the same directory (transformers' torchvision one).

Markers that the chat template writes (`<|im_start|>`, one `<|image_pad|>` per image) become special
tokens. The same characters inside a question, a description or an answer are tokenised as plain
text, so a data set can neither end a turn nor refer to an image that it does not have. Other text
gets the same ids as from transformers' `apply_chat_template`. A template is a program that comes
with the model: it runs in transformers' sandbox, and within the limits of data/sandbox.py.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_sr1.data.guards import printable, read_json, shown
from megatron_sr1.data.images import ImageInfo, largest_pixels
from megatron_sr1.data.prompts import ChatMessage, chat_messages
from megatron_sr1.data.sandbox import read_template, render
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.records import Example, Message, Prompt, TrainSample, VisionInputs
from megatron_sr1.runtime.cpu import patch_torchvision

IMAGE_PAD = "<|image_pad|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
Grid = tuple[int, int, int]
_DEFUSE = "\ue0de"
"""Private-use character; inserted into a special token's name, it turns the name into text."""


class Processor:
    """Tokenizer, chat template and image processor of a model directory."""

    def __init__(
        self,
        model_dir: str | Path,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        chat_template: str = "",
        dtype: str = "float32",
    ) -> None:
        """Read a Hugging Face directory.

        The image area after resizing is `min_pixels` to `max_pixels`, before sides are rounded to
        patches; None: the model's own limit, in preprocessor_config.json or, as transformers 5
        saves it, processor_config.json. The file `chat_template` replaces the model's chat
        template. `dtype` is that of the pixels, float32 or bfloat16.

        Raises:
            ConfigError: the pixel limits exclude each other or leave a small image without a patch,
                or the file of the chat template cannot be read.
            DataError: files cannot be read, or the chat template or the image token is missing.
        """
        self.model_dir = Path(model_dir)
        self.tokenizer, self.image_processor = _load(self.model_dir, min_pixels, max_pixels)
        size = self.image_processor.size
        self.min_pixels = _setting(size, "shortest_edge", 0, self.model_dir)
        self.max_pixels = _setting(size, "longest_edge", 0, self.model_dir)
        self.merge_size = _setting(self.image_processor, "merge_size", 1, self.model_dir)
        self.patch_size = _setting(self.image_processor, "patch_size", 1, self.model_dir)
        self._patch_side = side = self.patch_size * self.merge_size
        if self.min_pixels < side**2:
            raise ConfigError(
                f"min_pixels={self.min_pixels} is less than a patch of {side} x {side} pixels, so "
                f"a small image would have none; set it to {side**2} or more"
            )
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"min_pixels={self.min_pixels} is more than max_pixels={self.max_pixels}"
            )
        added = self.tokenizer.added_tokens_decoder
        self._special = special = {t.content: int(i) for i, t in added.items() if t.special}
        names = sorted(special, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
        self._template_name = f"{self.model_dir}: the chat template"
        if chat_template:
            self._template_name = f"data.chat_template={chat_template}: the chat template"
            self._template = read_template("data.chat_template", chat_template)
        else:
            self._template = _chat_template(self.model_dir, self.tokenizer)
        (self._shortest,) = self.render([chat_messages([Message("user", "?")])])
        if IMAGE_PAD not in special:
            raise DataError(
                f"{model_dir}: the tokenizer has no special token {IMAGE_PAD}; expected the "
                "directory of a Qwen2.5-VL model"
            )
        self.image_pad_id = special[IMAGE_PAD]
        self.vision_token_ids = tuple(special[t] for t in VISION_TOKENS if t in special)
        self.end_token_ids = _end_token_ids(self.model_dir, self.tokenizer)
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        self._piece = functools.cache(lambda token: str(decode([token])))
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]

    @property
    def max_image_tokens(self) -> int:
        """Tokens of the largest image, which rounding can make larger than `max_pixels`."""
        side = self._patch_side
        return largest_pixels(self.min_pixels, self.max_pixels, side) // side**2

    def prompt_ends_with(self, mark: str) -> bool:
        """Return True if the chat template writes this text at the end of a prompt."""
        return self._shortest.rstrip().endswith(mark)

    def encode_prompt(
        self, example: Example, vision: VisionInputs | None, messages: Sequence[ChatMessage]
    ) -> Prompt:
        """Tokenise the chat messages of an example with these images."""
        grids = vision.grids if vision else ()
        return Prompt(example, self.encode_text(messages, grids), vision)

    def encode_text(
        self, messages: Sequence[ChatMessage], grids: Sequence[Grid] = ()
    ) -> tuple[int, ...]:
        """Tokenise a prompt with images of these grids, by default without, as in pass 2."""
        (ids,) = self.encode(self.render([messages]))
        return self.expand(ids, grids)

    def encode_answer(
        self, before: str, answer: str, after: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokenise a given response, to score its answer.

        Returns the ids before the answer, and the ids from its first character to the end; a token
        with characters of both belongs to the answer.
        """
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        encoded = self.tokenizer(before + answer + after, return_offsets_mapping=True, **plain)
        ids = tuple(encoded["input_ids"])
        first = sum(end <= len(before) for _, end in encoded["offset_mapping"])
        return ids[:first], ids[first:]

    def encode_conversation(
        self,
        example: Example,
        grids: tuple[Grid, ...] = (),
        max_tokens: int | None = None,
    ) -> TrainSample:
        """Tokenise a conversation to imitate; targets are the assistant turns with their ends.

        `grids` are those of its images.

        It is split before and after each assistant turn's text, and each piece tokenised on its
        own, as the engine samples a response after its prompt. Later turns are ignored.

        Raises:
            DataError: no assistant turn, a template that rewrites earlier turns, or more than
                `max_tokens` with images expanded.
        """
        messages, done = chat_messages(example.messages), ""
        ids: list[int] = []
        targets: list[bool] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            (prompt,) = self.render([messages[:number]])
            (whole,) = self.render([messages[: number + 1]], generate=False)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise DataError(
                    "the chat template renders earlier turns differently later on; split the "
                    "conversation into samples with one assistant turn each"
                )
            asked, said = self.encode([prompt[len(done) :], whole[len(prompt) :]])
            ends = [i + 1 for i, token in enumerate(said) if token in self.end_token_ids]
            # Learnt up to the template's last end of turn; what follows it is not sampled.
            upto = ends[-1] if ends else len(said)
            ids += asked + said
            targets += [False] * len(asked) + [True] * upto + [False] * (len(said) - upto)
            done = whole
        if not ids:
            raise DataError("no assistant turn; supervised samples need one to imitate")
        counts = self._expansion(ids, grids)
        token_ids = np.repeat(np.asarray(ids, np.int64), counts)
        if max_tokens is not None and len(token_ids) > max_tokens:
            raise DataError(f"{len(token_ids)} tokens, limit {max_tokens}")
        mask = np.repeat(np.asarray(targets, bool), counts)
        return TrainSample(example.index, len(grids), token_ids, mask, grids)

    def expand(self, ids: Sequence[int], grids: Sequence[Grid]) -> tuple[int, ...]:
        """Expand one pad id per image to one per merged patch."""
        if not grids and self.image_pad_id not in ids:
            return tuple(ids)
        return tuple(np.repeat(ids, self._expansion(ids, grids)).tolist())

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each id: "" for special tokens, U+FFFD for parts of a character."""
        return [self._piece(token) for token in token_ids]

    def rendered(self, token_ids: Sequence[int]) -> str:
        """Return a prompt as text, special tokens included, each image as one pad."""
        pairs = itertools.pairwise((-1, *token_ids))
        ids = [i for before, i in pairs if not before == i == self.image_pad_id]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def grid(self, image: Image.Image | ImageInfo) -> Grid:
        """Return (t, h, w) of an image after resizing, in patches, without processing pixels."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        limits = self.min_pixels, self.max_pixels
        try:
            height, width = smart_resize(image.height, image.width, self._patch_side, *limits)
        except ValueError as error:
            raise DataError(f"{image.width} x {image.height} pixels: {error}") from None
        return 1, height // self.patch_size, width // self.patch_size

    def vision(self, images: Sequence[Image.Image]) -> VisionInputs | None:
        """Return the input of the vision tower for RGB images, in order; None for no images.

        It may be called from several threads. Raises DataError if an image is too narrow.
        """
        if not images:
            return None
        for image in images:
            self.grid(image)  # for its message
        out = self.image_processor(list(images), return_tensors="pt")
        pixels = out["pixel_values"].to(self._dtype)
        return VisionInputs(pixels, out["image_grid_thw"], digests=tuple(map(_digest, images)))

    def render(
        self, conversations: Sequence[Sequence[ChatMessage]], generate: bool = True
    ) -> list[str]:
        """Render conversations; special tokens inside their text are defused.

        `generate` is whether the beginning of an assistant turn follows.
        """
        call = functools.partial(
            self.tokenizer.apply_chat_template,
            [[self._defused(m) for m in messages] for messages in conversations],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=generate,
        )
        return render(call, self._template_name)

    def _defused(self, message: ChatMessage) -> ChatMessage:
        parts = [dict(part) for part in message["content"]]
        for part in parts:
            if part["type"] == "text":
                text = part["text"].replace(_DEFUSE, "")
                part["text"] = self._pattern.sub(lambda m: m[0][0] + _DEFUSE + m[0][1:], text)
        if all(p["type"] == "text" for p in parts):  # some templates only support strings
            return {"role": message["role"], "content": "".join(p["text"] for p in parts)}
        return {"role": message["role"], "content": parts}

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokenise rendered texts: special tokens where the template wrote them, else as text."""
        split = [self._pattern.split(text) for text in texts]
        plain = list(dict.fromkeys(piece for pieces in split for piece in pieces[::2]))
        # The tokenizers library itself, and all at once: a call takes most of the time of one text,
        # and transformers' call five times as long.
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        encoded = backend.encode_batch_fast(
            [piece.replace(_DEFUSE, "") for piece in plain], add_special_tokens=False
        )
        ids_of = {name: [token_id] for name, token_id in self._special.items()}
        ids_of |= {piece: each.ids for piece, each in zip(plain, encoded, strict=True)}
        return [tuple(itertools.chain(*(ids_of[p] for p in pieces))) for pieces in split]

    def _expansion(self, collapsed: Sequence[int], grids: Sequence[Grid]) -> np.ndarray:
        """Return how often each id is repeated, [tokens] int64."""
        pads = np.flatnonzero(np.asarray(collapsed) == self.image_pad_id)
        if len(pads) != len(grids):
            raise DataError(
                f"{len(pads)} image places in the prompt, {len(grids)} images; the chat template "
                "must write one image-pad token per image part"
            )
        counts = np.ones(len(collapsed), np.int64)
        counts[pads] = [t * h * w // self.merge_size**2 for t, h, w in grids]
        return counts


def _digest(image: Image.Image) -> str:
    """Return a digest of an image's size and pixels."""
    hashed = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    hashed.update(image.tobytes())
    return hashed.hexdigest()


def _load(directory: Path, min_pixels: int | None, max_pixels: int | None) -> tuple[Any, Any]:
    """Load tokenizer and image processor; Python files in the directory are never imported."""
    patch_torchvision()
    from transformers import AutoTokenizer, Qwen2VLImageProcessor

    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        return tokenizer, Qwen2VLImageProcessor.from_pretrained(
            directory, **{name: value for name, value in limits.items() if value is not None}
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = printable(" ".join(str(error).split()), 300)
        raise DataError(
            f"{directory}: tokenizer or image processor cannot be read ({reason}); expected the "
            "directory of a Qwen2.5-VL model"
        ) from None


def _setting(holder: Any, name: str, least: int, directory: Path) -> int:
    value = getattr(holder, name, None)
    if type(value) is not int or value < least:
        raise DataError(
            f"{directory}: image processor (preprocessor_config.json or processor_config.json): "
            f"{name} is {shown(value)}; expected an integer of at least {least} (data.min_pixels "
            "and data.max_pixels replace the limits of the edges, pixels)"
        )
    return value


def _end_token_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a turn: the tokenizer's, then those of generation_config.json."""
    ids = [tokenizer.eos_token_id]
    path = directory / "generation_config.json"
    if path.is_file():
        value = read_json(path)
        more = value.get("eos_token_id") if isinstance(value, dict) else None
        ids += more if isinstance(more, list) else [more]
        if any(i is not None and type(i) is not int for i in ids):
            raise DataError(f"{path}: eos_token_id is {shown(more)}; expected token ids")
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _chat_template(directory: Path, tokenizer: Any) -> str:
    path = directory / "chat_template.json"
    if path.is_file():  # preferred, as it supports images
        value = read_json(path)
        if not isinstance(value, dict) or not isinstance(value.get("chat_template"), str):
            raise DataError(f"{path}: expected an object with the text chat_template")
        return value["chat_template"]
    if not tokenizer.chat_template:
        raise DataError(
            f"{directory}: no chat template (chat_template.jinja, chat_template.json or in "
            "tokenizer_config.json); take the directory of an instruction-tuned model, or set "
            "data.chat_template"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several without a default
        raise DataError(f"{directory}: {printable(error)}") from None
