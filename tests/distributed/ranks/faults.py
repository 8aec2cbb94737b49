"""Ranks that fail on demand: the package's own functions, wrapped from outside to fail once.

Usage:
    faults.py server              one case a line of standard input, as JSON; an answer a line
    faults.py launch CASE ARG…    `megatron-sr1 ARG…` with its torchrun, whose ranks fail
    faults.py rank CASE ARG…      one of those ranks

A case: `phase` and `fault` (below), `rank` that fails, `deadline` of that phase there, for a rank
that hangs (seconds; 0: as configured); for the server also `config`, `overrides` and `output` of
the run and `limit`, seconds until it is given up. The server imports everything once and forks two
ranks a case.
"""

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.ranks import free_ports, rank_variables

ALGEBRA = "megatron_sr1.rewards.mathematics"
PHASE_OF = {"load": "setup", "pass2": "pass1", "worker": "reward"}
PHASE_OF |= dict.fromkeys(("forward", "backward", "optimizer"), "update")
WHOLE_PHASES = ("canary", "prompts", "share", "old_logprobs", "reference")
"""Phases in which a rank fails at the beginning."""


def hang():
    while True:
        time.sleep(60)


class Fault:
    """Fails on one rank, and says when."""

    def __init__(self, case, run_dir):
        self.kind, self.run_dir = case["fault"], run_dir
        self.armed = self.kind != "none" and int(os.environ["RANK"]) == case["rank"]

    def __call__(self, *arguments):
        if not self.armed:
            return
        self.armed = False
        (self.run_dir / "fault_at").write_text(str(time.time()))
        if self.kind == "engine":
            return break_core(*arguments)
        if self.kind == "raise":
            raise RuntimeError("the moon is missing")
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(self.kind)
        if number is not None:
            os.kill(os.getpid(), number)
        hang()


def break_core(engine):
    """From now on vLLM's own executor fails, below all that is ours."""

    def execute_model(*unused, **named):
        raise RuntimeError("the moon is missing")

    engine._core.engine_core.engine_core.model_executor.execute_model = execute_model


def before(owner, name, do):
    """Have `do(*arguments)` done before each call of `owner.name`."""
    real = getattr(owner, name)

    def wrapped(*arguments, **named):
        do(*arguments)
        return real(*arguments, **named)

    setattr(owner, name, wrapped)


def shorten(case):
    """The deadline of the phase in which this rank hangs; others keep the usual one."""
    if case["fault"] != "hang" or not case["deadline"] or int(os.environ["RANK"]) != case["rank"]:
        return
    from megatron_sr1.trainer.context import Context

    real = Context.phase

    @contextlib.contextmanager
    def phase(self, name):
        launch = self.config.launch
        usual = launch.setup_deadline_seconds, launch.phase_deadline_seconds
        if name == PHASE_OF.get(case["phase"], case["phase"]):
            launch.setup_deadline_seconds = launch.phase_deadline_seconds = case["deadline"]
        with real(self, name):
            launch.setup_deadline_seconds, launch.phase_deadline_seconds = usual
            yield

    Context.phase = phase


def inject(case, run_dir):
    """Wrap what the case names."""
    fault, place = Fault(case, run_dir), case["phase"]
    shorten(case)
    if place == "load":
        from megatron_sr1 import stages

        before(stages, "load_actor_model", fault)
    elif place in ("forward", "backward", "optimizer"):
        in_update(fault, place)
    elif place == "save":
        from megatron_sr1.checkpoint import saving

        real = saving.save_tensors

        def save_tensors(*arguments):
            pending = real(*arguments)
            fault()
            return pending

        saving.save_tensors = save_tensors
    elif place in ("reward", "worker"):
        from megatron_sr1.trainer import grading

        if place == "worker":
            in_worker(case["fault"])
        else:
            before(grading, "score", fault)
    elif place in WHOLE_PHASES and case["fault"] != "engine":
        in_phase(fault, place)
    else:
        in_engine(fault, place)


def in_phase(fault, place):
    from megatron_sr1.trainer.context import Context

    real = Context.phase

    @contextlib.contextmanager
    def phase(self, name):
        with real(self, name):
            if name == place:
                fault()
            yield

    Context.phase = phase


def in_update(fault, place):
    from megatron_sr1 import stages
    from megatron_sr1.model.qwen25_vl import Qwen25VL

    if place == "optimizer":
        make = stages.make_actor

        def make_actor(*arguments):
            actor = make(*arguments)
            before(actor.optimizer, "step", fault)
            return actor

        stages.make_actor = make_actor
        return
    forward = Qwen25VL.forward

    def forward_with_fault(self, *arguments, **named):
        if place == "forward":
            fault()
        output = forward(self, *arguments, **named)
        if place == "backward" and output.requires_grad:
            output.register_hook(fault)
        return output

    Qwen25VL.forward = forward_with_fault


def in_engine(fault, place):
    from megatron_sr1.rollout.engine import Engine
    from megatron_sr1.rollout.readings import PREFIX

    if place == "sync":
        real = Engine.sync

        def sync(self, weights, *arguments, **named):
            def some(weights):
                for number, item in enumerate(weights):
                    if number == 5:
                        fault()
                    yield item

            real(self, some(weights), *arguments, **named)

        Engine.sync = sync
        return
    reading = []
    before(Engine, "submit", lambda engine, requests: reading.extend(
        request.id for request in requests if request.id.startswith(PREFIX)
    ))  # fmt: skip

    def at_step(engine):
        wanted = {
            "canary": "score" in engine._live,
            "pass1": engine.num_steps > 5,
            "pass2": bool(reading),
        }
        if wanted.get(place):
            fault(engine)

    before(Engine, "step", at_step)


def in_worker(kind):
    """Stop or kill the real process of the algebra, then have it asked something, once.

    The verdict on that is the one on the first rollout.
    """
    import psutil

    from megatron_sr1.rewards.answered import Finished
    from megatron_sr1.rewards.grading_pool import GradingPool
    from tests.rollout_case import case

    real, done = GradingPool.results, []

    def results(self, finished):
        found = real(self, finished)
        if done or os.environ["RANK"] != "1":
            return found
        done.append(True)
        warm, asked = (
            Finished(name, *case(f"\\boxed{{{answer}}}", gold))
            for name, answer, gold in (
                ("before", "(x-1)(x+1)", "x^2-1"),
                ("a sample", "(x-2)(x+2)", "x^2-4"),
            )
        )
        assert real(self, [warm])[0].accuracy
        children = psutil.Process().children(recursive=True)
        (algebra,) = (each for each in children if ALGEBRA in each.cmdline())
        algebra.send_signal({"stop": signal.SIGSTOP, "die": signal.SIGKILL}[kind])
        time.sleep(0.2)
        return [*real(self, [asked]), *found[1:]]

    GradingPool.results = results


def run_rank(case, arguments):
    """A rank of `megatron-sr1 train`."""
    from megatron_sr1 import cli
    from megatron_sr1.config.loading import load_config

    run_dir = Path(load_config(Path(arguments[1]), arguments[2:]).output)
    inject(case, run_dir)
    return cli.main(arguments)


def launch(case_text, arguments):
    """The command itself; only what it starts as a rank is this script."""
    from megatron_sr1 import cli
    from megatron_sr1.launch import torchrun

    real = torchrun.build_command

    def build_command(own, num_ranks):
        command = real(own, num_ranks)
        place = command.index("megatron_sr1")
        return [*command[: place - 1], __file__, "rank", case_text, *command[place + 1 :]]

    torchrun.build_command = build_command
    return cli.main(arguments)


def fork_rank(case, rank, port, log):
    """One rank in a process group of its own; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(rank_variables(rank, 2, port))
    status = 70
    try:
        status = run_rank(case, ["train", case["config"], *case["overrides"]])
    except BaseException as error:
        os.write(2, f"faults.py: {error!r}\n".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def left_behind(run_dir, seconds=3.0):
    """Processes of a case that do not end by themselves, known by their standard output."""
    until = time.time() + seconds
    while True:
        left = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "fd/1") == str(run_dir / "output.txt"):
                    left.append((process / "cmdline").read_text().replace("\0", " "))
        if not left or time.time() > until:
            return left
        time.sleep(0.1)


def run_case(case):
    """Both ranks to their ends.

    Returns:
        `statuses`, `seconds` from the fault to the end of the last, `late` ranks that had to be
        killed, `left` processes that write to the same file, `output` with the last words that
        the launcher would say.
    """
    from megatron_sr1 import cli

    run_dir, started = Path(case["output"]), time.time()
    run_dir.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    with open(run_dir / "output.txt", "w+") as log:
        waiting = {fork_rank(case, rank, port, log): rank for rank in range(2)}
        statuses, late, until = [None, None], [], started + case["limit"]
        while waiting:
            for pid, rank in list(waiting.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
                    del waiting[pid]
                elif time.time() > until and rank not in late:
                    late.append(rank)
                    os.killpg(pid, signal.SIGKILL)
            time.sleep(0.02)
        ended_at = time.time()
        log.seek(0)
        output = log.read()
    left = left_behind(run_dir)
    if any(statuses):
        with contextlib.redirect_stderr(io.StringIO()) as words:
            cli._with_cause(1, run_dir, started)
        output += words.getvalue()
    failed = run_dir / "fault_at"
    seconds = ended_at - float(failed.read_text()) if failed.exists() else None
    return {"statuses": statuses, "seconds": seconds, "late": late, "left": left, "output": output}


def serve():
    """Run cases until standard input ends."""
    importlib.import_module("tests.ranks_libraries")
    for line in sys.stdin:
        print(json.dumps(run_case(json.loads(line))), flush=True)


if __name__ == "__main__":
    what = sys.argv[1]
    if what == "server":
        serve()
    else:
        case_of = sys.argv[2]
        do = launch if what == "launch" else lambda text, rest: run_rank(json.loads(text), rest)
        sys.exit(do(case_of, sys.argv[3:]))
