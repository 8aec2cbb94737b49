"""The report: from files alone, safe with any text, small, and complete."""

import json
import re

import pytest
from PIL import Image

from megatron_sr1.config.run import Config
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.errors import DataError
from megatron_sr1.report.figures import script_json
from megatron_sr1.report.report import write_report
from megatron_sr1.report.samples import images_in
from megatron_sr1.report.verdicts import paired, with_interval
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


def test_no_text_ends_the_script_element_of_a_figure():
    shown = script_json({"name": EVIL})
    assert json.loads(shown) == {"name": EVIL}
    assert not set("<>&") & set(shown)


@pytest.mark.parametrize("make", [make_hostile, make_demo])
def test_a_models_text_stays_text(tmp_path, make):
    make(tmp_path / "run", EVIL)
    path = write_report(tmp_path / "run")
    page = Page(path)
    assert page.open == []
    nonce = re.search(r"script-src 'nonce-([\w-]{20,})'", path.read_text())[1]
    own = [tag for tag, _ in page.scripts if tag.get("type") != "application/json"]
    assert own == [{"nonce": nonce, "src": "plotly.min.js"}, {"nonce": nonce}]
    assert page.names.isdisjoint({"a", "iframe", "object", "form", "link", "base"})
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.data, "the text itself is shown"
    for figure in page.figures:  # Plotly reads tags in texts
        names = [trace["name"] for trace in figure["data"]]
        names += [str(label) for trace in figure["data"] for label in trace.get("y", ())]
        assert not re.search("[<>]", "".join(names))


@pytest.mark.parametrize("make", [make_run, make_demo])
def test_the_page_loads_only_plotlys_script_from_beside_it(tmp_path, make, monkeypatch):
    make(tmp_path)
    show(monkeypatch, lambda index: [Image.new("RGB", (84, 28), (index, 0, 0))])
    path = write_report(tmp_path)
    page = Page(path)
    policy = [value for name, value in page.attributes if name == "content"][0]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert sources.count("plotly.min.js") == 1
    images = [value for value in sources if value != "plotly.min.js"]
    assert images and all(value.startswith("data:image/") for value in images)
    assert "url(" not in path.read_text() and "://" not in path.read_text()
    assert (tmp_path / "plotly.min.js").stat().st_size > 1e6


def test_an_inline_page_is_one_file(tmp_path):
    make_run(tmp_path)
    path = write_report(tmp_path, inline=True)
    page = Page(path)
    assert not [name for name, _ in page.attributes if name == "src"]
    assert path.stat().st_size > 1e6 and not (tmp_path / "plotly.min.js").exists()
    assert page.scripts[-2][1].startswith("/**\n* plotly.js")


def test_a_page_of_a_long_run_with_large_images_has_at_most_a_megabyte_and_a_half(
    tmp_path, monkeypatch
):
    make_run(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", metrics(20000, self_reward=True))
    questions = [verdict(i, 1, i % 2, "word " * 1000) for i in range(40)]
    noise = Image.effect_noise((900, 700), 80)
    write_lines(tmp_path / "eval" / "sampled.jsonl", questions)
    show(monkeypatch, lambda index: [noise] * 3)
    path = write_report(tmp_path)
    assert path.stat().st_size < 1.5e6
    assert path.read_text().count('<article class="card sample"') > 4
    assert max(len(trace["y"]) for figure in Page(path).figures for trace in figure["data"]) <= 400


def test_the_two_by_two_table_counts_the_verdicts(tmp_path):
    make_demo(tmp_path)
    text = write_report(tmp_path).read_text()
    cross = text[text.index("<h3>cold start</h3>") :]
    cells = re.findall(r"([\d.]+)%<small>(\d+)</small>", cross)[:4]
    assert cells == [("25.0", "5"), ("50.0", "10"), ("0.0", "0"), ("25.0", "5")]
    assert "shortcut rate 50.0% of 20" in cross


def test_the_demos_finding_is_computed_from_the_files(tmp_path):
    make_demo(tmp_path)
    lines = [verdict(i, int(i < 18), 1, "4 2 7") for i in range(20)]
    write_lines(tmp_path / "eval" / "vision_sr1_greedy.jsonl", lines)
    text = write_report(tmp_path).read_text()
    assert "right answer in 100% of the questions; without it in 25%" in text
    assert "Shortcuts: 0% with, 50% without" in text
    assert "sampled: 75% after the cold start, 75% after GRPO rewarded answers only, 75%" in text
    assert "decoded greedily: 75%, 75%, 90%" in text
    cells = ["90.0\u00a0±\u00a013.1", "100.0\u00a0±\u00a00.0", "–", "0.0\u00a0±\u00a00.0"]
    row = "".join(f"<td>{cell}</td>" for cell in ["greedy: GRPO + self-reward", *cells])
    assert row in text


def test_what_the_self_reward_changed_is_on_top_with_its_interval(tmp_path):
    make_demo(tmp_path)
    page = Page(write_report(tmp_path))
    # Self-reward of 20 questions, 5 without and 20 with: 75 points, deviation sqrt(3.75 / 19).
    first = page.data[: page.data.index("With and without the self-reward")]
    assert "+75.0\u00a0±\u00a019.5points, self-reward, sampled" in first
    bars = {trace["name"]: trace for trace in page.figures[0]["data"]}["sampled"]
    gap = dict(zip(bars["y"], zip(bars["x"], bars["error_x"]["array"], strict=True), strict=True))
    assert gap["self-reward"] == (75.0, pytest.approx(19.47, abs=0.01))
    assert gap["shortcut"][0] == -50.0 and gap["answer right"] == (0.0, 0.0)


def test_held_out_curves_of_both_runs_begin_at_step_0(tmp_path):
    make_demo(tmp_path)
    figures = Page(write_report(tmp_path)).figures
    curves = {trace["name"]: trace for figure in figures for trace in figure["data"]}
    found = curves["GRPO + self-reward, sampled"]
    assert (found["x0"], found["dx"]) == (0, 30) and found["y"] in ([0.25, 1.0], [0.5, 0.0])
    text = write_report(tmp_path).read_text()
    assert "constant: GRPO, answer only, greedy 25 %, GRPO, answer only, sampled 25 %" in text


def test_an_interval_is_that_of_the_lines_with_the_verdict():
    lines = [verdict(i, 1, i % 2, "") for i in range(16)]
    lines += [line | {"self_reward": None} for line in lines]
    assert with_interval(lines, "self_reward") == (0.5, pytest.approx(1.96 * 0.5 / 16**0.5))


def test_differences_are_paired_by_question():
    before = [verdict(i, int(i < 2), 0, "") for i in range(4)]
    after = [verdict(i, int(i != 1), 0, "") for i in reversed(range(5))]  # 4 has no counterpart
    # Gaps 0, -1, 1, 1: mean 1/4, deviation sqrt(11/12).
    mean, half = paired(before, after, "accuracy")
    assert mean == pytest.approx(0.25)
    assert half == pytest.approx(1.96 * (11 / 12) ** 0.5 / 2)
    assert paired(before, after, "description_exact") is None


def test_several_responses_to_a_question_are_averaged_before_they_are_compared():
    before = [verdict(i, 0, 0, "") for i in (0, 1) for _ in range(2)]
    after = [verdict(0, 1, 0, ""), verdict(0, 0, 0, ""), verdict(1, 1, 0, ""), verdict(1, 1, 0, "")]
    # Gaps 1/2 and 1: mean 3/4, deviation 1 / sqrt(8).
    assert paired(before, after, "accuracy") == pytest.approx((0.75, 1.96 / 8**0.5 / 2**0.5))


def test_a_run_compares_its_first_evaluation_with_its_last(tmp_path):
    make_run(tmp_path)
    write_lines(
        tmp_path / "eval" / "greedy_step_0.jsonl", [verdict(i, 0, 0, "a") for i in range(4)]
    )
    write_lines(tmp_path / "eval" / "greedy.jsonl", [verdict(i, 1, 0, "b") for i in range(4)])
    path = write_report(tmp_path)
    bars = [trace for figure in Page(path).figures for trace in figure["data"] if "x" in trace]
    assert [trace["x"] for trace in bars if trace["name"] == "greedy, since step 0"] == [
        [100.0, 0.0, 100.0]
    ]
    assert 'data-run="step 0"' in path.read_text() and "last evaluation" in path.read_text()


def test_the_last_step_by_number_is_shown_not_by_name(tmp_path):
    make_run(tmp_path)
    assert "training, step 10" in write_report(tmp_path).read_text()


def test_fifteen_figures_are_shown_and_the_others_folded_away(tmp_path):
    make_run(tmp_path)
    names = "reward/total reward/format reward/shortcut_rate actor/reference_kl actor/entropy"
    names += " rollout/response_tokens_mean optimizer/learning_rate optimizer/grad_norm"
    names += " groups/no_spread mismatch/abs_max rollout/repetition evaluation/a/accuracy"
    names += " evaluation/a/self_reward evaluation/a/shortcut_rate evaluation/a/pass@4"
    lines = metrics(9, self_reward=True)
    lines = [line | {n: line["step"] / 9 for n in names.split()} for line in lines]
    write_lines(tmp_path / "metrics.jsonl", lines)
    text = write_report(tmp_path).read_text()
    curves = text[text.index("<h2>Curves") : text.index("<h2>Answers x readings")]
    assert curves.count("<figure>") == 15
    for title in ("actor/odd_metric", "Held out: pass@4"):
        assert title in text[text.index("All other metrics") :] and title not in curves


def test_a_metric_that_does_not_change_is_listed_and_not_drawn(tmp_path):
    make_run(tmp_path)
    lines = metrics(9, self_reward=True)
    write_lines(tmp_path / "metrics.jsonl", [line | {"rollout/flat": 0.25} for line in lines])
    text = write_report(tmp_path).read_text()
    assert "<td>rollout/flat</td><td>0.25</td><td>9</td>" in text
    assert "<b>rollout/flat</b>" not in text and "<b>Answer right</b>" not in text


def test_command_versions_seed_and_chosen_settings_are_shown(tmp_path):
    make_run(tmp_path)
    config = {"seed": 5, "data": {"packing": False, "shuffle": Config().data.shuffle}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = {"command": "megatron-sr1 train a.yaml", "versions": {"torch": "2.13.0"}, "ranks": 2}
    (tmp_path / "start.json").write_text(json.dumps(start))
    text = write_report(tmp_path).read_text()
    for row in ("command</td><td>megatron-sr1 train a.yaml", "versions</td><td>torch 2.13.0"):
        assert row in text
    chosen = text[text.index("Settings that are not defaults") : text.index("All settings")]
    assert "<td>data.packing</td><td>false</td>" in chosen and "data.shuffle" not in chosen


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
    monkeypatch.setattr("megatron_sr1.report.samples.images_in", asked.append)
    make_demo(tmp_path)
    write_report(tmp_path)
    write_report(tmp_path / "vision_sr1")
    assert asked == ["shards/eval", "shards/eval", "shards/train"]


def test_each_held_out_set_has_its_own_questions(tmp_path, monkeypatch):
    sets = {"mine": {"path": "shards/mine"}, "yours": {"path": "shards/yours"}}
    config = {"stage": "eval", "evaluation": {"sets": sets}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in sets:
        write_lines(tmp_path / "eval" / f"{name}.jsonl", [verdict(0, 1, 1, f"text of {name}")])
    asked = []
    monkeypatch.setattr("megatron_sr1.report.samples.images_in", asked.append)
    page = write_report(tmp_path).read_text()
    assert asked == ["shards/mine", "shards/yours"]
    assert all(f"text of {name}" in page and f"held out, {name}" in page for name in sets)
