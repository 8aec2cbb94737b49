r"""Where the parts of a response are: description, thought, and the boxed answer.

In: text of the model, never trusted. Out: strings or None. The form is that of Vision-SR1 (arXiv
2508.19652): `<description> … </description> <think> … </think> \boxed{…}`.
"""

from __future__ import annotations

OPEN, CLOSE = "<description>", "</description>"
BOX = "\\boxed{"


def find_description(text: str) -> str | None:
    """The text inside the description span, once it has closed.

    It is cheap and monotone: on a growing text the first result that is not None stays.

    Args:
        text: a response, or its beginning.

    Returns:
        the description without blank ends; None if there is no closed span, it is empty, another
        part comes before or inside it, or spans are nested.
    """
    end = text.find(CLOSE)
    start = text.find(OPEN)
    if start < 0 or end < start:
        return None
    before, inside = text[:start], text[start + len(OPEN) : end]
    if before.strip() or OPEN in inside or "<think>" in inside:
        return None
    return inside.strip() or None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{…}`, braces inside balanced.

    Returns:
        the content without blank ends; None if there is no box or the last one is not closed. An
        empty box gives "".
    """
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth = 1
    begin = start + len(BOX)
    for place in range(begin, len(text)):
        if text[place] == "{" and text[place - 1] != "\\":
            depth += 1
        elif text[place] == "}" and text[place - 1] != "\\":
            depth -= 1
            if depth == 0:
                return text[begin:place].strip()
    return None
