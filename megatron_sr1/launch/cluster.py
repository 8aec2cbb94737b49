"""A Slurm cluster and its jobs: the records, the flags that fill them, commands on the login node.

In: the arguments of a launch script. Out: a `Cluster` and the `Task`s for `slurm.submit`. Nothing
here imports nemo-run, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_sr1.errors import ConfigError

STAGES = ("sft", "grpo", "eval")
ANSWER_SECONDS, CONNECT_SECONDS = 60, 10


def option(default: Any, text: str, flag: str = "", **argparse_settings: Any) -> Any:
    """Return a field that launch scripts fill from a flag, by default --NAME.

    A field with an empty tuple or a `dict` as its default takes a flag that may be repeated.
    """
    metadata = {"flag": flag, "argparse": {"help": text, **argparse_settings}}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Cluster:
    """A Slurm cluster and the resources of each job; the help texts describe the fields."""

    partition: str = option("", "Slurm's default if not given")
    account: str = option("", "yours in Slurm if not given")
    nodes: int = option(1, "nodes per job", metavar="N")
    gpus_per_node: int = option(0, "0 on CPUs (%(default)s)", metavar="N")
    tasks_per_node: int = option(0, "ranks per node; 0: one per GPU (%(default)s)", metavar="N")
    cpus_per_task: int = option(0, "cores per rank; 0: Slurm's default, often one", metavar="N")
    time: str = option("04:00:00", "time limit of each job (%(default)s)", metavar="LIMIT")
    warning_seconds: int = option(
        300,
        "seconds before the limit to save and requeue (%(default)s); Slurm may be a minute early",
        "--warning",
        metavar="S",
    )
    launcher: str = option(
        "srun", "starts a task per rank, or torchrun per node", choices=("srun", "torchrun")
    )
    container: str = option("", "image for pyxis: a file or a reference", metavar="IMAGE")
    mounts: tuple[str, ...] = option((), "directory", "--mount", metavar="HOST:CONTAINER")
    environment: Mapping[str, str] = option(
        dict, "environment variable of the ranks", "--env", metavar="NAME=VALUE"
    )
    sbatch: Mapping[str, str] = option(dict, "such as qos=high", metavar="OPTION=VALUE")
    workdir: str = option("", "checkout, seen by all nodes (this directory)", metavar="DIR")
    python: str = option("", "of the ranks (WORKDIR/.venv, or a container's)", metavar="FILE")
    logs: str = option(
        "",
        "scripts and logs, seen by all nodes (nemo-run's home; with a tunnel WORKDIR/runs/slurm)",
        metavar="DIR",
    )
    tunnel: str = option("", "login node, by ssh with a key", metavar="USER@HOST[:PORT]")
    identity: str = option("", "private key for the tunnel", metavar="FILE")

    @property
    def ranks_per_node(self) -> int:
        """Ranks per node."""
        return self.tasks_per_node or self.gpus_per_node

    @property
    def interpreter(self) -> str:
        """Python interpreter of the ranks."""
        if self.python:
            is_path = "/" in self.python and not self.container
            return os.path.join(self.workdir, self.python) if is_path else self.python
        return "python" if self.container else f"{self.workdir}/.venv/bin/python"


@dataclass(frozen=True)
class Task:
    """One job: a stage with its configuration.

    Attributes:
        name: name in the queue and of the log file.
        config: YAML file on this machine; the job gets a copy.
        overrides: key=value.
        follows: name of the task that must succeed first, and whose model this one loads; "": none.
    """

    name: str
    config: Path
    overrides: tuple[str, ...] = ()
    follows: str = ""


def add_arguments(parser: argparse.ArgumentParser, config: str) -> None:
    """Add the flags of a cluster and of the stages to a launch script; `config` is a default."""
    add = parser.add_argument
    add("--config", default=config, metavar="YAML", help="configuration (default: %(default)s)")
    text = "of sft,grpo,eval: consecutive jobs, each from the model of the previous one; several "
    text += "need --output (default: %(default)s)"
    add("--stages", default="grpo", metavar="LIST", help=text)
    text = "run directory; several stages: one below it each"
    add("--output", default="", metavar="DIR", help=text)
    for each in fields(Cluster):
        flag = each.metadata["flag"] or f"--{each.name.replace('_', '-')}"
        many = {"action": "append", "default": []}
        one = {"type": type(each.default), "default": each.default}
        how = one if isinstance(each.default, (str, int)) else many
        add(flag, dest=each.name, **how, **each.metadata["argparse"])
    add("overrides", nargs="*", metavar="[STAGE:]key=value", help="such as seed=2 or sft:seed=2")


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """Return the cluster that the flags of `add_arguments` describe, or raise a ConfigError."""
    if arguments.tunnel and not arguments.workdir:
        raise ConfigError("--tunnel needs --workdir, the checkout on the cluster")
    given = {each.name: getattr(arguments, each.name) for each in fields(Cluster)}
    given |= {
        "mounts": tuple(arguments.mounts),
        "environment": _pairs("--env", arguments.environment),
        "sbatch": _pairs("--sbatch", arguments.sbatch),
        "workdir": arguments.workdir if arguments.tunnel else os.path.abspath(arguments.workdir),
    }
    return Cluster(**given)


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"{flag} {text}: expected NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def tasks_of(
    arguments: argparse.Namespace, settings: Mapping[str, Sequence[str]] | None = None
) -> list[Task]:
    """Return the jobs that the flags of `add_arguments` describe, each following the previous one.

    The overrides of `settings`, by stage, apply before those of the command line. Raise a
    ConfigError for an unknown stage, stages out of order, or several without `--output`.
    """
    stages = [name.strip() for name in arguments.stages.split(",")]
    if not stages or stages != [name for name in STAGES if name in stages]:
        raise ConfigError(f"--stages={arguments.stages}: expected some of {','.join(STAGES)}")
    if len(stages) > 1 and not arguments.output:
        raise ConfigError(f"--stages={arguments.stages} needs --output, a directory for their runs")
    tasks, follows = [], ""
    for stage in stages:
        own = [f"stage={stage}", *(settings or {}).get(stage, ())]
        if arguments.output:
            below = f"/{stage}" if len(stages) > 1 else ""
            own.append(f"output={arguments.output}{below}")
        if follows:
            own.append(f"model.path={arguments.output}/{follows}/hf")
        for text in arguments.overrides:
            head, _, rest = text.partition(":")
            if head not in STAGES or not rest:
                own.append(text)
            elif head == stage:
                own.append(rest)
        tasks.append(Task(stage, Path(arguments.config), tuple(own), follows))
        follows = stage
    return tasks


def run_there(cluster: Cluster, command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command on the login node; raise a ConfigError if there is no answer."""
    argv = ["bash", "-c", command]
    if cluster.tunnel:
        host, port = split_tunnel(cluster.tunnel)
        # nemo-run copies with rsync over ssh and needs a key: never ask for a password.
        argv = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        argv += ["-p", str(port)] if port else []
        argv += ["-i", os.path.expanduser(cluster.identity)] if cluster.identity else []
        argv += [host, command]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        problem = f"no answer to `{command}` in {ANSWER_SECONDS} s; is Slurm up?"
        raise ConfigError(f"{cluster.tunnel or 'this machine'}: {problem}") from None
    except FileNotFoundError:
        raise ConfigError(f"{argv[0]} is not installed here; a tunnel needs it") from None
    if cluster.tunnel and done.returncode == 255:  # ssh's own status
        advice = f"try `ssh {cluster.tunnel}` (it must work with a key, without a password)"
        reason = last_line(done.stderr)
        raise ConfigError(f"tunnel {cluster.tunnel} cannot be reached: {reason}; {advice}")
    return done


def split_tunnel(tunnel: str) -> tuple[str, int | None]:
    """Split USER@HOST[:PORT] into user@host and the port, None if not given."""
    host, colon, port = tunnel.partition(":")
    if not all(host.partition("@")) or (colon and not port.isdecimal()):
        raise ConfigError(f"tunnel {tunnel!r}: expected user@host or user@host:port")
    return host, int(port) if port else None


def last_line(text: str) -> str:
    """Return the last line of a program's output, which has the reason of its failure."""
    return (text.strip().splitlines() or ["no reason given"])[-1].strip()
