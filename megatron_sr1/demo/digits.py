"""Questions about real handwritten digits: a vision task that a CPU learns in minutes.

scikit-learn ships 1,797 digits of 8 x 8 pixels (UCI, written by 43 people). Three of them, enlarged
to 28 x 28 and placed side by side, make an 84 x 28 image, three vision tokens of Qwen2.5-VL. 1,437
digits are for training; the other 360 are for the held-out questions, whatever the seed.

Out: shards `train` (questions and answers), `eval` (held out) and `cold_start` (conversations to
imitate). In `train` and `cold_start`, each digit is shifted and rotated a little, so that a model
cannot memorise 1,437 pictures; held-out digits are unchanged.

The cold start is imperfect on purpose, so that GRPO has something to learn. In its *descriptions*,
each digit is wrong with probability 0.33. Its thoughts name the right digits, but one response in
ten slips and gives the answer for three other digits. A model that imitates it describes badly,
which only a reward for descriptions corrects, and answers well but carelessly, which any reward for
answers corrects. The text-only readers, which resemble pass 2, make no mistakes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_sr1.config.training import DataConfig
from megatron_sr1.data.examples import IMAGE_MARK, Record
from megatron_sr1.data.prompts import Prompts, flat_text
from megatron_sr1.data.shards import write_shards
from megatron_sr1.records import Example, Message

QUESTIONS = {"sum": "What is the sum?"} | {
    kind: f"Which digit is {kind}?" for kind in ("largest", "smallest", "leftmost", "rightmost")
}
KINDS = tuple(QUESTIONS)
Digits = Sequence[int]
PROMPTS = DataConfig(pass1_template="brief", pass2_template="brief_description_first")
"""Has the prompts that the digits model is trained with."""
NUM_TRAIN_DIGITS = 1437
NUM_CORPUS_TEXTS = 2000
DIGITS_PER_IMAGE = 3
DIGIT_PIXELS = 28
SHIFT_PIXELS = 1
"""Largest shift of a training digit, in either direction, whole pixels of 28."""
TURN_DEGREES = 10.0
"""Largest rotation of a training digit, in either direction."""
DESCRIPTION_NOISE = 0.33
"""Probability that a digit in a description of the cold start is wrong."""
SLIP_RATE = 0.1
"""Probability that a cold-start response to an image gives the answer for other digits."""
COLD_START_SHARES = {"vision_sr1": 0.65, "vision_r1": 0.1, "reader": 0.25}
"""Formats: description, think, answer | think, answer | text-only reader."""
COLD_START_KINDS = (*KINDS, "sum")
"""Sampled with equal probability: sums are the slowest to learn, so they occur twice as often."""
_EVAL_SEED = 20250827
_SPLIT_SEED = 1797


def make_digits(
    directory: str | Path,
    seed: int,
    *,
    num_train: int = 4096,
    num_eval: int = 2048,
    num_cold_start: int = 16384,
) -> dict[str, Path]:
    """Write the three sets as shards into train, eval and cold_start below a directory.

    The seed is that of train and cold_start; eval is always the same, and a smaller one is a prefix
    of a larger one. Returns the directories by the sets' names; none may hold shards already.
    """
    root = Path(directory)
    learnt, held_out = _draw_images()
    sets = {
        "train": _questions(learnt, np.random.default_rng([seed, 0]), num_train, moved=True),
        "eval": _questions(held_out, np.random.default_rng(_EVAL_SEED), num_eval, moved=False),
        "cold_start": _cold_start(learnt, np.random.default_rng([seed, 1]), num_cold_start),
    }
    for name, records in sets.items():
        write_shards(records, root / name, samples_per_shard=4096)
    return {name: root / name for name in sets}


def answer_from_digits(kind: str, digits: Digits) -> str:
    """Return the right answer to a question of this kind about these digits."""
    rules = {"sum": sum(digits), "largest": max(digits), "smallest": min(digits)}
    rules |= {"leftmost": digits[0], "rightmost": digits[-1]}
    return str(rules[kind])


def response(
    kind: str, digits: Digits, described: Digits | None = None, answered: Digits | None = None
) -> str:
    """Return the response to imitate.

    Its description, if any, names `described`, its thought `digits`, and its answer is that for
    `answered`, by default `digits`.
    """
    answer = answer_from_digits(kind, digits if answered is None else answered)
    operation = f"{kind} {_spaced(digits)}"
    if kind == "sum":  # in two steps: a table of a thousand sums takes far longer to learn
        first, second, third = digits
        operation = f"{first} + {second} = {first + second} + {third}"
    thought = f"<think> {operation} = {answer} </think> \\boxed{{{answer}}}"
    if described is None:
        return thought
    return f"<description> {_spaced(described)} </description> {thought}"


def corpus_texts() -> Iterator[str]:
    """Yield cold-start prompts and responses, to train a byte-pair vocabulary on."""
    rng = np.random.default_rng([0, 2])
    for _ in range(NUM_CORPUS_TEXTS):
        kind, digits = _ask(rng)
        for message in _conversation(_format(rng), kind, digits, digits, digits):
            yield message.content.replace(IMAGE_MARK, "")


def _draw_images() -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Return enlarged digits by value, for training and held out, each [28, 28] uint8."""
    from sklearn.datasets import load_digits

    source = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(source.target))
    size = (DIGIT_PIXELS, DIGIT_PIXELS)
    sets: tuple[list[list[np.ndarray]], ...] = ([[] for _ in range(10)], [[] for _ in range(10)])
    for place, number in enumerate(order):
        small = Image.fromarray((source.images[number] * 255 / 16).round().astype(np.uint8))
        enlarged = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
        sets[int(place >= NUM_TRAIN_DIGITS)][int(source.target[number])].append(enlarged)
    return sets[0], sets[1]


def _picture(
    digits: Digits, drawn: list[list[np.ndarray]], rng: np.random.Generator, moved: bool
) -> bytes:
    """Return a PNG of these digits side by side, each one a random specimen of its value."""
    tiles = [drawn[d][rng.integers(len(drawn[d]))] for d in digits]
    if moved:
        tiles = [_moved(tile, rng) for tile in tiles]
    buffer = io.BytesIO()
    Image.fromarray(np.hstack(tiles)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _moved(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift and rotate a digit at random; uncovered pixels are black."""
    across, down = rng.integers(-SHIFT_PIXELS, SHIFT_PIXELS + 1, size=2)
    degrees = rng.uniform(-TURN_DEGREES, TURN_DEGREES)
    image = Image.fromarray(tile)
    moved = image.rotate(degrees, Image.Resampling.BICUBIC, translate=(int(across), int(down)))
    return np.asarray(moved)


def _ask(rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> tuple[str, tuple[int, ...]]:
    kind = kinds[rng.integers(len(kinds))]
    return kind, _draw_digits(rng)


def _draw_digits(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(d) for d in rng.integers(10, size=DIGITS_PER_IMAGE))


def _questions(
    drawn: list[list[np.ndarray]], rng: np.random.Generator, count: int, *, moved: bool
) -> Iterator[Record]:
    for number in range(count):
        kind, digits = _ask(rng)
        messages = (Message("user", IMAGE_MARK + QUESTIONS[kind]),)
        metadata = {"problem_id": number, "kind": kind, "digits": list(digits)}
        metadata["expected_description"] = list(digits)
        images = (_picture(digits, drawn, rng, moved),)
        yield Record(messages, answer_from_digits(kind, digits), images, metadata)


def _cold_start(
    drawn: list[list[np.ndarray]], rng: np.random.Generator, count: int
) -> Iterator[Record]:
    for number in range(count):
        kind, digits = _ask(rng, COLD_START_KINDS)
        form = _format(rng)
        wrong = rng.random(DIGITS_PER_IMAGE) < DESCRIPTION_NOISE
        shift = rng.integers(1, 10, size=DIGITS_PER_IMAGE)
        described = [int(d + w * s) % 10 for d, w, s in zip(digits, wrong, shift, strict=True)]
        slips = form != "reader" and rng.random() < SLIP_RATE
        answered = _draw_digits(rng) if slips else digits
        metadata = {"problem_id": number, "kind": kind, "digits": list(digits), "format": form}
        metadata["answered"] = list(answered)
        messages = _conversation(form, kind, digits, described, answered)
        images = () if form == "reader" else (_picture(digits, drawn, rng, moved=True),)
        yield Record(messages, None, images, metadata)


def _format(rng: np.random.Generator) -> str:
    return str(rng.choice(list(COLD_START_SHARES), p=list(COLD_START_SHARES.values())))


def _conversation(
    form: str, kind: str, digits: Digits, described: Digits, answered: Digits
) -> tuple[Message, ...]:
    """Return the user and assistant turns of one of the cold start's formats."""
    if form == "reader":
        turn = Message("user", QUESTIONS[kind])
        read = Example(-1, "", "", (turn,), None, 0)
        asked = _prompts("vision_sr1").pass2_messages(read, _spaced(digits))
    else:
        turn = Message("user", IMAGE_MARK + QUESTIONS[kind])
        asked = _prompts(form).pass1_messages(Example(-1, "", "", (turn,), None, 1))
    shown = described if form == "vision_sr1" else None
    answer = response(kind, digits, shown, answered)
    return Message("user", flat_text(asked[0])), Message("assistant", answer)


@cache
def _prompts(recipe: str) -> Prompts:
    return Prompts(PROMPTS, recipe)


def _spaced(digits: Digits) -> str:
    return " ".join(map(str, digits))
