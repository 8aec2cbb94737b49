"""A real Slurm of two nodes on this machine's loopback, in a folder of its own.

The daemons are this process's children, in the foreground, on free ports, so that `stop` ends what
was started and nothing else. Nodes are named by addresses of the loopback, which resolve.
"""

import os
import secrets
import socket
import subprocess
import time
from pathlib import Path

from tests import debian
from tests.ranks import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("127.0.0.1", "127.0.0.2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=10
MessageTimeout=60
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def missing() -> str:
    """Why no Slurm can be started here; "" if one can. Installs it once, where it may."""
    if os.getuid() != 0:
        return "Slurm's daemons start jobs as root only, and this is another user"
    return debian.missing(PROGRAMS, ("slurm-wlm", "munge"), seconds=300)


class SlurmHere:
    """Controller, two nodes and munge, from `start` to `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.more_config = ""
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        munge = self.folder / "munge"
        for name in ("munge", "state", *(f"spool_{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        (munge / "key").touch(mode=0o400)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        values = {"folder": self.folder, "ports": free_ports(3), "nodes": NODES}
        text = CONFIG.format(host=host_name(), **values) + self.more_config
        (self.folder / "slurm.conf").write_text(text)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid"}
        files |= {"log-file": "log", "seed-file": "seed"}
        self.start_daemon(
            "munged", "-F", *(f"--{flag}={munge / name}" for flag, name in files.items())
        )
        until(lambda: (munge / "socket").exists(), 10, "munged made no socket")
        self.start_accounts()
        self.start_daemon("slurmctld", "-D")
        for node in NODES:
            self.start_daemon("slurmd", "-D", "-N", node)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        until(lambda: self.run(*idle, check=False).stdout.strip() == "2", 60, "nodes not idle")

    def start_daemon(self, *argv: str) -> None:
        """Start a child that `stop` ends."""
        log = open(self.folder / f"{Path(argv[0]).name}_{len(self._daemons)}.out", "w")
        daemon = subprocess.Popen(
            argv, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )
        self._daemons.append(daemon)

    def start_accounts(self) -> None:
        """Nothing: this Slurm has no accounts."""

    def run(self, *argv: str, check: bool = True, **more) -> subprocess.CompletedProcess:
        """Run a program that talks to this Slurm."""
        done = subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=300, **more
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol` knows of a job."""
        line = self.run("scontrol", "show", "job", "--oneliner", number).stdout
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """The job after its end, however it ended."""
        return self.wait_until(number, seconds, lambda job: job["JobState"] in ENDED)

    def wait_until(self, number: str, seconds: float, holds) -> dict[str, str]:
        """The job once `holds(job)`, which must be before its end or with it."""
        end = time.monotonic() + seconds
        while not holds(job := self.job(number)):
            state = job["JobState"]
            assert state not in ENDED and time.monotonic() < end, f"job {number} is {state}"
            time.sleep(0.5)
        return job

    def stop(self) -> None:
        """Cancel the jobs and end the daemons."""
        if len(self._daemons) > 1:
            self.run("scancel", "--user=root", check=False)
            queue = ["squeue", "--noheader"]
            end = time.monotonic() + 30
            while self.run(*queue, check=False).stdout and time.monotonic() < end:
                time.sleep(0.5)
        for daemon in reversed(self._daemons):  # each after those that use it
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def host_name() -> str:
    """As Slurm wants it."""
    return socket.gethostname().split(".")[0]


def until(holds, seconds: float, otherwise: str) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, otherwise
        time.sleep(0.1)
