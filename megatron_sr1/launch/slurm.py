"""Submit stages to Slurm with nemo-run, one job each; a job starts once its predecessor succeeded.

In: a `Cluster` and its `Task`s. Out: the job ids, and the commands to follow and cancel the jobs.
Only the configuration file is copied, not the code: the nodes use the checkout `workdir` and its
environment, or those of the container. nemo-run is imported in this file only, lazily, from an
environment of its own (`make launch-env`), as its pinned versions conflict with vLLM's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.launch.cluster import Cluster, Task
from megatron_sr1.launch.slurm_checks import check, split_tunnel

CONFIG_NAME = "config.yaml"
NODE_SCRIPT = Path(__file__).parents[2] / "examples" / "launch_torchrun.sh"
"""Starts a node's ranks with torchrun; it is copied with the job."""
JOB_FOLDER = "/nemo_run"
"""A job's directory in a container; without one, nemo-run substitutes the real path."""
SETUP = """\
# One address and port for all ranks, another port for each job that shares a node.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# Rank 0 creates this file when it stops early with everything saved. Outside a container it lies
# beside the log of this script.
export MEGATRON_SR1_UNFINISHED="/nemo_run/unfinished"
unfinished=$(dirname "$(readlink /proc/$$/fd/1)")/unfinished
rm -f "$unfinished"
trap '[[ $? -ne 0 || ! -e $unfinished ]] || scontrol requeue "$SLURM_JOB_ID" || exit 75' EXIT"""
"""Lines of the batch script before nemo-run's srun. At its end an unfinished run is requeued, a
failed one is not."""


@dataclass(frozen=True)
class Submitted:
    """Submitted jobs."""

    experiment: str
    """nemo-run's name of the experiment."""
    jobs: dict[str, str]
    """Slurm job id of each task, by name."""
    logs: dict[str, str]
    """Log file of each task, on the cluster."""
    home: str
    """nemo-run's directory on this machine; "": its default."""
    tunnel: str
    """Tunnel of the cluster."""

    def next_commands(self) -> str:
        """Return the commands that show, follow and cancel the jobs."""
        nemo = shlex.quote(str(Path(sys.executable).with_name("nemo")))
        if self.home:
            nemo = f"NEMORUN_HOME={shlex.quote(self.home)} {nemo}"
        lines = [f"# {name} is job {job}" for name, job in self.jobs.items()]
        lines.append("# nemo-run's commands (status and logs need a Slurm with accounting):")
        lines.append(f"{nemo} experiment status {self.experiment}")
        for index, name in enumerate(self.jobs):
            lines.append(f"{nemo} experiment logs {self.experiment} {index}    # {name}")
        lines.append(f"{nemo} experiment cancel --all {self.experiment}")
        lines.append(f"# Slurm's own{f', on {self.tunnel}' if self.tunnel else ''}:")
        lines.append(f"squeue --jobs {','.join(self.jobs.values())}")
        lines += [f"tail -f {shlex.quote(path)}" for path in self.logs.values()]
        lines.append(f"scancel {' '.join(self.jobs.values())}")
        return "\n".join(lines)


def submit(title: str, cluster: Cluster, tasks: Sequence[Task]) -> Submitted:
    """Check everything, then submit the tasks and return immediately.

    Args:
        title: of the experiment, without spaces.
        cluster: where to run them.
        tasks: one job each; a job that follows another starts if that one succeeded, and is
            removed from the queue otherwise.

    Returns:
        job ids and logs.

    Raises:
        SR1Error: a check failed; nothing has been submitted.
        ConfigError: nemo-run is not installed, or Slurm rejected the job.
    """
    configs = check(cluster, tasks)
    _check_names(cluster, tasks)
    home = _home(cluster)
    run = _nemo_run(home)
    name = f"{title}_{time.time_ns()}"
    with tempfile.TemporaryDirectory(prefix="sr1_submit_") as folder:
        with run.Experiment(
            title,
            id=name,
            log_level="WARNING",
            enable_goodbye_message=False,
            skip_status_at_exit=True,
        ) as experiment:
            for task in tasks:
                place = Path(folder) / task.name
                place.mkdir()
                shutil.copy(task.config, place / CONFIG_NAME)
                shutil.copy(NODE_SCRIPT, place)
                experiment.add(
                    _command(run, cluster, task),
                    executor=build_executor(cluster, place, configs[task.name]),
                    name=task.name,
                    dependencies=[task.follows] if task.follows else None,
                )
            _run(experiment)
    jobs = {job.id: job.handle.partition("://")[2].split("/")[1] for job in experiment.jobs}
    logs = {
        job.id: str(job.executor.job_details.srun_stdout)
        .replace("%j", jobs[job.id])
        .replace("${SLURM_RESTART_COUNT:-0}", "0")
        for job in experiment.jobs
    }
    return Submitted(name, jobs, logs, home, cluster.tunnel)


def build_executor(cluster: Cluster, package: Path, config: Config) -> Any:
    """Build nemo-run's `SlurmExecutor` for one task.

    Args:
        cluster: resources of the job.
        package: directory whose files are copied with the job.
        config: of the task; sets the threads of a rank on a CPU.

    Returns:
        a `nemo_run.SlurmExecutor`.
    """
    run = _nemo_run(_home(cluster))
    by_srun = cluster.launcher == "srun"
    environment = dict(cluster.environment)
    if not by_srun:
        environment |= {"PYTHON": cluster.interpreter, "NUM_NODES": str(cluster.nodes)}
        environment["RANKS_PER_NODE"] = str(cluster.ranks_per_node)
    if config.launch.threads:
        environment.setdefault("OMP_NUM_THREADS", str(config.launch.threads))
    extra: dict[str, Any] = {name: value or True for name, value in cluster.sbatch.items()}
    # Otherwise the successors of a failed job stay in the queue forever.
    extra.setdefault("kill_on_invalid_dep", "yes")
    extra.setdefault("signal", f"USR1@{cluster.warning_seconds}")
    extra.setdefault("requeue", True)
    return run.SlurmExecutor(
        account=cluster.account or None,
        partition=cluster.partition or None,
        job_name_prefix="megatron_sr1.",  # with the dot: nemo-run parses the name after it
        time=cluster.time,
        nodes=cluster.nodes,
        # All tasks of a node see all GPUs; each rank selects one by its number.
        gpus_per_node=cluster.gpus_per_node or None,
        ntasks_per_node=cluster.ranks_per_node if by_srun else 1,
        cpus_per_task=_cores(cluster) or None,
        container_image=cluster.container or None,
        container_mounts=list(cluster.mounts),
        env_vars={name: shlex.quote(value) for name, value in environment.items()},
        additional_parameters=extra,
        srun_args=_srun_options(cluster),
        setup_lines=SETUP,
        packager=run.PatternPackager(
            include_pattern=str(package / "*"), relative_path=str(package)
        ),
        tunnel=_tunnel(run, cluster),
        retries=0,  # a retry would restart a job whatever the failure
        poll_estimated_start_time=False,
    )


def _cores(cluster: Cluster) -> int:
    """Return the cores of an srun task, which is a rank or all ranks of a node; 0: not set."""
    return cluster.cpus_per_task * (1 if cluster.launcher == "srun" else cluster.ranks_per_node)


def _srun_options(cluster: Cluster) -> list[str]:
    """Return options that come after nemo-run's own and override them."""
    options = [] if cluster.container else [f"--chdir={cluster.workdir}"]
    if cluster.container and cluster.workdir:
        options.append(f"--container-workdir={cluster.workdir}")
    if cluster.cpus_per_task:
        options.append(f"--cpus-per-task={_cores(cluster)}")  # new sruns do not inherit it
    return options


def _command(run: Any, cluster: Cluster, task: Task) -> Any:
    """Build the command of each task; nemo-run joins the words, so they are quoted here."""
    words = [f"{JOB_FOLDER}/code/{CONFIG_NAME}", *map(shlex.quote, task.overrides)]
    if cluster.launcher == "torchrun":
        return run.Script(f"{JOB_FOLDER}/code/{NODE_SCRIPT.name}", entrypoint="bash", args=words)
    words = ["megatron_sr1", "train", *words]
    return run.Script("-m", entrypoint=shlex.quote(cluster.interpreter), args=words)


def _run(experiment: Any) -> None:
    """Submit the jobs; turn an error of sbatch into one line."""
    from invoke.exceptions import UnexpectedExit

    try:
        experiment.run(detach=True)
    except UnexpectedExit as error:
        said = (error.result.stderr or error.result.stdout).strip().splitlines() or ["no reason"]
        raise ConfigError(f"Slurm refused the job: {said[-1]}") from None


def _tunnel(run: Any, cluster: Cluster) -> Any:
    if not cluster.tunnel:
        return run.LocalTunnel(job_dir="")  # below nemo-run's home, where it writes its scripts
    host, port = split_tunnel(cluster.tunnel)
    user, _, name = host.partition("@")
    return run.SSHTunnel(
        user=user,
        host=name,
        port=port,
        identity=os.path.expanduser(cluster.identity) or None,
        job_dir=cluster.logs or f"{cluster.workdir}/runs/slurm",
    )


def _home(cluster: Cluster) -> str:
    """Return nemo-run's directory if it is not the default: without a tunnel, that of the logs."""
    return os.path.abspath(cluster.logs) if cluster.logs and not cluster.tunnel else ""


def _check_names(cluster: Cluster, tasks: Sequence[Task]) -> None:
    """Refuse paths that contain JOB_FOLDER: without a container nemo-run substitutes it."""
    home = os.environ.get("NEMORUN_HOME", "")
    texts = [cluster.logs or home, cluster.workdir, cluster.interpreter]
    texts += [text for task in tasks for text in task.overrides]
    for text in texts:
        if JOB_FOLDER in text and not cluster.container:
            raise ConfigError(
                f"{text!r}: nemo-run takes {JOB_FOLDER} in it for a name of its own; use a path "
                "without it"
            )


def _nemo_run(home: str) -> Any:
    """Import nemo-run; it reads its directory from the environment at import time."""
    if home:
        os.environ["NEMORUN_HOME"] = home
    try:
        import nemo_run
    except ImportError as error:
        raise ConfigError(
            f"nemo-run cannot be imported ({error}); run `make launch-env` and start this with "
            ".venv-launch/bin/python"
        ) from None
    return nemo_run
