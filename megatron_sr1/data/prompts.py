"""Prompts: the messages of each pass by Jinja templates, and turns as chat messages.

In: samples, and the templates that `data` names: built-in ones, which are files in templates/, or
files of the user's. Out: chat messages. The form (three spans, a self-contained description, a
reader without the image) is that of arXiv 2508.19652, section 3; the wording is this project's own.

What a template writes is text: image marks come from the question alone, each as one private
character that no other text has, so neither a template nor a data set adds an image.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sr1.config.training import DataConfig
from megatron_sr1.data.examples import ESCAPED_MARK, IMAGE_MARK, escape_marks, split_at_marks
from megatron_sr1.data.sandbox import compile_template, read_template, render
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.records import Example, Message

ChatMessage = dict[str, Any]
"""{"role": str, "content": [{"type": "text", "text": str} | {"type": "image"}, …]}"""
Options = Callable[[str], Mapping[str, str]]
"""Question -> the text of its options by label."""
TEMPLATES = Path(__file__).parent / "templates"
VARIABLES = ("question", "content", "options", "images", "metadata", "recipe")
"""What a template may use; `content` is the question, and pass 2 has `description` too."""
_IMAGE = "\ue0da"
"""Private-use character: an image mark while a template is rendered."""


class PromptTemplate:
    """The template of one pass.

    Attributes:
        name: key and value, for messages.
        source: its text.
        variables: names of those that it uses.
    """

    def __init__(self, key: str, value: str) -> None:
        """Read the template of `data.pass1_template` or `data.pass2_template`.

        Args:
            key: name of the field in `data`.
            value: a built-in template's name, or the path of a file.

        Raises:
            ConfigError: it cannot be read or does not parse, does not use the question (in pass 2,
                the description), or uses a variable that does not exist.
        """
        which = key.removesuffix("_template")
        known = VARIABLES if which == "pass1" else (*VARIABLES, "description")
        built_in = {p.stem.removeprefix(f"{which}_"): p for p in TEMPLATES.glob(f"{which}_*")}
        self.name = f"data.{key}={value}"
        if value not in built_in and not Path(value).is_file():
            names = " | ".join(sorted(built_in, key=len))
            raise ConfigError(f"{self.name}: no such file; expected {names}, or a Jinja file")
        path = str(built_in.get(value, value))
        self.source = read_template(f"data.{key}", path).strip()
        try:
            self._template, self.variables = compile_template(self.source, self.name)
        except DataError as error:
            raise ConfigError(str(error)) from None
        unknown = sorted(self.variables.difference(known))
        if unknown:
            raise ConfigError(f"{self.name} uses {', '.join(unknown)}; it has {', '.join(known)}")
        needed = {"question": {"question", "content"}, "description": {"description"}}
        for word in [word for word in needed if word in known]:
            if self.variables.isdisjoint(needed[word]):
                raise ConfigError(f"{self.name} does not write the {word}: {{{{ {word} }}}}")

    def render(self, **variables: Any) -> str:
        """Return the text for these values; a DataError names the template."""
        return render(lambda: [self._template.render(variables)], self.name)[0]


class Prompts:
    """Makes the messages of both passes, as `data` configures them.

    Attributes:
        pass1, pass2: the templates.
    """

    def __init__(self, data: DataConfig, recipe: str, options: Options | None = None) -> None:
        """Read the templates; without `options`, questions have none. Raises ConfigError."""
        self._data, self._recipe = data, recipe
        self._options: Options = options or (lambda question: {})
        self.pass1 = PromptTemplate("pass1_template", data.pass1_template)
        self.pass2 = PromptTemplate("pass2_template", data.pass2_template)

    def pass1_messages(self, example: Example) -> list[ChatMessage]:
        """Return the chat messages of pass 1: the turns up to the last user turn, with the prompt.

        Raises:
            DataError: there are image marks after the last user turn, or the template fails or
                does not write each image mark of the question once.
        """
        turns = with_system_turn(example, self._data.system_prompt).messages
        last = max(i for i, turn in enumerate(turns) if turn.role == "user")
        question = self._with_images(split_at_marks(turns[last]))
        messages = chat_messages(turns[:last])
        found = sum(part["type"] == "image" for m in messages for part in m["content"])
        if found + question.count(_IMAGE) != example.num_images:
            raise DataError(
                f"{found + question.count(_IMAGE)} {IMAGE_MARK} marks up to the last user turn, "
                f"{example.num_images} images; images of later turns cannot be asked about"
            )
        asked = self._render(self.pass1, example, question)
        if asked.count(_IMAGE) != question.count(_IMAGE):
            raise DataError(
                f"{self.pass1.name} writes {asked.count(_IMAGE)} image marks and the question has "
                f"{question.count(_IMAGE)}; write {{{{ question }}}} once and whole"
            )
        return [*messages, {"role": "user", "content": _content(asked.split(_IMAGE))}]

    def pass2_messages(self, example: Example, description: str) -> list[ChatMessage]:
        """Return the chat messages of pass 2: text only, with a system turn if one is configured.

        Image marks of the question are removed; `<image>` in the description stays text.
        """
        question = strip_image_marks(example.question)
        text = self._render(self.pass2, example, question, description=description.strip())
        asked = {"role": "user", "content": [{"type": "text", "text": text}]}
        return [*chat_messages(_system_turn(self._data.system_prompt)), asked]

    def _with_images(self, texts: Sequence[str]) -> str:
        """Join the texts between a question's image marks, the only mark where configured."""
        texts = [text.replace(_IMAGE, "") for text in texts]
        if self._data.image_position == "keep" or len(texts) != 2:
            return _IMAGE.join(texts).rstrip()
        text = "".join(texts).strip()
        return _IMAGE + text if self._data.image_position == "first" else text + _IMAGE

    def _render(
        self, template: PromptTemplate, example: Example, question: str, **more: str
    ) -> str:
        has_options = "options" in template.variables
        return template.render(
            question=question,
            content=question,
            options=self._options(example.question) if has_options else {},
            images=example.num_images,
            metadata=example.metadata,
            recipe=self._recipe,
            **more,
        )


def template_texts(data: DataConfig) -> list[str]:
    """Return the texts of the templates that `data` names, which are the prompts' wording."""
    prompts = Prompts(data, "vision_sr1")
    chat = read_template("data.chat_template", data.chat_template) if data.chat_template else ""
    return [prompts.pass1.source, prompts.pass2.source, chat]


def with_system_turn(example: Example, system_prompt: str) -> Example:
    """Return an example that begins with a system turn: its own, or one with this text, if any."""
    if any(turn.role == "system" for turn in example.messages):
        return example
    return replace(example, messages=(*_system_turn(system_prompt), *example.messages))


def _system_turn(text: str) -> tuple[Message, ...]:
    return (Message("system", escape_marks(text)),) if text else ()


def chat_messages(turns: Sequence[Message]) -> list[ChatMessage]:
    """Convert turns with `<image>` marks to chat messages with image parts."""
    return [{"role": turn.role, "content": _content(split_at_marks(turn))} for turn in turns]


def _content(texts: Sequence[str]) -> list[dict[str, str]]:
    """Return texts as the parts of a chat message, with an image between every two of them."""
    parts: list[dict[str, str]] = []
    for text in texts:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in parts[1:] if part.get("text") != ""]


@functools.lru_cache(maxsize=4096)  # a step's questions are asked again for each description
def strip_image_marks(question: str) -> str:
    """Remove image marks and the blanks around them from a question, and resolve escapes."""
    mark = rf"(?:{re.escape(IMAGE_MARK)}[ \t]*)+"
    without = re.sub(rf"(?m)^[ \t]*{mark}\n?", "", question)
    # Match only at the start of a run of blanks or backslashes: trying each is quadratic.
    before = r"(?:(?<![ \t])[ \t]+|(?<![ \t\\])((?:\\\\)*))"
    without = re.sub(before + mark, lambda found: f"{found[1] or ''} ", without)
    return without.replace(ESCAPED_MARK, IMAGE_MARK).strip()


def flat_text(message: ChatMessage) -> str:
    """Join a chat message to one text with `<image>` marks, the inverse of `chat_messages`."""
    escaped = str if message["role"] == "assistant" else escape_marks
    parts = message["content"]
    return "".join(IMAGE_MARK if p["type"] == "image" else escaped(p["text"]) for p in parts)
