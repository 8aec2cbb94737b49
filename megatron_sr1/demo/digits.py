"""Questions about real handwritten digits: a vision task that is learnt on a CPU in minutes.

scikit-learn ships 1,797 digits of 8 x 8 pixels (UCI, written by 43 people). Three of them,
enlarged to 28 x 28 and set side by side, make an 84 x 28 image, three vision tokens of Qwen2.5-VL.
Asked are their sum, the largest, the smallest, the leftmost and the rightmost. 1,437 digits are
learnt from, the other 360 are for the held-out questions, which no seed changes.

Out: shards like any other data: `train` (questions and answers), `eval` (held out) and
`cold_start` (conversations to imitate). In the first and the last each digit is shifted and turned
a little, so that a model does not learn 1,437 pictures by heart; held-out ones stay as written.

The cold start is made imperfect on purpose, so that there is something to learn for GRPO. In its
*descriptions* each digit is wrong with probability 0.33. Its thoughts name the right digits, but
one response in ten slips: its answer is the one to three other digits. A model that imitates it
describes badly, which only a reward for descriptions corrects, and answers well but carelessly,
which any reward for answers corrects. Text-only readers, whom pass 2 is like, make no mistakes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_sr1.data.examples import Record
from megatron_sr1.data.marks import IMAGE_MARK
from megatron_sr1.data.prompts import PASS1_INSTRUCTIONS, flat_text, pass1_messages, pass2_messages
from megatron_sr1.data.shards import write_shards
from megatron_sr1.records import Example, Message

KINDS = ("sum", "largest", "smallest", "leftmost", "rightmost")
QUESTIONS = {
    "sum": "What is the sum?",
    "largest": "Which digit is largest?",
    "smallest": "Which digit is smallest?",
    "leftmost": "Which digit is leftmost?",
    "rightmost": "Which digit is rightmost?",
}
STYLE = "brief"
"""Prompt style that the digits model is taught; hand it to prompts.py when rolling it out."""
PASS2_ORDER = "description_first"
"""The same of the second pass: `rollout.pass2_order`."""
NUM_TRAIN_DIGITS = 1437
DIGITS_PER_IMAGE = 3
DIGIT_PIXELS = 28
SHIFT_PIXELS = 1
"""Largest shift of a digit that is learnt from, in either direction, whole pixels of 28."""
TURN_DEGREES = 10.0
"""Largest turn of a digit that is learnt from, to either side."""
DESCRIPTION_NOISE = 0.33
"""Probability that a digit of a description of the cold start is another one."""
SLIP_RATE = 0.1
"""Probability that a response of the cold start to an image answers about other digits."""
COLD_START_SHARES = {"vision_sr1": 0.65, "vision_r1": 0.1, "reader": 0.25}
"""Description, think, answer; think, answer; text-only reader."""
COLD_START_KINDS = (*KINDS, "sum")
"""Drawn from with equal probability: sums are the slowest to learn and come twice as often."""
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
    """Write the three sets as shards.

    Args:
        directory: gets the folders train, eval and cold_start.
        seed: of train and cold_start; eval is always the same.
        num_train: samples for reinforcement learning.
        num_eval: held-out questions; a smaller number is a prefix of a larger one.
        num_cold_start: conversations for supervised fine-tuning.

    Returns:
        name of a set -> its folder.

    Raises:
        DataError: one of the folders already holds shards.
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


def answer_from_digits(kind: str, digits: Sequence[int]) -> str:
    """The right answer to a question of that kind about those digits."""
    rules = {
        "sum": sum(digits),
        "largest": max(digits),
        "smallest": min(digits),
        "leftmost": digits[0],
        "rightmost": digits[-1],
    }
    return str(rules[kind])


def response(
    kind: str,
    digits: Sequence[int],
    described: Sequence[int] | None = None,
    answered: Sequence[int] | None = None,
) -> str:
    """The response to imitate.

    Args:
        kind: of the question.
        digits: what the thought names.
        described: what the description says; None leaves the description out.
        answered: what the answer is about; None means `digits`.
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


def corpus_texts(seed: int = 0, num_texts: int = 2000) -> Iterator[str]:
    """Texts to train a byte-pair vocabulary on: prompts and responses as the cold start has them.

    Args:
        seed: of the digits in them.
        num_texts: conversations to draw.
    """
    rng = np.random.default_rng([seed, 2])
    for _ in range(num_texts):
        kind, digits = _ask(rng)
        for message in _conversation(_format(rng), kind, digits, digits, digits):
            yield message.content.replace(IMAGE_MARK, "")


def _draw_images() -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Enlarged digits by their value: those to learn from and those held out, [28, 28] uint8."""
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
    digits: Sequence[int], drawn: list[list[np.ndarray]], rng: np.random.Generator, moved: bool
) -> bytes:
    """A PNG of those digits side by side, each by a hand drawn at random."""
    tiles = [drawn[d][rng.integers(len(drawn[d]))] for d in digits]
    if moved:
        tiles = [_moved(tile, rng) for tile in tiles]
    buffer = io.BytesIO()
    Image.fromarray(np.hstack(tiles)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _moved(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit shifted and turned at random; what enters from outside is black."""
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
        yield Record(
            messages=(Message("user", IMAGE_MARK + QUESTIONS[kind]),),
            answer=answer_from_digits(kind, digits),
            images=(_picture(digits, drawn, rng, moved),),
            metadata={
                "problem_id": number,
                "kind": kind,
                "digits": list(digits),
                "expected_description": list(digits),
            },
        )


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
    shares = np.cumsum(list(COLD_START_SHARES.values()))
    return list(COLD_START_SHARES)[int(np.searchsorted(shares, rng.random() * shares[-1]))]


def _conversation(
    form: str,
    kind: str,
    digits: Sequence[int],
    described: Sequence[int],
    answered: Sequence[int],
) -> tuple[Message, ...]:
    """User and assistant turn of one of the cold start's formats."""
    if form == "reader":
        asked = pass2_messages(QUESTIONS[kind], _spaced(digits), STYLE, PASS2_ORDER)
    else:
        turn = Message("user", IMAGE_MARK + QUESTIONS[kind])
        asked = pass1_messages(Example(-1, "", "", (turn,), None, 1), form, STYLE)
    shown = described if form == "vision_sr1" else None
    return (
        Message("user", flat_text(asked[0])),
        Message("assistant", response(kind, digits, shown, answered)),
    )


def _spaced(digits: Sequence[int]) -> str:
    return " ".join(map(str, digits))


assert set(COLD_START_SHARES) - {"reader"} <= set(PASS1_INSTRUCTIONS[STYLE])
