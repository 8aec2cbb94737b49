"""Figures and gallery cards: what is drawn, listed and marked."""

import json
import re

import pytest

from megatron_sr1.report.curves import held_out_figures, time_figure
from megatron_sr1.report.figures import Curve, bar_chart, line_chart, stacked_area, stacked_bars
from megatron_sr1.report.gallery import Form, Question, cell, gallery, varied
from tests.report_runs import verdict


def traces(figure: str) -> list[dict]:
    return json.loads(re.search(r'json">(.*?)</script>', figure)[1])["data"]


def test_a_curve_has_its_values_at_its_steps():
    even, odd = Curve("even", [0, 5, 10], [0.0, 0.5, 1.0]), Curve("odd", [1, 2, 4], [3, 2, 1], 4)
    first, second = traces(line_chart("c", [even, odd], percent=True))
    assert (first["x0"], first["dx"], first["y"]) == (0, 5, [0.0, 0.5, 1.0])
    assert (second["x"], second["y"]) == ([1, 2, 4], [3, 2, 1])
    assert (first["line"]["color"], second["line"]["color"]) == ("--c1", "--c4")


def test_missing_and_infinite_values_leave_no_point():
    ys = [0.1, None, float("nan"), float("inf"), 0.3]
    (drawn,) = traces(line_chart("c", [Curve("a", range(5), ys)]))
    assert drawn["y"] == [0.1, 0.3] and (drawn["x0"], drawn["dx"]) == (0, 4)


def test_a_long_curve_is_averaged_up_to_its_last_step():
    (drawn,) = traces(line_chart("c", [Curve("a", range(1, 1001), range(1000))]))
    assert drawn["y"][:2] == [1.0, 4.0] and len(drawn["y"]) == 334
    assert drawn["x"][:2] == [3, 6] and drawn["x"][-1] == 1000


@pytest.mark.parametrize("ys", [[], [1.0], [None, None], [1e-13, 3e-13, 2e-13]])
def test_a_constant_curve_is_not_drawn_but_its_value_is_named(ys):
    flat = Curve("flat", range(len(ys)), ys)
    assert line_chart("c", [flat]) == ""
    figure = line_chart("c", [Curve("other", [1, 2], [1.0, 2.0]), flat])
    assert [trace["name"] for trace in traces(figure)] == ["other"]
    assert ("constant: flat" in figure) == (ys not in ([], [None, None]))


def test_stacked_layers_have_a_value_for_each_step():
    layers = [Curve("a", [1, 2], [1.0, float("nan")]), Curve("b", [1, 2], [3.0, None])]
    first, second = traces(stacked_bars("t", layers, "seconds"))
    assert (first["y"], second["y"]) == ([1.0, 0.0], [3.0, 0.0])
    areas = traces(stacked_area("t", [Curve("a", [1, 2], [0.2, 0.4])], "share"))
    assert areas[0]["stackgroup"] and areas[0]["y"] == [0.2, 0.4]


def test_phases_without_a_colour_are_summed():
    lines = [{"step": n, "time/pass1_seconds": 1.0, "time/step_seconds": 4.0} for n in (1, 2)]
    lines = [line | {"time/pack_seconds": 0.5, "time/save_seconds": 0.25} for line in lines]
    found = {trace["name"]: trace["y"] for trace in traces(time_figure("t", lines))}
    assert found == {"pass1": [1.0, 1.0], "others": [0.75, 0.75]}


def test_a_bar_without_a_value_is_left_out():
    first, second = traces(
        bar_chart("b", ["x", "y"], {"m": [(0.5, 0.1), None], "n": [None, (1, 0)]}, "t")
    )
    assert (first["y"], first["x"], first["error_x"]["array"]) == (["x"], [0.5], [0.1])
    assert second["y"] == ["y"] and "error_x" not in second
    assert bar_chart("b", ["x"], {"m": [None]}, "t") == ""


def test_of_several_runs_each_has_a_colour_and_each_set_a_style():
    lines = [{"step": n, f"evaluation/{s}/accuracy": n / 4} for n in (0, 4) for s in "ab"]
    (figure,) = held_out_figures({"one": lines, "two": lines})
    looks = {t["name"]: tuple(t["line"].values()) for t in traces(figure)}
    assert looks == {
        "one, a": ("--c1", "solid"),
        "one, b": ("--c1", "dash"),
        "two, a": ("--c2", "solid"),
        "two, b": ("--c2", "dash"),
    }


def test_questions_are_of_each_kind_in_turn():
    assert varied({9: "a", 1: "a", 2: "a", 3: "b", 4: "c"}, 4) == [9, 3, 4, 1]
    assert varied({}, 4) == []


def test_the_four_cells_and_a_response_without_a_reading():
    names = [cell(verdict(0, a, b, "")) for a in (1, 0) for b in (1, 0)]
    assert names == ["both right", "shortcut", "only the reading right", "both wrong"]
    assert cell({"accuracy": 1.0, "self_reward": None}) == "no reading"


def test_changed_words_are_marked_and_unlike_texts_are_not():
    one = verdict(0, 1, 1, "") | {"response": "see 2 7 1 so 10", "description": "2 7 1"}
    two = one | {"response": "see 2 4 1 so 6", "description": "2 4 1", "reading": "see 2 4 1 so 5"}
    other = one | {"response": "nothing in common here", "description": None, "reading": None}
    cards = gallery([Question("held", {"one": one | {"reading": None}, "two": two, "x": other})])
    first, second, third = cards.split('<div class="said"')[1:]
    assert "<mark>" not in first and "<mark>" not in third
    assert "<dd>2 <mark>4</mark> 1</dd>" in second and "so <mark>6</mark></dd>" in second
    assert "<dd>see 2 4 1 so <mark>5</mark></dd>" in second


def test_an_evaluated_response_has_a_verdict_on_its_form():
    right = "<description> a </description> <think> b </think> \\boxed{4}"
    lines = {name: verdict(0, 1, 1, text) for name, text in {"y": right, "n": "\\boxed{4}"}.items()}
    lines = {name: line | {"prompt": "p"} for name, line in lines.items()}
    cards = gallery([Question("held", lines)], Form("vision_sr1"))
    assert (
        '<span class="good">✓ form</span>' in cards and '<span class="bad">✗ form</span>' in cards
    )
    assert "form</span>" not in gallery([Question("held", lines)])
