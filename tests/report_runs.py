"""Run directories for the tests of pages: a run, the demo, and one whose texts are hostile."""

import json
from html.parser import HTMLParser
from pathlib import Path

from megatron_sr1.report.demo_page import DEMO_RUNS

EVIL = (
    "</dd></article></script><script>alert(1)</script><!--<script>"
    '<img src=x onerror="alert(2)"> & "quoted" \'too\' <a href="https://evil.example">x</a>'
)


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(num_steps: int, self_reward: bool) -> list[dict]:
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, "stage": "grpo", "reward/accuracy": 0.5, "actor/loss": 0.1 / step}
        line |= {"time/pass1_seconds": 1.0, "time/update_seconds": 2.0, "time/step_seconds": 3.5}
        if self_reward:
            line |= {"reward/self_reward": step / num_steps, "actor/odd_metric": step % 3}
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


def show(monkeypatch, images):
    monkeypatch.setattr("megatron_sr1.report.samples.images_in", lambda *folders: images)


def make_hostile(run_dir: Path, text: str) -> None:
    """Make a run whose sets, metrics, settings and start are hostile too."""
    make_run(run_dir, text)
    lines = metrics(3, self_reward=True)
    for line in lines:
        line |= {text: line["step"], f"evaluation/{text}/accuracy": line["step"] / 3}
        line |= {f"reward/accuracy/{text}": line["step"] / 3, "actor/nan": float("nan")}
    write_lines(run_dir / "metrics.jsonl", lines)
    config = json.loads((run_dir / "config.json").read_text())
    config |= {"evaluation": {"sets": {"x": {"path": text}}}, "seed": text}
    (run_dir / "config.json").write_text(json.dumps(config))
    start = {"command": text, "versions": {text: text}}
    (run_dir / "start.json").write_text(json.dumps(start))
    questions = [verdict(i, 1, i % 2, text) | {"source": text} for i in range(2)]
    write_lines(run_dir / "eval" / "x.jsonl", questions)
    write_lines(run_dir / "eval" / "x_step_0.jsonl", questions)


class Page(HTMLParser):
    """All tags and attributes of a page, its scripts and figures, and whether it is balanced."""

    VOID = {"meta", "img", "input"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.data = ""
        self.scripts: list[tuple[dict, str]] = []
        self.feed(path.read_text())

    @property
    def figures(self) -> list[dict]:
        kind = "application/json"
        return [json.loads(text) for tag, text in self.scripts if tag.get("type") == kind]

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.data += data
