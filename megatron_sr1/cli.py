"""The command line: parse first (parser.py), then import what the command needs.

In: `megatron-sr1 COMMAND …`. Out: an exit status: 0 for success, 1 for a failure, 2 for an error
that the user can fix, reported in one line.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sr1 import show
from megatron_sr1.errors import CheckpointError, ConfigError, SR1Error
from megatron_sr1.parser import DEMO_OUTPUT, LENGTHS, parse
from megatron_sr1.runtime.logs import configure_logging, silence_native_warnings

if TYPE_CHECKING:
    from megatron_sr1.config.run import Config
    from megatron_sr1.runtime.groups import Groups


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, by default that of this process; return the exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    own = {"demo": demo_command, "plan": plan_command}
    own |= {"report": report_command, "doctor": doctor_command}
    own |= {"ask": show.ask_command, "compare": show.compare_command}
    try:
        return own.get(arguments.command, run_command)(arguments)
    except SR1Error as error:
        sys.stdout.flush()
        print(f"megatron-sr1: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if "RANK" not in os.environ:  # a rank's launcher reports it
            print("\nmegatron-sr1: interrupted", file=sys.stderr)
        return 130


def run_command(arguments: argparse.Namespace) -> int:
    """Run `train`, `sft` or `eval`: check and start the ranks, or be one of them."""
    from megatron_sr1.runtime import signals

    signals.listen()  # first, and for torchrun too: unblocked, the signal kills a process
    from megatron_sr1.config.loading import load_config
    from megatron_sr1.launch import preflight, torchrun

    overrides = list(arguments.overrides)
    if arguments.command != "train":
        overrides.append(f"stage={arguments.command}")
    if arguments.command == "eval" and arguments.files:
        return grade_command(load_config(arguments.config, overrides, has_model=False), arguments)
    is_rank = not arguments.dry_run and torchrun.join()
    with torchrun.first_rank_first():
        config = load_config(arguments.config, overrides)
        if not arguments.dry_run:
            config = preflight.fix_commit(config)
    # Before torch is imported, here and in the ranks.
    os.environ.update(torchrun.cuda_environment(config))
    started, num_ranks = time.time(), 1
    if not is_rank:
        silence_native_warnings(config.logging.level)
        if arguments.dry_run:
            return dry_run_command(config)
        num_ranks = check_start(config)
    try:
        if num_ranks > 1:
            own = ["train", str(arguments.config), *overrides]
            own += [f"model.commit={config.model.commit}"] * bool(config.model.commit)
            status = torchrun.run(own, config.launch, num_ranks)
            return _with_cause(status, Path(config.output), started)
        if not is_rank:
            os.environ.update(torchrun.rank_environment(config.launch, num_ranks))
        with one_rank(config) as (stage, groups):
            status = stage(config, groups)
            if config.stage == "eval" and groups.world.rank == 0:
                print_results(Path(config.output))
    except KeyboardInterrupt:
        if is_rank:
            raise
        print(f"\nmegatron-sr1: interrupted; {how_to_continue(config)}", file=sys.stderr)
        return 130
    # 0 after a request to stop, too: otherwise srun and torchrun would kill the ranks that are
    # still closing.
    return status


def grade_command(config: Config, arguments: argparse.Namespace) -> int:
    """Run `eval --from`: grade files in this process, without a model."""
    if arguments.dry_run:
        raise ConfigError("--dry-run checks what a run needs, and --from starts none; leave it out")
    from megatron_sr1.dry_run import check_output
    from megatron_sr1.evaluation.imported import grade_files
    from megatron_sr1.evaluation.judge import has_too_many_unjudged
    from megatron_sr1.evaluation.results import write_results
    from megatron_sr1.launch import preflight

    preflight.check_output(config.output)
    check_output(config)
    configure_logging(config.logging.level)
    found = grade_files(config, arguments.files)
    write_results(Path(config.output), config.evaluation, found)
    print_results(Path(config.output))
    return int(has_too_many_unjudged(found, config.evaluation.judge))


def print_results(run_dir: Path) -> None:
    """Write the report of an evaluation; print its tables, and where everything is."""
    import json

    from megatron_sr1.report.report import write_report
    from megatron_sr1.report.results import RESULTS_FILE, results_tables

    console = show.wide_console()
    for table in results_tables(json.loads((run_dir / RESULTS_FILE).read_text())):
        console.print(table)
        console.print()
    print(f"Answers: {run_dir / 'eval'}/NAME.jsonl of each set\nRates: {run_dir / RESULTS_FILE}")
    print(f"Report: {write_report(run_dir)}")


def check_start(config: Config) -> int:
    """Check a run, with warnings on stderr; return the number of ranks to start."""
    from megatron_sr1.dry_run import check_run
    from megatron_sr1.launch import preflight, torchrun

    preflight.check_paths(config)
    num_ranks = torchrun.num_processes(config.launch)
    warn(*check_run(config, num_ranks), preflight.crowded(config.launch, num_ranks))
    return num_ranks


def how_to_continue(config: Config) -> str:
    """Say what an interrupted run has saved and how to continue it."""
    if config.stage == "eval":
        return f"{config.output}/eval holds the answers so far, the same command continues"
    latest = Path(config.output) / "checkpoints" / "latest"
    if not latest.is_file():
        every = f"checkpoint.every_steps={config.checkpoint.every_steps}"
        return f"nothing was saved yet ({every}), the same command starts from the beginning"
    saved = latest.with_name(latest.read_text().strip())
    more = "" if config.checkpoint.resume else " with checkpoint.resume=true"
    return f"{saved} is saved, the same command{more} continues from it"


def dry_run_command(config: Config) -> int:
    """Run `train --dry-run`: the checks of a start, then a description, then warnings."""
    from megatron_sr1.dry_run import check_run, dry_run, has_weights, hf_files, local_model
    from megatron_sr1.launch import preflight
    from megatron_sr1.trainer.data_checks import long_prompts, prompt_lengths

    try:
        config = preflight.fix_commit(config, weights=False)
    except CheckpointError as error:
        warn(str(error))
    preflight.check_paths(config, is_dry_run=True)
    warnings = check_run(config, config.launch.num_processes)
    lengths = prompt_lengths(config, hf_files(config))
    print(dry_run(config, lengths))
    absent = preflight.absent_paths(config)
    for key, path in absent.items():
        warn(f"{key}={path} does not exist: it was not checked, and a run would be refused")
    directory = local_model(config)
    if directory == Path(config.model.path) and not has_weights(directory):
        warn(f"model.path={config.model.path} holds no weights (*.safetensors); a run needs them")
    warn(*warnings, *long_prompts(config, lengths))
    warn(preflight.crowded(config.launch, config.launch.num_processes))
    return 0


def warn(*texts: str) -> None:
    """Print warnings to stderr, a line each; empty ones are skipped."""
    sys.stdout.flush()
    for text in filter(None, texts):
        print(f"megatron-sr1: warning: {text}", file=sys.stderr)


@contextmanager
def one_rank(config: Config) -> Iterator[tuple[Callable[[Config, Groups], int], Groups]]:
    """Join this rank with the others, and yield its stage; a failure of the block stops them."""
    from megatron_sr1.launch import torchrun
    from megatron_sr1.runtime import signals
    from megatron_sr1.runtime.failure import guard

    signals.listen(config.launch.save_on_sigterm)
    configure_logging(config.logging.level)
    with ExitStack() as stack:
        with torchrun.first_rank_first():
            stack.enter_context(guard(config.output))
        from megatron_sr1.stages import STAGES, joined_ranks

        with joined_ranks(config) as groups:
            yield STAGES[config.stage], groups


def _with_cause(status: int, run_dir: Path, started: float) -> int:
    """Repeat why the ranks failed, unless it was a user's error; return the exit status."""
    if status in (0, 2):
        return status
    from megatron_sr1.runtime.failure_files import read_failure, summarize_failure

    failure = read_failure(run_dir, since=started)
    if failure is None:
        problem = f"the ranks ended with status {status}; see above"
        print(f"megatron-sr1: error: {problem}", file=sys.stderr)
        return status
    if failure.code != 2:
        print(*summarize_failure(run_dir, failure, started), sep="\n", file=sys.stderr)
    return failure.code


def demo_command(arguments: argparse.Namespace) -> int:
    """Run `demo`: prepare, train, compare and report; or be one of its ranks."""
    from megatron_sr1.config.run import LaunchConfig
    from megatron_sr1.launch import preflight, torchrun
    from megatron_sr1.runtime.failure import guard

    output, seed, rank = arguments.output, arguments.seed, arguments.adapter_rank
    if torchrun.join():
        configure_logging("info")
        with guard(output):
            from megatron_sr1.demo import demo

            demo.train(output, seed, rank)
        return 0
    preflight.check_output(str(output))
    silence_native_warnings("info")
    configure_logging("info")
    from megatron_sr1.demo import demo

    demo.prepare(output, seed, rank)
    started = time.time()
    own = ["demo", "--output", str(output), "--seed", str(seed), "--adapter-rank", str(rank)]
    status = torchrun.run(own, LaunchConfig(threads=1), demo.NUM_RANKS)
    if status:
        return _with_cause(status, output, started)
    print_demo(output)
    return 0


def print_demo(output: Path) -> None:
    """Write the demo's summary and report; print its table, their path, and what to try next."""
    from rich.console import Console

    from megatron_sr1.demo import demo
    from megatron_sr1.report.report import write_report

    Console().print(demo.comparison(demo.finish(output)))
    paths = {"model.path": "cold_start/hf", "data.train": "data/train"}
    paths |= {f"evaluation.sets.{way}.path": "data/eval" for way in demo.WAYS}
    moved = "" if output == DEMO_OUTPUT else "".join(f" {k}={output / v}" for k, v in paths.items())
    print(
        f"Report, with curves and samples: {write_report(output)}\n"
        "Next, train from the same cold start with settings of your own (docs/configuration.md):\n"
        "    megatron-sr1 train examples/digits_cpu.yaml optimizer.num_steps=5 "
        f"algorithm.credit=span{moved}\n"
        "docs/quickstart.md continues from there; docs/scaling.md leads to eight GPUs."
    )


def plan_command(arguments: argparse.Namespace) -> int:
    """Run `plan`; it needs the model's config.json, but no weights and no torch."""
    from megatron_sr1.config.loading import load_config
    from megatron_sr1.model.hf_config import read_hf_config
    from megatron_sr1.planning.plan import plan
    from megatron_sr1.planning.workload import planned_run
    from megatron_sr1.runtime.gpus import find_gpu
    from megatron_sr1.runtime.hub import model_directory
    from megatron_sr1.trainer.data_checks import resolved

    gpu = find_gpu(arguments.gpu)
    config = resolved(load_config(arguments.config, arguments.overrides))
    hf_config = read_hf_config(model_directory(*config.model.at, weights=False))
    lengths = {f"{name}_tokens": getattr(arguments, f"{name}_tokens") for name in LENGTHS}
    print(plan(planned_run(config, hf_config, gpu, lengths), arguments.gpus))
    return 0


def report_command(arguments: argparse.Namespace) -> int:
    """Run `report`."""
    from megatron_sr1.report.report import write_report

    print(write_report(arguments.run_dir, arguments.inline))
    return 0


def doctor_command(arguments: argparse.Namespace) -> int:
    """Run `doctor`; with `--distributed` as one of the ranks, of which rank 0 prints the result."""
    if not arguments.distributed:
        from megatron_sr1.doctor import examine

        text, can_train = examine()
    else:
        from megatron_sr1.launch import torchrun

        if not torchrun.join():
            start = "torchrun --nproc-per-node N -m megatron_sr1 doctor --distributed"
            problem = "doctor --distributed runs on the ranks of a launch"
            raise ConfigError(f"{problem}: start it as `{start}`, or with srun")
        configure_logging("warning")
        from megatron_sr1.doctor_distributed import examine_together

        text, can_train = examine_together(arguments.output)
    if not arguments.distributed or os.environ["RANK"] == "0":
        print(text)
    return 0 if can_train else 1
