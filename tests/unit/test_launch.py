"""Starting ranks: commands, environments, exit statuses."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import LaunchConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.launch import torchrun

STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
}


def test_a_process_without_a_launcher_is_no_rank():
    assert torchrun.joined({}) is None


def test_torchruns_variables_are_used_as_they_are():
    ready = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert torchrun.joined(ready | STEP) == {}


def test_half_of_torchruns_variables_is_an_error():
    with pytest.raises(ConfigError, match="WORLD_SIZE is not set"):
        torchrun.joined({"RANK": "0"})


def test_a_step_of_srun_becomes_ranks():
    found = torchrun.joined(STEP)
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "22345",
    }


def test_all_tasks_of_a_step_find_the_same_address():
    addresses = set()
    for task in range(4):
        found = torchrun.joined(STEP | {"SLURM_PROCID": str(task)})
        addresses.add((found["MASTER_ADDR"], found["MASTER_PORT"]))
    assert len(addresses) == 1


def test_a_batch_script_is_no_step():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    assert torchrun.joined(batch) is None
    assert torchrun.joined(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-006,009]", "gpu003"),
        ("gpu[7,9]-ib,login1", "gpu7-ib"),
        ("a-1,b[2-3]", "a-1"),
    ],
)
def test_the_first_node_of_slurms_list(nodes, first):
    assert torchrun.first_node(nodes) == first


def test_the_command_runs_the_package_on_each_rank():
    command = torchrun.build_command(["train", "a.yaml", "seed=2"], 4)
    assert command[:3] == [sys.executable, "-m", "megatron_sr1.launch.torchrun"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert command[-5:] == ["-m", "megatron_sr1", "train", "a.yaml", "seed=2"]


def test_cores_are_divided_between_the_ranks():
    assert torchrun.num_processes(LaunchConfig(device="cpu")) == 1
    assert torchrun.num_processes(LaunchConfig(device="cpu", num_processes=3)) == 3
    cores = len(os.sched_getaffinity(0))
    shared = torchrun.rank_environment(LaunchConfig(), 2)
    assert shared["OMP_NUM_THREADS"] == str(max(cores // 2, 1))
    assert torchrun.rank_environment(LaunchConfig(threads=1), 2) == {"OMP_NUM_THREADS": "1"}


def test_ranks_on_a_cpu_have_huge_pages_unless_the_user_sets_otherwise(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    on_cpu = torchrun.rank_environment(LaunchConfig(threads=1, device="cpu"), 2)
    assert on_cpu == {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    on_cpu = torchrun.rank_environment(LaunchConfig(threads=1, device="cpu"), 2)
    assert on_cpu == {"OMP_NUM_THREADS": "1"}


def test_idle_threads_spin_unless_the_user_sets_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    expected = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}
    assert torchrun.rank_environment(LaunchConfig(threads=5), 2) == expected
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert torchrun.rank_environment(LaunchConfig(threads=5), 2) == {"OMP_NUM_THREADS": "5"}


PROGRAM = """
import sys, time
sys.argv = ["megatron-sr1"]
from megatron_sr1.launch import torchrun
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import LaunchConfig
torchrun.build_command = lambda arguments, num_ranks: [sys.executable, "-c", {rank!r}]
sys.exit(torchrun.run(["train"], LaunchConfig(threads=1), 1))
"""


def launcher(rank: str) -> subprocess.Popen:
    program = PROGRAM.format(rank=textwrap.dedent(rank))
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_the_exit_status_is_passed_on():
    assert launcher("import sys; sys.exit(7)").wait(timeout=30) == 7


def test_sigterm_reaches_the_ranks():
    process = launcher("import time; print('up', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "up\n"
    time.sleep(0.2)  # the launcher installs its handler after the start of the ranks
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_ranks_that_save_on_sigterm_are_not_killed_after_30_seconds(capfd, monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    rank = "import os; print(os.environ.get('TORCH_ELASTIC_SHUTDOWN_TIMEOUT'))"
    monkeypatch.setattr(torchrun, "build_command", lambda *_: [sys.executable, "-c", rank])
    for saves, expected in ((True, torchrun.SHUTDOWN_SECONDS), (False, "None")):
        torchrun.run([], LaunchConfig(threads=1, save_on_sigterm=saves), 1)
        assert capfd.readouterr().out.strip() == expected


@pytest.mark.field
def test_a_rank_that_is_killed_before_it_reports_is_named(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text("import os\nos.kill(os.getpid(), 9)\n")
    command = [sys.executable, "-m", "megatron_sr1.launch.torchrun", "--standalone", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stderr == "megatron-sr1: rank 0 was ended by SIGKILL\n"
    assert done.returncode == 128 + signal.SIGKILL


@pytest.mark.field
def test_only_the_first_rank_of_a_machine_reports_a_common_error(tmp_path):
    ranks = tmp_path / "ranks.py"
    program = "import sys\nfrom megatron_sr1 import cli\n"
    ranks.write_text(program + "sys.exit(cli.main(['train', 'not_there.yaml']))\n")
    command = [sys.executable, "-m", "megatron_sr1.launch.torchrun", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "3", str(ranks)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr == "megatron-sr1: error: not_there.yaml: no such configuration file\n"


@pytest.mark.field
def test_launch_device_cpu_hides_gpus_before_a_rank_imports_torch(tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"stage: sft\noutput: {tmp_path / 'run'}\nlaunch: {{device: cpu}}\nmodel: {{path: m}}\n"
    )
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    program = "import os, sys\nfrom megatron_sr1 import cli\n"
    program += "def one_rank(config):\n"
    program += (
        "    assert os.environ['CUDA_VISIBLE_DEVICES'] == '' and 'torch' not in sys.modules\n"
    )
    program += "    sys.exit(7)\n"
    program += f"cli.one_rank = one_rank\nsys.exit(cli.main(['train', {str(config)!r}]))"
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | rank
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["launch.device=cpu", "parallel.tensor=2"], {"CUDA_VISIBLE_DEVICES": ""}),
        (["parallel.tensor=2"], {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        (["parallel.context=2"], {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        (["parallel.pipeline=2"], {}),
        (["parallel.tensor=2", "stage=eval"], {}),  # has no actor
    ],
)
def test_ranks_that_send_activations_have_one_queue_to_the_gpu(settings, expected, monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    config = load_config(None, ["model.path=m", "stage=sft", *settings])
    assert torchrun.cuda_environment(config) == expected
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in torchrun.cuda_environment(config)
