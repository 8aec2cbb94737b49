"""Check a submission before anything is queued, with one clear error message.

In: a `Cluster` and its `Task`s. The cluster's own tools are queried, through `ssh` if there is a
tunnel. A check is skipped if its tool gives no answer: Slurm without accounting knows no accounts.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError
from megatron_sr1.launch import preflight
from megatron_sr1.launch.cluster import Cluster, Task

ANSWER_SECONDS = 60
CONNECT_SECONDS = 10


def check(cluster: Cluster, tasks: Sequence[Task]) -> dict[str, Config]:
    """Check everything that can be checked before a job is queued.

    Paths in a container are not checked, as its mounts may rename them.

    Args:
        cluster: where the jobs would run.
        tasks: in the order in which they run.

    Returns:
        the resolved configuration of each task, by its name.

    Raises:
        SR1Error: what is wrong, in one line.
    """
    if cluster.nodes < 1 or cluster.ranks_per_node < 1:
        raise ConfigError(
            f"nodes={cluster.nodes}, ranks a node={cluster.ranks_per_node}: expected 1 or more; "
            "give --gpus-per-node, or --tasks-per-node for a run on CPUs"
        )
    configs = {task.name: load_config(task.config, list(task.overrides)) for task in tasks}
    for name, config in configs.items():
        _check_layout(cluster, name, config)
    if not cluster.container and not cluster.tunnel:
        for task in tasks:
            config = _based(configs[task.name], Path(cluster.workdir))
            preflight.check_paths(config, has_model=not task.follows)
    _check_reachable(cluster)
    _check_partition(cluster)
    _check_account(cluster)
    if cluster.container:
        _check_container(cluster)
    else:
        _check_there(cluster, tasks, configs)
    return configs


def run_there(cluster: Cluster, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on the cluster's login node.

    Args:
        cluster: whose tunnel is used.
        command: shell command.

    Raises:
        ConfigError: the tunnel cannot be reached, or there is no answer within a minute.
    """
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
        where = cluster.tunnel or "this machine"
        raise ConfigError(
            f"{where}: no answer to `{command}` in {ANSWER_SECONDS} s; is Slurm up?"
        ) from None
    except FileNotFoundError:
        raise ConfigError(f"{argv[0]} is not installed here; a tunnel needs it") from None
    if cluster.tunnel and done.returncode == 255:  # ssh's own status
        raise ConfigError(
            f"tunnel {cluster.tunnel} cannot be reached: {_last_line(done.stderr)}; try "
            f"`ssh {cluster.tunnel}` (it must work with a key, without a password)"
        )
    return done


def split_tunnel(tunnel: str) -> tuple[str, int | None]:
    """Split a tunnel into user@host and the port, None if not given.

    Raises:
        ConfigError: no user, or a port that is not a number.
    """
    host, colon, port = tunnel.partition(":")
    if not all(host.partition("@")) or (colon and not port.isdecimal()):
        raise ConfigError(f"tunnel {tunnel!r}: expected user@host or user@host:port")
    return host, int(port) if port else None


def _based(config: Config, workdir: Path) -> Config:
    """The configuration with the paths that a rank started in `workdir` would see."""

    def below(path: str) -> str:
        return str(workdir / path) if path else ""

    return replace(
        config,
        output=below(config.output),
        model=replace(config.model, path=below(config.model.path)),
        data=replace(config.data, train=below(config.data.train), eval=below(config.data.eval)),
    )


def _check_layout(cluster: Cluster, name: str, config: Config) -> None:
    num_ranks = cluster.nodes * cluster.ranks_per_node
    parts = config.parallel.replica_size
    if num_ranks % parts:
        raise ConfigError(
            f"{name}: {cluster.nodes} x {cluster.ranks_per_node} ranks do not divide into model "
            f"copies of {parts} (parallel.tensor x pipeline x context)"
        )
    if cluster.gpus_per_node and config.launch.device == "cpu":
        raise ConfigError(f"{name}: launch.device=cpu asks for no GPU; give --gpus-per-node=0")


def _check_reachable(cluster: Cluster) -> None:
    if run_there(cluster, "command -v sbatch").returncode:
        where = f"on {cluster.tunnel}" if cluster.tunnel else "on this machine"
        raise ConfigError(
            f"no sbatch {where}; start from a login node, or through one with --tunnel user@host"
        )


def _check_partition(cluster: Cluster) -> None:
    if not cluster.partition:
        return
    asked = run_there(cluster, "sinfo --all --noheader --format=%R")
    known = set(asked.stdout.split())
    if asked.returncode == 0 and known and not known.issuperset(cluster.partition.split(",")):
        raise ConfigError(
            f"partition {cluster.partition!r} is not known to this Slurm; it has "
            f"{', '.join(sorted(known))}"
        )


def _check_account(cluster: Cluster) -> None:
    if not cluster.account:
        return
    asked = run_there(
        cluster,
        'sacctmgr --noheader --parsable2 show associations user="$(id -un)" format=account',
    )
    known = set(asked.stdout.split())
    if asked.returncode == 0 and known and cluster.account.lower() not in known:
        raise ConfigError(
            f"account {cluster.account!r} is not yours in this Slurm; yours are "
            f"{', '.join(sorted(known))}"
        )


def _check_container(cluster: Cluster) -> None:
    image = cluster.container
    is_file = image.startswith(("/", ".", "~")) or image.endswith(".sqsh")
    if is_file and run_there(cluster, f"test -e {_path(cluster, image)}").returncode:
        raise ConfigError(f"container {image}: no such image file {_where(cluster)}")
    asked = run_there(cluster, "srun --help")
    if asked.returncode == 0 and "--container-image" not in asked.stdout:
        raise ConfigError(
            f"container {image}: this Slurm's srun knows no --container-image; it needs the plugin "
            "pyxis, or run without --container"
        )


def _check_there(cluster: Cluster, tasks: Sequence[Task], configs: dict[str, Config]) -> None:
    """Check the interpreter and, through a tunnel, the paths of the configurations."""
    if run_there(cluster, f"command -v {shlex.quote(cluster.interpreter)}").returncode:
        raise ConfigError(
            f"{cluster.interpreter}: no such program {_where(cluster)}; make the training "
            "environment there (`make env`), or name its python with --python"
        )
    if not cluster.tunnel:
        return
    for task in tasks:
        config = configs[task.name]
        paths = {"data.train": config.data.train, "data.eval": config.data.eval}
        if not task.follows:
            paths["model.path"] = config.model.path
        for key, path in paths.items():
            if path and run_there(cluster, f"test -e {_path(cluster, path)}").returncode:
                raise ConfigError(f"{task.name}: {key}={path}: no such folder {_where(cluster)}")


def _path(cluster: Cluster, path: str) -> str:
    """Quote a path for the cluster's shell; relative paths start in the working directory."""
    if path.startswith("~/"):
        return '"$HOME"/' + shlex.quote(path[2:])
    return shlex.quote(os.path.join(cluster.workdir, path))


def _where(cluster: Cluster) -> str:
    return f"on {cluster.tunnel}" if cluster.tunnel else "on this machine"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1].strip()
