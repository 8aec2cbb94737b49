"""Pages in headless Chromium: widths of a phone and a screen, light and dark, figures and gallery.

Debian's chromium is installed where it may be; it is spoken to through the DevTools protocol, which
sets a page's width to less than a window's smallest.
"""

import json
import re

import pytest
from PIL import Image
from plotly.graph_objects import Figure

from megatron_sr1.report.report import write_report
from tests import browser, debian
from tests.report_runs import (
    EVIL,
    Page,
    make_demo,
    make_hostile,
    make_run,
    metrics,
    show,
    verdict,
    write_lines,
)

pytestmark = pytest.mark.slow
WORDS = " ".join(["Ein_langes_Wort_ohne_Pause" * 8, "two words", EVIL])


@pytest.fixture(scope="module")
def tab():
    if reason := debian.missing((browser.PROGRAM,), ("chromium",)):
        pytest.skip(reason)
    with browser.Browser() as opened:
        yield opened


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with long and hostile texts and several evaluations."""
    make_hostile(tmp_path / "run", WORDS)
    questions = [verdict(i, i % 2, int(i % 3 == 0), f"{WORDS} no. {i}") for i in range(12)]
    write_lines(tmp_path / "run" / "eval" / "x.jsonl", questions)
    show(monkeypatch, lambda index: [Image.effect_noise((700, 500), 80)])
    return write_report(tmp_path / "run")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows_no_script_fails_and_no_host_is_asked(
    tab, run, tmp_path, monkeypatch, width, dark
):
    make_demo(tmp_path / "demo", WORDS)
    tab.look(width, dark)
    for path in (run, write_report(tmp_path / "demo")):
        tab.errors.clear()
        tab.requests.clear()
        tab.open(path)
        tab.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        tab.draw()
        assert tab.overflows() == []
        assert tab.value("document.querySelectorAll('.chart:not(.drawn)').length") == 0
        assert tab.value("document.querySelectorAll('.chart .main-svg').length") > 2
        assert tab.errors == []
        assert set(tab.requests) == {
            each.as_uri() for each in (path, path.with_name("plotly.min.js"))
        }


def test_the_check_finds_what_overflows_or_is_squeezed(tab, run):
    tab.look(390)
    tab.open(run)
    tab.value("document.querySelector('h1').style.width = '500px'")
    assert any("H1" in found for found in tab.overflows())
    tab.open(run)
    tab.value("document.querySelector('dd').style.width = '20px'")
    assert any("letters" in found for found in tab.overflows())
    tab.value("console.error('an error')")
    assert any("an error" in error for error in tab.errors)
    tab.errors.clear()


def test_plotly_knows_every_property_of_the_figures(run, tmp_path):
    make_demo(tmp_path / "demo")
    for path in (run, write_report(tmp_path / "demo")):
        figures = Page(path).figures
        assert len(figures) > 5
        for figure in figures:
            valid = json.loads(
                re.sub('"color": "--[a-z0-9]+"', '"color": "red"', json.dumps(figure))
            )
            Figure(**valid)  # raises for a property or value that it does not know
    with pytest.raises(ValueError, match="lines"):
        Figure(data=[{"type": "scatter", "y": [1], "lines": 3}])


def test_figures_show_values_switch_zoom_and_send_nothing(tab, tmp_path):
    make_run(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", metrics(30, self_reward=True))
    tab.look(1280)
    tab.open(write_report(tmp_path))
    tab.value("var chart = [...document.querySelectorAll('.drawn')].pop()")
    tab.value("Plotly.Fx.hover(chart, [{curveNumber: 0, pointNumber: 2}])")
    assert tab.value("chart.querySelectorAll('.hovertext, .legend .traces').length") > 0
    buttons = tab.value("[...chart.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert "Zoom" in buttons and "Reset axes" in buttons
    assert not any(word in " ".join(buttons).lower() for word in ("share", "cloud", "edit"))
    light = tab.value("chart._fullLayout.font.color")
    tab.look(1280, dark=True)
    tab.wait(f"chart._fullLayout.font.color !== {light!r}")  # drawn again, in the other colours


def test_the_gallery_is_filtered_by_cell_and_source_and_searched(tab, tmp_path):
    make_run(tmp_path)
    questions = [verdict(i, i % 2, int(i < 4), f"text {i}") for i in range(16)]
    for number, line in enumerate(questions):
        line["source"] = "maps" if number < 6 else "charts"
    write_lines(tmp_path / "eval" / "sampled.jsonl", questions)
    tab.look(390)
    tab.open(write_report(tmp_path))

    def shown(**wanted: str) -> str:
        for name in ("cell", "source", "search"):
            field = f"document.querySelector('[data-filter={name}]')"
            tab.value(f"{field}.value = {wanted.get(name, '')!r}")
        tab.value(f"{field}.dispatchEvent(new Event('input'))")
        visible = "[...document.querySelectorAll('.sample')].filter((c) => !c.hidden).length"
        count = tab.value("document.querySelector('output').textContent")
        assert count.startswith(f"{tab.value(visible)} of ")
        return count.split()[2]

    assert shown() == "18" and tab.value("document.querySelector('.more').hidden") is False
    assert shown(cell="both right") == "2"
    assert shown(cell="shortcut") == "8"
    assert shown(source="maps") == "6" and shown(source="maps", cell="both wrong") == "1"
    assert shown(search="TEXT 12") == "1" and shown(search="nowhere") == "0"


def test_a_page_without_its_script_says_what_is_missing(tab, tmp_path):
    make_run(tmp_path)
    path = write_report(tmp_path)
    path.with_name("plotly.min.js").unlink()
    tab.look(1280)
    tab.open(path)
    assert "report --inline" in tab.value("document.querySelector('.chart').textContent")
    tab.errors.clear()
