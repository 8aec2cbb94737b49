"""Description of Slurm jobs: the records, the flags that fill them, chains of stages.

In: the arguments of a launch script. Out: a `Cluster` and the `Task`s for `slurm.submit`. Nothing
here needs nemo-run or Slurm, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sr1.errors import ConfigError

STAGES = ("sft", "grpo", "eval")


@dataclass(frozen=True)
class Cluster:
    """A Slurm cluster and the resources of each job."""

    partition: str = ""
    """"": Slurm's default."""
    account: str = ""
    """"": the user's default."""
    nodes: int = 1
    """Nodes per job."""
    gpus_per_node: int = 0
    """0 for a run on CPUs."""
    tasks_per_node: int = 0
    """Ranks per node; 0: one per GPU."""
    cpus_per_task: int = 0
    """Cores per rank; 0: Slurm's default, which may be one."""
    time: str = "04:00:00"
    """Time limit of a job, in sbatch's format."""
    warning_seconds: int = 300
    """How long before the limit (Slurm may be a minute early) the run finishes its step, saves,
    and is requeued."""
    launcher: str = "srun"
    """What starts the ranks: srun (a task per rank) | torchrun (a task per node)."""
    container: str = ""
    """Image file or reference for pyxis; "": none."""
    mounts: tuple[str, ...] = ()
    """Mounted directories, HOST:CONTAINER."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the ranks."""
    sbatch: Mapping[str, str] = field(default_factory=dict)
    """More options of sbatch, such as qos."""
    workdir: str = ""
    """Working directory of the ranks, shared by all nodes."""
    python: str = ""
    """Interpreter of the training environment; "": .venv/bin/python in `workdir`, or `python` in a
    container."""
    logs: str = ""
    """Directory of scripts and logs, shared by all nodes; "": nemo-run's home, or runs/slurm in
    `workdir` with a tunnel."""
    tunnel: str = ""
    """user@host[:port] of a login node; "": this machine is one."""
    identity: str = ""
    """Private key file for the tunnel."""

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
    """One job: a stage with its configuration."""

    name: str
    """Name in the queue and of the log file."""
    config: Path
    """YAML file on this machine; the job gets a copy."""
    overrides: tuple[str, ...] = ()
    """key=value."""
    follows: str = ""
    """Name of the task that must succeed first, and whose model this one loads; "": none."""


def add_arguments(parser: argparse.ArgumentParser, config: str) -> None:
    """Add the flags of a cluster and of the stages to a launch script.

    Args:
        parser: of the script.
        config: default of `--config`.
    """
    add = parser.add_argument
    add("--config", default=config, metavar="YAML", help="configuration (default: %(default)s)")
    add(
        "--stages",
        default="grpo",
        metavar="LIST",
        help="of sft,grpo,eval: consecutive jobs, each from the model of the previous one; "
        "several need --output (default: %(default)s)",
    )
    add(
        "--output",
        default="",
        metavar="DIR",
        help="run directory; several stages: one below it each",
    )
    add("--partition", default="", help="Slurm's default if not given")
    add("--account", default="", help="yours in Slurm if not given")
    add("--nodes", type=int, default=1, metavar="N")
    add("--gpus-per-node", type=int, default=0, metavar="N", help="0 on CPUs (%(default)s)")
    add("--tasks-per-node", type=int, default=0, metavar="N", help="0: one per GPU (%(default)s)")
    add("--cpus-per-task", type=int, default=0, metavar="N", help="cores per rank")
    add("--time", default="04:00:00", metavar="LIMIT", help="limit of each job (%(default)s)")
    add(
        "--warning",
        type=int,
        default=300,
        metavar="S",
        help="seconds before it to save (%(default)s)",
    )
    add("--launcher", default="srun", choices=("srun", "torchrun"), help="what starts the ranks")
    add("--container", default="", metavar="IMAGE", help="image for pyxis: a file or a reference")
    add("--mount", action="append", default=[], metavar="HOST:CONTAINER")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="variable of the ranks")
    add("--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="such as qos=high")
    add("--workdir", default="", metavar="DIR", help="checkout on the cluster (this directory)")
    add("--python", default="", metavar="FILE", help="of the ranks (WORKDIR/.venv/bin/python)")
    add("--logs", default="", metavar="DIR", help="scripts and logs, seen by all nodes")
    add("--tunnel", default="", metavar="USER@HOST[:PORT]", help="login node, by ssh with a key")
    add("--identity", default="", metavar="FILE", help="private key for the tunnel")
    add("overrides", nargs="*", metavar="[STAGE:]key=value", help="such as seed=2 or sft:seed=2")


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """Return the cluster that the flags describe.

    Args:
        arguments: of a parser with `add_arguments`.

    Raises:
        ConfigError: a flag that is not NAME=VALUE, or no `--workdir` with a tunnel.
    """
    if arguments.tunnel and not arguments.workdir:
        raise ConfigError("--tunnel needs --workdir, the checkout on the cluster")
    return Cluster(
        partition=arguments.partition,
        account=arguments.account,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        tasks_per_node=arguments.tasks_per_node,
        cpus_per_task=arguments.cpus_per_task,
        time=arguments.time,
        warning_seconds=arguments.warning,
        launcher=arguments.launcher,
        container=arguments.container,
        mounts=tuple(arguments.mount),
        environment=_pairs("--env", arguments.env),
        sbatch=_pairs("--sbatch", arguments.sbatch),
        workdir=arguments.workdir if arguments.tunnel else os.path.abspath(arguments.workdir),
        python=arguments.python,
        logs=arguments.logs,
        tunnel=arguments.tunnel,
        identity=arguments.identity,
    )


def tasks_of(
    arguments: argparse.Namespace, settings: Mapping[str, Sequence[str]] | None = None
) -> list[Task]:
    """Return the jobs that the flags describe, each one following the previous one.

    Args:
        arguments: of a parser with `add_arguments`.
        settings: stage -> overrides, applied before those of the command line.

    Raises:
        ConfigError: an unknown stage, stages out of order, or several without `--output`.
    """
    stages = [name.strip() for name in arguments.stages.split(",")]
    if not stages or stages != [name for name in STAGES if name in stages]:
        raise ConfigError(f"--stages={arguments.stages}: expected some of {','.join(STAGES)}")
    if len(stages) > 1 and not arguments.output:
        raise ConfigError(f"--stages={arguments.stages} needs --output, a directory for their runs")
    tasks: list[Task] = []
    for stage in stages:
        own = [f"stage={stage}", *(settings or {}).get(stage, ())]
        if arguments.output:
            below = f"/{stage}" if len(stages) > 1 else ""
            own.append(f"output={arguments.output}{below}")
        if tasks:
            own.append(f"model.path={arguments.output}/{tasks[-1].name}/hf")
        for text in arguments.overrides:
            head, colon, rest = text.partition(":")
            is_bound = bool(colon) and head in STAGES
            if not is_bound or head == stage:
                own.append(rest if is_bound else text)
        follows = tasks[-1].name if tasks else ""
        tasks.append(Task(stage, Path(arguments.config), tuple(own), follows))
    return tasks


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"{flag} {text}: expected NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)
