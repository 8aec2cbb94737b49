"""Whether a whole response has its recipe's form: each part once, in order, and nothing else."""

from __future__ import annotations

import re

from megatron_sr1.rewards.parsing import BOX, last_boxed

_DESCRIPTION = r"\s*<description>(?P<description>.*?)</description>"
_THINK = r"\s*<think>(?P<think>.*?)</think>\s*(?P<rest>.*?)\s*"
_FORMS = {
    "vision_sr1": re.compile(_DESCRIPTION + _THINK, re.DOTALL),
    "see_think": re.compile(_DESCRIPTION + _THINK, re.DOTALL),
    "vision_r1": re.compile(_THINK, re.DOTALL),
    "reader": re.compile(_THINK, re.DOTALL),
}
_TAGS = ("<description>", "</description>", "<think>", "</think>")


def has_form(text: str, recipe: str) -> bool:
    r"""Whether the response is its recipe's parts, each once and not empty, then one box alone.

    Args:
        text: whole response.
        recipe: vision_sr1 | see_think | vision_r1, or `reader` for a second pass.
    """
    match = _FORMS[recipe].fullmatch(text)
    if match is None or text.count(BOX) != 1:
        return False
    if any(text.count(tag) > 1 for tag in _TAGS):
        return False
    parts = match.groupdict()
    rest = parts.pop("rest")
    if not all(part.strip() for part in parts.values()):
        return False
    answer = last_boxed(rest)
    return bool(answer) and rest.startswith(BOX) and rest.endswith("}") and _closes_last(rest)


def _closes_last(rest: str) -> bool:
    """Whether the box that opens the text ends with its last character."""
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth == 0:
            return place == len(rest) - 1
    return False
