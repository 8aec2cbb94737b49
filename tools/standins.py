r"""Write stand-ins for the published data sets, or serve one for a judge (docs/vision_sr1.md).

`data` writes the demo's digits in the schemas of Vision-SR1's published data sets, as a cache of
the Hugging Face hub, with a prompt template in upstream's form and small recipes. Whatever their
names say, these are digits, so the cache is a directory of its own. `judge` answers a judge's
requests by comparing strings: it shows the protocol and judges nothing.

    python tools/standins.py data runs/demo/data standins
    python tools/standins.py judge --port 8765
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sr1.data.examples import IMAGE_MARK
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.runtime.files import write_text

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0" * 40
"""Name of the only commit of each repository."""
TRAINING = "LMMs-Lab-Turtle/Vision-SR1-47K"
COLD_START = "LMMs-Lab-Turtle/Vision-SR1-Cold-9K"
BENCHMARKS = ("zli12321/mmstar", "zli12321/visnumbench", "zli12321/hallusionbench")
COLD_START_FILES = {
    "vision_sr1": "A-vision_see_think.json",
    "vision_r1": "A-vision_reasoner.json",
    "reader": "A-caption_reasoners(text).json",
}
"""Format of a conversation -> its file, as published: two of sharegpt, the last of alpaca."""
TEMPLATE = "{{ content | trim }}\nDescribe, think, answer."
"""Prompt of pass 1 in upstream's form, with the wording that the digits' model knows."""
RECIPES = {
    "cold_start.yaml": """\
base: {root}/examples/digits_cpu.yaml
stage: sft
data: {{prompts_per_step: 16}}
optimizer: {{num_epochs: 3, warmup_ratio: 0.1, learning_rate: 1.0e-4, weight_decay: 0.0}}
evaluation: {{sets: {{}}}}
""",
    "grpo.yaml": """\
base: {root}/examples/digits_cpu.yaml
stage: grpo
data: {{prompts_per_step: 8}}
algorithm: {{prompts_per_update: 8}}
optimizer: {{num_steps: 6}}
evaluation: {{sets: {{}}}}
""",
}
"""What `examples/qwen25vl_7b_cold_start.yaml` and `qwen25vl_7b.yaml` are on GPUs."""
JUDGE_SECONDS = 900.0


def make_data(shards: Path, target: Path) -> None:
    """Write all stand-ins for data from the demo's shards `train`, `eval` and `cold_start`."""
    cache = target / "huggingface" / "hub"
    _write_parquet(_questions(ShardReader(shards / "train"), "digits"), cache, TRAINING, "train")
    held_out = list(_questions(ShardReader(shards / "eval"), "digits"))
    for number, name in enumerate(BENCHMARKS):
        rows = held_out[number :: len(BENCHMARKS)]
        _write_parquet(iter(rows), cache, name, "test")
    _write_cold_start(ShardReader(shards / "cold_start"), _repository(cache, COLD_START))
    prompts = target / "format_prompt"
    prompts.mkdir(parents=True, exist_ok=True)
    write_text(prompts / "see_think_format.jinja", TEMPLATE)
    for name, text in RECIPES.items():
        write_text(target / name, text.format(root=ROOT))


def _repository(cache: Path, name: str) -> Path:
    """Make a data set's repository in the cache; return the directory of its commit."""
    folder = cache / f"datasets--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    write_text(folder / "refs" / "main", COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / COMMIT


def _questions(reader: ShardReader, source: str) -> Iterator[dict[str, Any]]:
    """Yield rows in the schema of Vision-SR1-47K, which the benchmarks have, too."""
    for index in range(len(reader)):
        example = reader.example(index)
        (image,) = reader.image_files(index)
        yield {
            "problem_id": index,
            "problem": example.question,
            "answer": example.answer,
            "images": [{"bytes": image, "path": None}],
            "data_source": source,
            "category": example.metadata["kind"],
        }


def _write_parquet(rows: Iterator[dict[str, Any]], cache: Path, name: str, split: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = _repository(cache, name) / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _write_cold_start(reader: ShardReader, folder: Path) -> None:
    """Write the three files of the cold start, and its images beside them."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in COLD_START_FILES}
    (folder / "images").mkdir(exist_ok=True)
    for index in range(len(reader)):
        example = reader.example(index)
        asked, answered = (message.content for message in example.messages)
        form = example.metadata["format"]
        if form == "reader":
            description, question, instruction = asked.split("\n")
            row: dict[str, Any] = {
                "instruction": f"{description}\n{question}",
                "input": instruction,
            }
            rows[form].append({**row, "output": answered})
            continue
        asked = asked.replace(IMAGE_MARK, "").replace("\n", f"{IMAGE_MARK}\n", 1)  # as in GRPO
        (image,) = reader.image_files(index)
        (folder / "images" / f"{index}.png").write_bytes(image)
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        rows[form].append({"messages": turns, "images": [f"images/{index}.png"]})
    for form, name in COLD_START_FILES.items():
        write_text(folder / name, json.dumps(rows[form]))


def verdict(body: dict[str, Any]) -> str:
    """Return the reply to a request of the judge: right if the texts are equal, else wrong."""
    asked = json.loads(body["messages"][-1]["content"])
    golds = {str(gold).strip().lower() for gold in asked["gold_answers"]}
    is_right = str(asked["answer"]).strip().lower() in golds
    return json.dumps({"verdict": "right" if is_right else "wrong"})


class _Handler(BaseHTTPRequestHandler):
    """Answers chat completions as OpenAI's API does."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": verdict(body)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        content = json.dumps({**reply, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Write nothing: the command is run in the background of a terminal."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # connections that wait; the usual 5 are fewer than a batch opens


def serve(port: int, seconds: float) -> None:
    """Answer the judge's requests on 127.0.0.1 for a time."""
    server = _Server(("127.0.0.1", port), _Handler)
    threading.Timer(seconds, server.shutdown).start()
    server.serve_forever()


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write data sets, a template and recipes")
    data.add_argument("shards", type=Path, metavar="SHARDS", help="the demo's, runs/demo/data")
    data.add_argument("target", type=Path, metavar="DIR", help="a new directory")
    judge = commands.add_parser("judge", help="serve a judge on 127.0.0.1")
    judge.add_argument("--port", type=int, default=8765, metavar="N", help="default: 8765")
    text = f"stop after this time, default: {JUDGE_SECONDS:g}"
    judge.add_argument("--seconds", type=float, default=JUDGE_SECONDS, metavar="S", help=text)
    options = parser.parse_args(arguments)
    if options.command == "judge":
        serve(options.port, options.seconds)
    elif options.target.exists():
        parser.error(f"{options.target} exists; name a new directory")
    else:
        make_data(options.shards, options.target)
        print(f"{options.target}: data sets in huggingface/, a template, recipes; all of digits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
