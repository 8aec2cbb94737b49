"""The report: from files alone, self-contained, and safe with any text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from megatron_sr1.demo.digits import make_digits
from megatron_sr1.errors import DataError
from megatron_sr1.report.charts import Series, bar_chart, line_chart, stacked_chart
from megatron_sr1.report.panels import paired
from megatron_sr1.report.report import DEMO_RUNS, images_in, pick_questions, write_report

EVIL = '</dd></article><script>alert(1)</script><img src=x onerror="alert(2)"> & "quoted"'


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(num_steps: int, self_reward: bool) -> list[dict]:
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, "stage": "grpo", "reward/accuracy": 0.5, "actor/loss": 0.1 / step}
        line |= {"time/pass1_seconds": 1.0, "time/update_seconds": 2.0, "time/step_seconds": 3.5}
        if self_reward:
            line |= {"reward/self_reward": step / num_steps, "actor/odd_metric": 1.0}
        lines.append(line)
    return lines


def verdict(index: int, accuracy: int, self_reward: int, text: str) -> dict:
    line = {"index": index, "question": "<image>sum?", "gold": "13", "response": text}
    line |= {"description": text, "reading": text, "accuracy": accuracy, "description_exact": None}
    return line | {"self_reward": self_reward, "shortcut": int(accuracy and not self_reward)}


def make_run(run_dir: Path, text: str = "4 2 7") -> None:
    write_lines(run_dir / "metrics.jsonl", metrics(30, self_reward=True))
    config = {"stage": "grpo", "data": {"train": "shards/train", "eval": "shards/eval"}}
    (run_dir / "config.json").write_text(json.dumps(config))
    reward = {"accuracy": 1.0, "format": 1.0, "self_reward": 0.0, "leak": True, "total": 1.0}
    reward |= {"answer": text, "reading_answer": None}
    line = {"step": 10, "index": 3, "sample": 0, "question": text, "gold": text, "response": text}
    line |= {"description": text, "reading": None, "advantage": 0.5, "weight_version": 9}
    write_lines(run_dir / "rollouts" / "step_10.jsonl", [line | {"reward": reward}])
    write_lines(run_dir / "rollouts" / "step_9.jsonl", [line | {"step": 9, "reward": reward}])


def make_demo(root: Path, text: str = "4 2 7") -> None:
    for name in DEMO_RUNS:
        make_run(root / name)
        for way in ("sampled", "greedy"):
            rewarded = int(name == "vision_sr1")
            lines = [verdict(i, int(i < 15), int(rewarded or i < 5), text) for i in range(20)]
            write_lines(root / "eval" / f"{name}_{way}.jsonl", lines)
    (root / "summary.json").write_text(json.dumps({"seconds": 300.0, "median_step_seconds": 2.5}))


class Tags(HTMLParser):
    """All tags and attributes of a page, and whether its tags are balanced."""

    VOID = {"meta", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.data += data


def show(monkeypatch, images):
    monkeypatch.setattr("megatron_sr1.report.report.images_in", lambda folder: images)


@pytest.mark.parametrize("make", [make_run, make_demo])
def test_a_models_text_stays_text(tmp_path, make):
    make(tmp_path, EVIL)
    page = Tags(write_report(tmp_path).read_text())
    assert page.open == []
    assert "script" not in page.names
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.data, "the text itself is shown"


@pytest.mark.parametrize("make", [make_run, make_demo])
def test_the_page_loads_nothing_and_is_small(tmp_path, make, monkeypatch):
    make(tmp_path)
    show(monkeypatch, lambda index: [Image.new("RGB", (84, 28), (index, 0, 0))])
    path = write_report(tmp_path)
    page = Tags(path.read_text())
    policy = [value for name, value in page.attributes if name == "content"][0]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert sources and all(value.startswith("data:image/") for value in sources)
    assert "url(" not in path.read_text()
    assert path.stat().st_size < 5e6


def test_a_page_of_a_long_run_with_large_images_stays_under_five_megabytes(tmp_path, monkeypatch):
    make_run(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", metrics(20000, self_reward=True))
    show(monkeypatch, lambda index: [Image.effect_noise((2000, 1500), 80)] * 3)
    path = write_report(tmp_path)
    assert path.stat().st_size < 5e6


def test_the_two_by_two_table_counts_the_verdicts(tmp_path):
    make_demo(tmp_path)
    text = write_report(tmp_path).read_text()
    cross = text[text.index("<h3>cold start</h3>") :]
    cells = re.findall(r"([\d.]+)%<small>(\d+)</small>", cross)[:4]
    assert cells == [("25.0", "5"), ("50.0", "10"), ("0.0", "0"), ("25.0", "5")]
    assert "language-shortcut rate 50.0% of 20" in cross


def test_the_demos_finding_is_computed_from_the_files(tmp_path):
    make_demo(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "right answer in 100% of the questions; without it in 25%" in text
    assert "Language shortcuts: 0% with, 50% without" in text


def test_the_demos_finding_gives_greedy_and_sampled_answers(tmp_path):
    make_demo(tmp_path)
    lines = [verdict(i, int(i < 18), 1, "4 2 7") for i in range(20)]
    write_lines(tmp_path / "eval" / "vision_sr1_greedy.jsonl", lines)
    text = write_report(tmp_path).read_text()
    assert "sampled: 75% after the cold start, 75% after GRPO rewarded answers only, 75%" in text
    assert "decoded greedily: 75%, 75%, 90%" in text
    cells = ["90.0\u00a0±\u00a013.1", "100.0\u00a0±\u00a00.0", "–", "0.0\u00a0±\u00a00.0"]
    row = "".join(f"<td>{cell}</td>" for cell in ["greedy: GRPO + self-reward", *cells])
    assert row in text


def test_differences_are_paired_by_question(tmp_path):
    before = [verdict(i, int(i < 2), 0, "") for i in range(4)]
    after = [verdict(i, int(i != 1), 0, "") for i in reversed(range(5))]  # 4 has no counterpart
    # Gaps 0, -1, 1, 1: mean 1/4, deviation sqrt(11/12).
    mean, half = paired(before, after, "accuracy")
    assert mean == pytest.approx(0.25)
    assert half == pytest.approx(1.96 * (11 / 12) ** 0.5 / 2)
    assert paired(before, after, "description_exact") is None
    make_demo(tmp_path)
    text = write_report(tmp_path).read_text()
    # Self-reward of 20 questions, 5 before and 20 after: 75 points, deviation sqrt(3.75 / 19).
    row = text[text.index("sampled: GRPO + self-reward minus cold start") :]
    assert "<td>+75.0\u00a0±\u00a019.5</td>" in row[: row.index("</tr>")]


def test_the_last_step_by_number_is_shown_not_by_name(tmp_path):
    make_run(tmp_path)
    assert "training, step 10" in write_report(tmp_path).read_text()


def test_a_metric_without_a_title_is_shown_too(tmp_path):
    make_run(tmp_path)
    assert "actor/odd_metric" in write_report(tmp_path).read_text()


def test_an_empty_run_still_gets_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "0 steps" in write_report(tmp_path).read_text()


def test_a_missing_image_is_reported_and_does_not_stop_the_report(tmp_path, monkeypatch):
    make_run(tmp_path)

    def images(index):
        raise DataError("shard gone")

    show(monkeypatch, images)
    assert "image not available" in write_report(tmp_path).read_text()


def test_images_come_from_the_data_set_of_the_samples(tmp_path, monkeypatch):
    make_digits(tmp_path / "shards", 1, num_train=2, num_eval=3, num_cold_start=2)
    monkeypatch.chdir(tmp_path)
    assert len(images_in("shards/eval").__self__) == 3
    assert images_in("") is None and images_in("shards/none") is None
    asked = []
    monkeypatch.setattr("megatron_sr1.report.report.images_in", asked.append)
    make_demo(tmp_path)
    write_report(tmp_path)
    write_report(tmp_path / "vision_sr1")
    assert asked == ["shards/eval", "shards/train"]


def test_each_held_out_set_has_its_own_questions(tmp_path, monkeypatch):
    sets = {"mine": {"path": "shards/mine"}, "again": {"path": "shards/mine"}}
    sets["yours"] = {"path": "shards/yours"}
    config = {"stage": "eval", "evaluation": {"sets": sets}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in sets:
        write_lines(tmp_path / "eval" / f"{name}.jsonl", [verdict(0, 1, 1, f"text of {name}")])
    asked = []
    monkeypatch.setattr("megatron_sr1.report.report.images_in", asked.append)
    page = write_report(tmp_path).read_text()
    assert asked == ["shards/mine", "shards/yours"]
    assert all(f"text of {name}" in page and f"held out, {name}" in page for name in sets)


def test_questions_are_selected_by_rule():
    before = [verdict(i, 1, 0, "") for i in range(6)]
    after = [verdict(i, int(i != 5), int(i != 5), "") for i in range(6)]
    chosen = pick_questions({"before": before, "after": after}, each=2)
    assert chosen == [
        ("one of the first", 0),
        ("one of the first", 1),
        ("fixed", 2),
        ("fixed", 3),
        ("still wrong", 5),
    ]


def coordinates(svg: str, kind: str) -> list[tuple[float, float]]:
    path = re.search(rf'class="{kind} s1" d="M([^"]*)"', svg)[1]
    return [tuple(float(n) for n in point.split()) for point in path.split("L")]


def test_a_curve_is_drawn_where_its_values_are():
    svg = line_chart("c", [Series("a", [0, 5, 10], [0.0, 0.5, 1.0], 1)], percent=True)
    (x0, y0), (x1, y1), (x2, y2) = coordinates(svg, "line")
    assert (x0, x2) == (52, 510) and (y0, y2) == (220, 12)
    assert (x1, y1) == ((x0 + x2) / 2, (y0 + y2) / 2)


def test_values_that_differ_by_rounding_alone_are_drawn_as_a_flat_line():
    chart = line_chart("t", [Series("s", [1, 2, 3], [1e-13, 3e-13, 2e-13], 1)])
    assert "<svg" in chart and "nan" not in chart


def test_absent_values_leave_no_point():
    svg = line_chart("c", [Series("a", [1, 2, 3], [0.1, None, 0.3], 1)])
    assert svg.count("<circle") == 2
    assert line_chart("c", [Series("a", [1], [None], 1)]) == ""


def test_stacked_layers_sum_to_the_step():
    layers = [Series("a", [1, 2], [1.0, 2.0], 0), Series("b", [1, 2], [3.0, None], 1)]
    svg = stacked_chart("t", layers)
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"><title>', svg)]
    assert heights[2] == pytest.approx(3 * heights[0], abs=0.2)
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2) and heights[3] == 0


def test_a_bar_without_a_value_is_left_out():
    svg = bar_chart("b", ["x", "y"], {"m": [(0.5, 0.1), None]})
    assert svg.count("<rect") == 1 and svg.count('class="error"') == 1
