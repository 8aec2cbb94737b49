"""Spans and format of a response, complete or still growing."""

import pytest

from megatron_sr1.rewards.response import find_answer, find_description, has_format

WHOLE = "<description> 3 5 6 </description> <think> 3 + 5 + 6 = 14 </think> \\boxed{14}"
SHORT = "<think> 3 + 5 + 6 = 14 </think> \\boxed{14}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (WHOLE, "3 5 6"),
        ("<description>a\nb</description>", "a\nb"),
        ("Well: <description>a</description>", "a"),
        ("<description>\\boxed{14}</description>", "\\boxed{14}"),
        ("<description>a <b> </description>", "a <b>"),
        ("<description>a</description><description>b</description>", "a"),
        ("<description>a", None),
        ("<description>a</description", None),
        ("a</description>", None),
        ("<description>  </description> <think> a </think>", None),
        ("<think> a </think> <description>b</description>", None),
        ("<think> a <description>b</description>", None),
        ("\\boxed{14} <description>b</description>", None),
        ("<description>a <think> b </think></description>", None),
        ("<description>a <description>b</description></description>", None),
        ("</description><description>a</description>", None),
        ("<Description>a</Description>", None),
        (SHORT, None),
        ("", None),
    ],
)
def test_a_description_is_a_closed_span_before_thought_and_answer(text, found):
    assert find_description(text) == found


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        "x <description>a</description> <description>b</description> <think>",
        "<description> </description> <description>b</description>",
        "<think> <description>a</description>",
        "<description>a <description>b</description> c</description>",
    ],
)
def test_the_description_of_a_growing_text_appears_once_and_stays(text):
    seen = [find_description(text[:end]) for end in range(len(text) + 1)]
    first = next((i for i, found in enumerate(seen) if found is not None), len(seen))
    assert set(seen[:first]) <= {None}
    assert len(set(seen[first:])) <= 1
    if seen[-1] is not None:
        assert text[:first].endswith("</description>")  # no later than that


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (WHOLE, "14"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{ }", None),
        (r"\boxed{1{}", None),
        (r"\boxed 5", None),
        ("14", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_box_with_balanced_braces(text, answer):
    assert find_answer(text) == answer


def test_the_format_is_the_recipes_blocks_in_order_and_nothing_else():
    for recipe in ("vision_sr1", "see_think"):
        assert has_format(WHOLE, recipe)
        assert has_format(f"\n{WHOLE}\n", recipe)
        assert not has_format(SHORT, recipe)
    assert has_format(SHORT, "vision_r1")
    assert has_format(SHORT.replace("14}", "\\frac{1}{2}}"), "vision_r1")
    assert not has_format(WHOLE, "vision_r1")


@pytest.mark.parametrize(
    "broken",
    [
        WHOLE + " done",
        WHOLE + ".",
        "Well: " + WHOLE,
        WHOLE.replace("</description> ", "</description> and "),
        WHOLE.replace("</think> ", "</think> so "),
        WHOLE.replace("</think>", ""),
        WHOLE.replace("</description>", ""),
        WHOLE.replace(" 3 5 6 ", " "),
        WHOLE.replace(" 3 + 5 + 6 = 14 ", ""),
        WHOLE.replace("{14}", "{}"),
        WHOLE.replace("{14}", "{14"),
        WHOLE.replace("\\boxed{14}", "14"),
        WHOLE + WHOLE,
        WHOLE + " \\boxed{14}",
        WHOLE.replace("<think>", "<think> <think>"),
        "<think> a </think> <description> b </description> \\boxed{14}",
        "<description> a <think> b </description> c </think> \\boxed{14}",
        "\\boxed{14}",
        "",
    ],
)
def test_missing_repeated_or_additional_text_breaks_the_format(broken):
    assert not has_format(broken, "vision_sr1")
