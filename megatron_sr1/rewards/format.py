r"""Whether a response has its recipe's form: all blocks, in order, each once, and nothing else.

Source: the format reward of Vision-SR1 (arXiv 2508.19652, section 3.2). Blank space between the
blocks does not matter; an empty block, a mark too many or a word outside the blocks does.
"""

from __future__ import annotations

from megatron_sr1.errors import ConfigError
from megatron_sr1.rewards.parsing import DESCRIPTION, THINK, find_boxed, find_span

BLOCKS = {
    "vision_sr1": (DESCRIPTION, THINK),
    "see_think": (DESCRIPTION, THINK),
    "vision_r1": (THINK,),
}
"""Recipe -> the marked blocks that stand before the boxed answer."""


def has_form(text: str, recipe: str) -> bool:
    """Whether the whole response is the recipe's blocks and a boxed answer.

    Args:
        text: response.
        recipe: `reward.recipe`.

    Raises:
        ConfigError: unknown recipe.
    """
    if recipe not in BLOCKS:
        raise ConfigError(f"reward.recipe is {recipe!r}; expected {' | '.join(BLOCKS)}")
    for mark in (*DESCRIPTION, *THINK):
        expected = sum(mark in block for block in BLOCKS[recipe])
        if text.count(mark) != expected:
            return False
    rest = text
    for block in BLOCKS[recipe]:
        span = find_span(rest, block)
        if span is None or rest[: span.start].strip() or not span.content.strip():
            return False
        rest = rest[span.end :]
    boxed = find_boxed(rest)
    if boxed is None or not boxed.content.strip():
        return False
    return not rest[: boxed.start].strip() and not rest[boxed.end :].strip()
