"""Published benchmarks: where each is, and how its rows become questions.

In: rows as a data set has them. Out: rows with the columns `problem`, `answer` and `images`, which
data/rows.py reads, with `category` and `data_source` for the results, and all other columns. The
facts are those of the data sets' cards and of public evaluation code; docs/evaluation.md says which
of them could not be checked.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sr1.data.examples import IMAGE_MARK, escape_marks
from megatron_sr1.data.guards import shown
from megatron_sr1.data.rows import COLUMNS
from megatron_sr1.errors import DataError

Row = Mapping[str, Any]
IN_IMAGE = "Answer the question that the image shows. If it has options, answer with the letter."
NUMBERED = "image_{}"
"""Columns image_1, image_2, …, to which <image 1>, <image 2>, … in question and options refer."""
MAX_NUMBERED = 7
_NUMBERED_MARK = re.compile(r"<image ?([0-9]{1,2})>")


@dataclass(frozen=True)
class Benchmark:
    """A published set.

    Attributes:
        hub: name of the data set on the Hugging Face hub.
        split, config: of it; an empty configuration is the default one.
        num_questions: rows of the split; 0: unknown.
        question: column of the text.
        blank: text in place of an empty or missing question, which the image holds.
        removed: text that is taken out of a question, as it contradicts the prompts of this method.
        options: column of the options: a list, a text that spells one in JSON or Python, or a text
            with their letters; "" if the question has them.
        answer: column of the gold answer: text, list, or a text of a list; <OR> separates answers
            each of which is right, <AND> the parts of one.
        answers: replacements of gold answers.
        images: column of the image or images, or NUMBERED; "" for none.
        category, source: columns, or dotted paths into one, for the results; "" for none.
        only: column and value of the rows that belong to the set; others are passed over.
        metric: what is published, if it is not the accuracy.
    """

    hub: str
    split: str = "test"
    config: str = ""
    num_questions: int = 0
    question: str = "question"
    blank: str = ""
    removed: str = ""
    options: str = ""
    answer: str = "answer"
    answers: Mapping[str, str] = field(default_factory=dict)
    images: str = "image"
    category: str = ""
    source: str = ""
    only: tuple[str, str] = ("", "")
    metric: str = ""

    @property
    def source_name(self) -> str:
        """Name of the split for data/sources.py."""
        config = f":{self.config}" if self.config else ""
        return f"hf:{self.hub}{config}@{self.split}"

    def row(self, row: Row) -> dict[str, Any] | None:
        """Return a row as a question, or None if it does not belong to the set.

        Columns that are not used stay, unless data/rows.py would read them.

        Raises:
            DataError: it is not a row of this set.
        """
        column, wanted = self.only
        if column and row.get(column) != wanted:
            return None
        used = {self.question, self.options, self.answer, self.images, *COLUMNS}
        used |= {name for name in row if self.images == NUMBERED and name.startswith("image_")}
        question, images = self._question(row), self._images(row)
        if self.question != "problem":  # its marks are those of this package already
            question = _marked(question, images, self.images == NUMBERED)
        own = {"problem": question, "answer": self._answer(row), "images": [*images.values()]}
        for name, path in (("category", self.category), ("data_source", self.source)):
            if path and (value := _look_up(row, path)) is not None:
                own[name] = value
        return {**{name: value for name, value in row.items() if name not in used}, **own}

    def _question(self, row: Row) -> str:
        text = row.get(self.question) or self.blank
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{self.question} is {shown(text)}; expected the text of a question")
        text = text.replace(self.removed, "").strip() if self.removed else text
        options = _options(row.get(self.options) if self.options else None)
        return f"{text}\n{options}" if options else text

    def _answer(self, row: Row) -> Any:
        value = _listed(row.get(self.answer))
        if isinstance(value, list):
            return value
        answers = str("" if value is None else value).replace("<AND>", " and ").split("<OR>")
        return [self.answers.get(each, each) for each in answers]

    def _images(self, row: Row) -> dict[int, Any]:
        """Return the images by the number that marks in the text have for them, from 1."""
        if self.images == NUMBERED:
            named = {n: row.get(NUMBERED.format(n)) for n in range(1, MAX_NUMBERED + 1)}
            return {number: image for number, image in named.items() if image is not None}
        value = row.get(self.images) if self.images else None
        values = value if isinstance(value, list | tuple) else [value]
        return dict(enumerate((each for each in values if each is not None), 1))


def _options(value: Any) -> str:
    """Return options a line each, with their letters; "" if there are none or letters alone."""
    value = _listed(value)
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, Sequence) or not value:
        return ""
    letters = [chr(ord("A") + number) for number in range(len(value))]
    if [str(each).strip() for each in value] == letters:
        return ""
    return "\n".join(f"{letter}. {each}" for letter, each in zip(letters, value, strict=True))


def _listed(value: Any) -> Any:
    """Return the list that a text spells in JSON or Python; other values as they are."""
    if isinstance(value, str) and value.strip().startswith("["):
        for read in (json.loads, ast.literal_eval):  # literals alone, nothing is evaluated
            try:
                found = read(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list):
                return found
    return value


def _marked(text: str, images: dict[int, Any], is_numbered: bool) -> str:
    """Put `<image>` where a text names an image first; further mentions become "image N".

    Images that it does not name are put first, and `images` is reordered to match.
    """
    order: list[int] = []

    def mark(found: re.Match[str]) -> str:
        number = int(found[1])
        if number not in images:
            if is_numbered:
                raise DataError(
                    f"the text names {found[0]}, but {NUMBERED.format(number)} is empty"
                )
            return f"image {number}"  # a part of the one image
        if number in order:
            return f"image {number}"
        order.append(number)
        return IMAGE_MARK

    text = _NUMBERED_MARK.sub(mark, escape_marks(text))
    unnamed = [number for number in images if number not in order]
    ordered = {number: images[number] for number in (*unnamed, *order)}
    images.clear()
    images.update(ordered)
    return IMAGE_MARK * len(unnamed) + text


def _look_up(row: Row, path: str) -> Any:
    value: Any = row
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


_MMMU_PRO = Benchmark(
    "MMMU/MMMU_Pro",
    config="standard (10 options)",
    num_questions=1730,
    options="options",
    images=NUMBERED,
    category="subject",
)
_MATH_VISION = Benchmark(
    "MathLLMs/MathVision",
    num_questions=3040,
    options="options",
    images="decoded_image",
    category="subject",
)
_PLAIN = Benchmark("", question="problem", images="images")
"""Columns of the copies that Vision-SR1's authors evaluate on."""
BENCHMARKS: Mapping[str, Benchmark] = {
    "mmmu": Benchmark(
        "lmms-lab-encoder/MMMU",
        split="validation",
        num_questions=900,
        options="options",
        images=NUMBERED,
        category="subfield",
    ),
    "mmmu_pro_10": _MMMU_PRO,
    "mmmu_pro_4": replace(_MMMU_PRO, config="standard (4 options)"),
    "mmmu_pro_vision": replace(
        _MMMU_PRO, config="vision", options="", images="image", blank=IN_IMAGE
    ),
    "mmstar": Benchmark(
        "Lin-Chen/MMStar",
        split="val",
        num_questions=1500,
        category="category",
        source="meta_info.source",
    ),
    "mathvista": Benchmark(
        "AI4Math/MathVista",
        split="testmini",
        num_questions=1000,
        question="query",
        images="decoded_image",
        category="metadata.task",
        source="metadata.source",
        metric="answers extracted by GPT",
    ),
    "mathverse": Benchmark(
        "AI4Math/MathVerse",
        split="testmini",
        config="testmini",
        num_questions=3940,
        blank=IN_IMAGE,
        category="problem_version",
        source="metadata.source",
        metric="judged by GPT",
    ),
    "mathvision": _MATH_VISION,
    "mathvision_mini": replace(_MATH_VISION, split="testmini", num_questions=304),
    "mmvet": Benchmark(
        "lmms-lab-encoder/MMVet",
        num_questions=218,
        category="capability",
        metric="0 to 1 by GPT-4",
    ),
    "realworldqa": Benchmark(
        "lmms-lab-encoder/RealWorldQA",
        num_questions=765,
        removed="Please answer directly with only the letter of the correct option and nothing "
        "else.",
    ),
    "visnumbench": Benchmark(
        "GML-FMGroup/VisNumBench",
        split="train",
        num_questions=1913,
        options="option",
        category="task_class",
        source="class",
    ),
    "hallusionbench": Benchmark(
        "lmms-lab-encoder/HallusionBench",
        split="image",
        num_questions=951,
        answer="gt_answer",
        answers={"0": "No", "1": "Yes"},
        category="subcategory",
        source="category",
        metric="accuracy of questions (aAcc), pairs (qAcc) and figures (fAcc)",
    ),
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500",
        num_questions=500,
        question="problem",
        images="",
        category="subject",
    ),
    "gsm8k": Benchmark("openai/gsm8k", config="main", num_questions=1319, images=""),
    "mmlu_pro": Benchmark(
        "TIGER-Lab/MMLU-Pro",
        num_questions=12032,
        options="options",
        images="",
        category="category",
        source="src",
    ),
    "supergpqa": Benchmark(
        "m-a-p/SuperGPQA",
        split="train",
        num_questions=26529,
        options="options",
        answer="answer_letter",
        images="",
        category="discipline",
    ),
    "sr1_mmmu": replace(_PLAIN, hub="zli12321/MMMU", num_questions=895, category="subset_name"),
    "sr1_mmmu_pro_10": replace(_PLAIN, hub="zli12321/mmmu_pro_10options"),
    "sr1_mmmu_pro_4": replace(_PLAIN, hub="zli12321/MLLM_test", only=("file_name", "mmmu-pro")),
    "sr1_mmmu_pro_vision": replace(_PLAIN, hub="zli12321/mmmu-pro-vision"),
    "sr1_mmvet": replace(_PLAIN, hub="zli12321/mm-vet"),
    "sr1_realworldqa": replace(_PLAIN, hub="zli12321/realWorldQA"),
    "sr1_visnumbench": replace(_PLAIN, hub="zli12321/visnumbench"),
    "sr1_mathverse": replace(_PLAIN, hub="zli12321/mathverse"),
    "sr1_mathvision": replace(_PLAIN, hub="zli12321/mathvision", num_questions=3040),
    "sr1_mathvista": replace(_PLAIN, hub="zli12321/mathvista"),
    "sr1_hallusionbench": replace(_PLAIN, hub="zli12321/hallusionbench"),
    "sr1_clevr_count": replace(
        _PLAIN, hub="zli12321/MLLM_test", only=("file_name", "clevr_count_70k")
    ),
    "sr1_mmstar": replace(_PLAIN, hub="zli12321/mmstar"),
    "sr1_mmsi": replace(_PLAIN, hub="zli12321/MMSI"),
    "sr1_mllm_test": replace(
        _PLAIN, hub="zli12321/MLLM_test", num_questions=10755, source="file_name"
    ),
}
