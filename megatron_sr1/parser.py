"""The parser of the command line: every command, its arguments and its help.

In: the words after `megatron-sr1`. Out: a namespace; wrong ones exit with 2 and a usage line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sr1.runtime.gpus import GPUS

VERSION = "0.1.0"
"""The same as in setup.py."""
DEMO_OUTPUT = Path("runs/demo")
RUN_COMMANDS = {
    "train": "run the stage that the configuration names (sft, grpo or eval)",
    "sft": "supervised fine-tuning: train with stage=sft",
    "eval": "evaluation: train with stage=eval",
}
RUN_DESCRIPTION = """. Starts one rank per GPU (or launch.num_processes); under torchrun or srun it
joins their ranks. docs/configuration.md lists all keys."""
COMMANDS = {
    "demo": (
        "learn to read digits from scratch, on a CPU",
        """Make handwritten digits and a small model with random weights, train a cold start and
        from it two models with GRPO, with and without the self-reward, and compare them in
        DIR/report.html and DIR/summary.json. Takes minutes; started again after a stop, it
        continues.""",
    ),
    **{name: (text, text + RUN_DESCRIPTION) for name, text in RUN_COMMANDS.items()},
    "plan": (
        "memory, layouts and step time on a cluster, by formulas",
        """Memory per rank, the layouts that fit and their step time, computed by the formulas of
        docs/planner.md. model.path only needs a config.json.""",
    ),
    "report": (
        "write a run's HTML report again",
        """Write RUN_DIR/report.html from the files of a run, finished or not: curves of
        metrics.jsonl, samples of rollouts/ and eval/, with their images where the run's shards
        still exist. Plotly's script, which draws the curves, is written beside the page. Prints the
        path of the page.""",
    ),
    "compare": (
        "put runs and evaluations side by side",
        """Print what differs between runs or evaluations: settings, held-out rates with paired
        intervals, training; and write one HTML page with these, curves on the same axes, and the
        questions on which they differ, with their images.""",
    ),
    "ask": (
        "ask a model about images of your own",
        """Answer a question about one or more image files with both passes: description, thoughts
        and answer, and the answer read from the description alone. MODEL is a run, a model
        directory or a name on the hub; of a run's model the run's prompts and limits are used.
        Without --question, each line of standard input is a question.""",
    ),
    "doctor": (
        "what is installed, what would run, what to do",
        """Report what is installed, which devices and kernels a run would use, and how to fix what
        is missing. Exits with 1 if training could not run.""",
    ),
}
"""Command -> its line in the list, the description in its own help."""
LENGTHS = {
    "text": "text of a prompt (250)",
    "image": "image of a prompt, merged tokens (of the middle of the pixel limits)",
    "response": "response of pass 1 (half of its limit)",
    "reading": "response of pass 2 (half of its limit)",
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="megatron-sr1",
        description="Self-rewarding reinforcement learning of vision-language models (Vision-SR1) "
        "on Megatron-Core, on GPUs or on a CPU.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {
        name: commands.add_parser(name, help=text, description=description).add_argument
        for name, (text, description) in COMMANDS.items()
    }
    for name in (*RUN_COMMANDS, "plan"):
        add[name]("config", type=Path, metavar="CONFIG", help="YAML file")
        add[name]("overrides", nargs="*", metavar="key=value", help="such as seed=2")
    for name in RUN_COMMANDS:
        add[name]("--dry-run", action="store_true", help="check and describe, start nothing")
    text = "grade responses made elsewhere, jsonl lines of prompt, response and ground_truth; the "
    text += "set is named after the file; no model is needed; may be repeated"
    add["eval"](
        "--from", dest="files", type=Path, action="append", default=[], metavar="FILE", help=text
    )
    add["demo"]("--output", type=Path, default=DEMO_OUTPUT, metavar="DIR", help="run directory")
    add["demo"]("--seed", type=int, default=1, metavar="N", help="seed of data and model")
    text = "train LoRA adapters of this rank with GRPO, on the cold-started model; 0: all weights"
    add["demo"]("--adapter-rank", type=int, default=0, metavar="N", help=text)
    add["plan"]("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    add["plan"]("--gpu", required=True, metavar="NAME", help=" | ".join(GPUS))
    for name, text in LENGTHS.items():
        add["plan"](f"--{name}-tokens", type=float, metavar="N", help=f"mean {text}")
    add["report"]("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run")
    text = "put Plotly's script into the page: one file of 5 MB"
    for name in ("report", "compare"):
        add[name]("--inline", action="store_true", help=text)
    add["compare"]("runs", type=Path, nargs="+", metavar="RUN", help="run directory; 2 or more")
    text = "page to write (compare.html of the first run)"
    add["compare"]("--output", type=Path, metavar="FILE", help=text)
    _add_ask(add["ask"])
    text = "under torchrun or srun: links, clocks, files and versions of all ranks"
    add["doctor"]("--distributed", action="store_true", help=text)
    text = "run directory to test"
    add["doctor"]("--output", type=Path, default=Path("runs"), metavar="DIR", help=text)
    return parser


def _add_ask(add: Callable[..., argparse.Action]) -> None:
    add("model", metavar="MODEL", help="run, model or checkpoint directory, or hub name")
    add("overrides", nargs="*", metavar="key=value", help="such as rollout.max_response_tokens=512")
    text = "image file; several are given by repeating it, in the order of the question's <image>"
    add(
        "--image",
        dest="images",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help=text,
    )
    add("--question", metavar="TEXT", help="what to ask; without it, questions are read from stdin")
    add("--n", dest="number", type=int, default=1, metavar="N", help="number of responses (1)")
    text = "of the responses; 0 is greedy (0 for one response, 1 for several)"
    add("--temperature", type=float, metavar="T", help=text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse; overrides may come before and after options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments
