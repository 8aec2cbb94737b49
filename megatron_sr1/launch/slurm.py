"""Submit stages to Slurm with nemo-run, one job each; a job starts once its predecessor succeeded.

Everything that can be checked is checked first, by the cluster's own tools, through `ssh` if there
is a tunnel; a check is skipped if its tool gives no answer (Slurm without accounting knows no
accounts). Only the configuration file is copied: the nodes use the checkout `workdir` and its
environment, or those of the container. nemo-run has an environment of its own (`make launch-env`),
as its pinned versions conflict with vLLM's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.launch import preflight
from megatron_sr1.launch.cluster import Cluster, Task, last_line, run_there, split_tunnel
from megatron_sr1.runtime.hub import is_hub_name

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


def submit(title: str, cluster: Cluster, tasks: Sequence[Task]) -> str:
    """Check everything, then submit the tasks, a job each, and return immediately.

    A job that follows another starts if that one succeeded, and is removed from the queue
    otherwise. `title`, without spaces, names nemo-run's experiment. Return the job ids and the
    commands that show, follow and cancel the jobs, for the terminal. Raise an SR1Error if a check
    fails, nemo-run is not installed, or Slurm rejects a job.
    """
    configs = check(cluster, tasks)
    # Without a tunnel, nemo-run's own directory is that of the logs.
    home = os.path.abspath(cluster.logs) if cluster.logs and not cluster.tunnel else ""
    run = _nemo_run(home)
    from invoke.exceptions import UnexpectedExit

    name = f"{title}_{time.time_ns()}"
    quiet = {"enable_goodbye_message": False, "skip_status_at_exit": True}
    with (
        tempfile.TemporaryDirectory(prefix="sr1_submit_") as folder,
        run.Experiment(title, id=name, log_level="WARNING", **quiet) as experiment,
    ):
        for task in tasks:
            place = Path(folder) / task.name
            place.mkdir()
            shutil.copy(task.config, place / CONFIG_NAME)
            shutil.copy(NODE_SCRIPT, place)
            experiment.add(
                _command(run, cluster, task),
                executor=build_executor(run, cluster, place, configs[task.name]),
                name=task.name,
                dependencies=[task.follows] if task.follows else None,
            )
        try:
            experiment.run(detach=True)
        except UnexpectedExit as error:  # of sbatch
            reason = last_line(error.result.stderr or error.result.stdout)
            raise ConfigError(f"Slurm refused the job: {reason}") from None
    return _next_commands(name, experiment.jobs, home, cluster.tunnel)


def _next_commands(name: str, submitted: Sequence[Any], home: str, tunnel: str) -> str:
    nemo = shlex.quote(str(Path(sys.executable).with_name("nemo")))
    nemo = f"NEMORUN_HOME={shlex.quote(home)} {nemo}" if home else nemo
    jobs, follow = dict[str, str](), []
    for job in submitted:
        jobs[job.id] = job.handle.partition("://")[2].split("/")[1]
        log = str(job.executor.job_details.srun_stdout).replace("%j", jobs[job.id])
        follow.append(f"tail -f {shlex.quote(log.replace('${SLURM_RESTART_COUNT:-0}', '0'))}")
    lines = [
        *(f"# {task} is job {job}" for task, job in jobs.items()),
        "# nemo-run's commands (status and logs need a Slurm with accounting):",
        f"{nemo} experiment status {name}",
        *(f"{nemo} experiment logs {name} {i}    # {task}" for i, task in enumerate(jobs)),
        f"{nemo} experiment cancel --all {name}",
        f"# Slurm's own{f', on {tunnel}' if tunnel else ''}:",
        f"squeue --jobs {','.join(jobs.values())}",
        *follow,
        f"scancel {' '.join(jobs.values())}",
    ]
    return "\n".join(lines)


def build_executor(run: Any, cluster: Cluster, package: Path, config: Config) -> Any:
    """Build the executor of a task, nemo-run being `run`; files of `package` go with the job."""
    by_srun = cluster.launcher == "srun"
    environment = dict(cluster.environment)
    if not by_srun:
        environment |= {"PYTHON": cluster.interpreter, "NUM_NODES": str(cluster.nodes)}
        environment["RANKS_PER_NODE"] = str(cluster.ranks_per_node)
    if config.launch.threads:
        environment.setdefault("OMP_NUM_THREADS", str(config.launch.threads))
    extra: dict[str, Any] = {
        "kill_on_invalid_dep": "yes",  # or the successors of a failed job stay in the queue forever
        "signal": f"USR1@{cluster.warning_seconds}",
        "requeue": True,
        **{name: value or True for name, value in cluster.sbatch.items()},
    }
    # Of an srun task, which is a rank or all ranks of a node.
    cores = cluster.cpus_per_task * (1 if by_srun else cluster.ranks_per_node)
    return run.SlurmExecutor(
        account=cluster.account or None,
        partition=cluster.partition or None,
        job_name_prefix="megatron_sr1.",  # with the dot: nemo-run parses the name after it
        time=cluster.time,
        nodes=cluster.nodes,
        # All tasks of a node see all GPUs; each rank selects one by its number.
        gpus_per_node=cluster.gpus_per_node or None,
        ntasks_per_node=cluster.ranks_per_node if by_srun else 1,
        cpus_per_task=cores or None,
        container_image=cluster.container or None,
        container_mounts=list(cluster.mounts),
        env_vars={name: shlex.quote(value) for name, value in environment.items()},
        additional_parameters=extra,
        srun_args=_srun_options(cluster, cores),
        setup_lines=SETUP,
        packager=run.PatternPackager(include_pattern=f"{package}/*", relative_path=str(package)),
        tunnel=_tunnel(run, cluster),
        retries=0,  # a retry would restart a job whatever the failure
        poll_estimated_start_time=False,
    )


def _srun_options(cluster: Cluster, cores: int) -> list[str]:
    """Return options that come after nemo-run's own and override them."""
    options = [] if cluster.container else [f"--chdir={cluster.workdir}"]
    if cluster.container and cluster.workdir:
        options.append(f"--container-workdir={cluster.workdir}")
    if cores:
        options.append(f"--cpus-per-task={cores}")  # new sruns do not inherit it
    return options


def _command(run: Any, cluster: Cluster, task: Task) -> Any:
    """Build the command of each task; nemo-run joins the words, so they are quoted here."""
    words = [f"{JOB_FOLDER}/code/{CONFIG_NAME}", *map(shlex.quote, task.overrides)]
    if cluster.launcher == "torchrun":
        return run.Script(f"{JOB_FOLDER}/code/{NODE_SCRIPT.name}", entrypoint="bash", args=words)
    words = ["megatron_sr1", "train", *words]
    return run.Script("-m", entrypoint=shlex.quote(cluster.interpreter), args=words)


def _tunnel(run: Any, cluster: Cluster) -> Any:
    if not cluster.tunnel:
        return run.LocalTunnel(job_dir="")  # below nemo-run's home, where it writes its scripts
    host, port = split_tunnel(cluster.tunnel)
    user, _, name = host.partition("@")
    identity = os.path.expanduser(cluster.identity) or None
    job_dir = cluster.logs or f"{cluster.workdir}/runs/slurm"
    return run.SSHTunnel(user=user, host=name, port=port, identity=identity, job_dir=job_dir)


def _nemo_run(home: str) -> Any:
    """Import nemo-run; it reads its directory from the environment at import time."""
    if home:
        os.environ["NEMORUN_HOME"] = home
    try:
        import nemo_run
    except ImportError as error:
        advice = "run `make launch-env` and start this with .venv-launch/bin/python"
        raise ConfigError(f"nemo-run cannot be imported ({error}); {advice}") from None
    return nemo_run


def check(cluster: Cluster, tasks: Sequence[Task]) -> dict[str, Config]:
    """Check everything that can be checked before a job is queued, or raise an SR1Error.

    Paths in a container are not checked, as its mounts may rename them. Return the resolved
    configurations, by the name of their task.
    """
    nodes, ranks = cluster.nodes, cluster.ranks_per_node
    if nodes < 1 or ranks < 1:
        advice = "give --gpus-per-node, or --tasks-per-node for a run on CPUs"
        raise ConfigError(f"nodes={nodes}, ranks a node={ranks}: expected 1 or more; {advice}")
    configs = {task.name: load_config(task.config, list(task.overrides)) for task in tasks}
    for name, config in configs.items():
        parts = config.parallel.replica_size
        if nodes * ranks % parts:
            copies = f"model copies of {parts} (parallel.tensor x pipeline x context)"
            raise ConfigError(f"{name}: {nodes} x {ranks} ranks do not divide into {copies}")
        if cluster.gpus_per_node and config.launch.device == "cpu":
            raise ConfigError(f"{name}: launch.device=cpu asks for no GPU; give --gpus-per-node=0")
    if not cluster.container and not cluster.tunnel:
        for task in tasks:
            with chdir(cluster.workdir or "."):
                preflight.check_paths(configs[task.name], has_model=not task.follows)
    _check_slurm(cluster)
    if cluster.container:
        _check_container(cluster)
    else:
        _check_there(cluster, tasks, configs)
    _check_names(cluster, tasks)
    return configs


def _check_slurm(cluster: Cluster) -> None:
    if run_there(cluster, "command -v sbatch").returncode:
        advice = "start from a login node, or through one with --tunnel user@host"
        raise ConfigError(f"no sbatch {_where(cluster)}; {advice}")
    problem = f"partition {cluster.partition!r} is not known to this Slurm; it has"
    names = cluster.partition.split(",")
    _check_known(cluster, problem, names, "sinfo --all --noheader --format=%R")
    problem = f"account {cluster.account!r} is not yours in this Slurm; yours are"
    command = 'sacctmgr --noheader --parsable2 show associations user="$(id -un)" format=account'
    _check_known(cluster, problem, [cluster.account.lower()], command)


def _check_known(cluster: Cluster, problem: str, names: Sequence[str], command: str) -> None:
    """Check names against those that a command of Slurm lists, if it lists any."""
    asked = run_there(cluster, command) if any(names) else None
    known = set(asked.stdout.split()) if asked and not asked.returncode else set()
    if known and not known.issuperset(names):
        raise ConfigError(f"{problem} {', '.join(sorted(known))}")


def _check_container(cluster: Cluster) -> None:
    image = cluster.container
    is_file = image.startswith(("/", ".", "~")) or image.endswith(".sqsh")
    if is_file and run_there(cluster, f"test -e {_path(cluster, image)}").returncode:
        raise ConfigError(f"container {image}: no such image file {_where(cluster)}")
    asked = run_there(cluster, "srun --help")
    if asked.returncode == 0 and "--container-image" not in asked.stdout:
        problem = "this Slurm's srun knows no --container-image"
        advice = "it needs the plugin pyxis, or run without --container"
        raise ConfigError(f"container {image}: {problem}; {advice}")


def _check_there(cluster: Cluster, tasks: Sequence[Task], configs: dict[str, Config]) -> None:
    """Check the interpreter and, through a tunnel, the paths of the configurations."""
    if run_there(cluster, f"command -v {shlex.quote(cluster.interpreter)}").returncode:
        advice = "make the training environment there (`make env`), or name one with --python"
        raise ConfigError(f"{cluster.interpreter}: no such program {_where(cluster)}; {advice}")
    for task in tasks if cluster.tunnel else ():
        paths = preflight.needed_paths(configs[task.name], has_model=not task.follows)
        for key, path in paths.items():
            is_hub = key == "model.path" and is_hub_name(path)  # the job downloads it
            if run_there(cluster, f"test -e {_path(cluster, path)}").returncode and not is_hub:
                raise ConfigError(f"{task.name}: {key}={path}: no such directory {_where(cluster)}")


def _check_names(cluster: Cluster, tasks: Sequence[Task]) -> None:
    """Refuse paths that contain JOB_FOLDER: without a container nemo-run substitutes it."""
    home = os.environ.get("NEMORUN_HOME", "")
    texts = [cluster.logs or home, cluster.workdir, cluster.interpreter]
    texts += [text for task in tasks for text in task.overrides]
    for text in texts:
        if JOB_FOLDER in text and not cluster.container:
            problem = f"nemo-run takes {JOB_FOLDER} in it for a name of its own"
            raise ConfigError(f"{text!r}: {problem}; use a path without it")


def _path(cluster: Cluster, path: str) -> str:
    """Quote a path for the cluster's shell; relative paths start in the working directory."""
    if path.startswith("~/"):
        return '"$HOME"/' + shlex.quote(path[2:])
    return shlex.quote(os.path.join(cluster.workdir, path))


def _where(cluster: Cluster) -> str:
    return f"on {cluster.tunnel}" if cluster.tunnel else "on this machine"
