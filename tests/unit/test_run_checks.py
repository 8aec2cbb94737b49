"""A start and a dry run refuse the same things, before any process starts, in one line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sr1 import cli, parser
from megatron_sr1.cli import main
from megatron_sr1.data.examples import Record
from megatron_sr1.data.shards import write_shards
from megatron_sr1.records import Message
from megatron_sr1.runtime.device import stop_distributed

pytestmark = pytest.mark.field
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "tests" / "published" / "qwen25vl_3b.json"
NOT_TORCH = (
    "import sys\nfrom megatron_sr1.cli import main\n"
    "status = main(sys.argv[1:])\n"
    "print([m for m in ('torch', 'transformers', 'megatron.core') if m in sys.modules])\n"
    "sys.exit(status)\n"
)


def records(number, answer="7", roles=("user",)):
    turns = tuple(Message(role, f"{role} {number}") for role in roles)
    return [Record(turns, answer, (), {}) for _ in range(number)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model's shape with a file of weights, 20 questions, 20 conversations.

    Other modules leave a world of one in this process; the commands here start without one.
    """
    stop_distributed()
    folder = tmp_path_factory.mktemp("made")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(PUBLISHED.read_text())
    (folder / "model" / "model.safetensors").touch()
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_text(PUBLISHED.read_text())
    write_shards(records(20), folder / "questions")
    write_shards(records(20, None, ("user", "assistant")), folder / "talks")
    (folder / "run.yaml").write_text(
        f"model: {{path: {folder / 'model'}}}\ndata: {{train: {folder / 'questions'}, "
        "prompts_per_step: 8}\nalgorithm: {prompts_per_update: 8}\nlaunch: {device: cpu}\n"
    )
    return folder


@pytest.fixture
def started(monkeypatch):
    """What a start would have run; the ranks themselves do not start."""
    calls = []
    rank = contextlib.nullcontext((lambda config, groups: calls.append(config) or 0, None))
    monkeypatch.setattr(cli, "one_rank", lambda config: rank)
    monkeypatch.setattr("megatron_sr1.launch.torchrun.run", lambda *a: calls.append(a) or 0)
    monkeypatch.setattr("megatron_sr1.launch.torchrun.rank_environment", lambda *a: {})
    return calls


@pytest.fixture
def refused(made, tmp_path, capsys, started):
    """The one line with which both ways refuse overrides."""

    def refused_by_both(*overrides):
        command = ["train", str(made / "run.yaml"), f"output={tmp_path / 'run'}", *overrides]
        lines = []
        for argv in ([*command, "--dry-run"], command):
            assert main(argv) == 2
            said = capsys.readouterr()
            assert said.out == ""
            lines += said.err.splitlines()
        assert len(lines) == 2 and lines[0] == lines[1] and not started
        assert not (tmp_path / "run").exists()
        return lines[0].removeprefix("megatron-sr1: error: ")

    return refused_by_both


def test_a_step_of_more_prompts_than_there_are_samples(refused):
    line = refused("data.prompts_per_step=32", "algorithm.prompts_per_update=32")
    assert "data.prompts_per_step=32" in line and "has 20 samples" in line
    assert "set data.prompts_per_step=20 or less" in line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.train={made}/talks"], "no gold answer"),
        (["stage=sft"], "no assistant turn to learn from"),
        (["stage=eval", "evaluation.sets.a.path={made}/talks"], "no gold answer"),
        (["stage=eval"], "evaluation.sets is empty"),
        (["data.train="], "data.train is not set"),
        (["parallel.tensor=2", "launch.num_processes=3"], "a multiple of 2 ranks"),
        (["rollout.tensor_parallel=2", "launch.num_processes=1"], "does not divide the 1 ranks"),
        (["rollout.tensor_parallel=3", "launch.num_processes=3"], "num_attention_heads is 16"),
        (["parallel.tensor=4", "launch.num_processes=4"], "num_key_value_heads is 2"),
        (
            ["parallel.pipeline=5", "launch.num_processes=5"],
            "36 layers do not divide over parallel.pipeline=5",
        ),
        (["rollout.max_model_len=200000"], "max_position_embeddings of the model is 128000"),
        (["model.freeze=['^vision[.]']"], "matches no parameter"),
        (["model.freeze=['(']"], "is no regular expression"),
        (["rollout.canary_bound=1e-3"], "needs a sample with an image"),
        (["reward.function={made}/none.py:f"], "no file"),
        (["reward.function={made}/run.yaml:f"], "expected FILE.py:NAME"),
    ],
)
def test_conflicts_between_shards_and_configuration(refused, made, overrides, said):
    assert said in refused(*(text.format(made=made) for text in overrides))


def test_an_output_that_cannot_be_created(refused, made, tmp_path):
    file = made / "run.yaml"
    assert f"lies below {file}, which is a file" in refused(f"output={file}/below/run")
    assert "is a file" in refused(f"output={file}")
    assert "not a valid directory name" in refused(f"output={tmp_path}/{'x' * 300}")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert "is a file" in refused(f"output={tmp_path}/gone/run")
    assert "cannot be written to" in refused("output=/proc/sys/run")


def test_an_output_that_holds_another_run(refused, made, tmp_path):
    (tmp_path / "old" / "checkpoints" / "step_2").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "step_2" / "state.json").write_text("{}")
    output = f"output={tmp_path / 'old'}"
    assert "holds a training run" in refused(
        output, "stage=eval", f"evaluation.sets.a.path={made / 'questions'}"
    )
    assert "up to step 2" in refused(output, "checkpoint.resume=false")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (None, b"[]", "expected a JSON object, got list"),
        (None, b"\xff", "not JSON"),
        ("model_type", "llama", "only 'qwen2_5_vl' is supported"),
        ("hidden_size", "wide", "a value of the wrong kind"),
        ("num_attention_heads", 0, "a value of the wrong kind"),
        ("rope_scaling", [1], "a value of the wrong kind"),
        ("vision_config", 5, "a value of the wrong kind"),
    ],
)
def test_a_config_json_that_describes_no_model(refused, tmp_path, key, value, said):
    raw = json.loads(PUBLISHED.read_text())
    (tmp_path / "model.safetensors").touch()
    data = value if key is None else json.dumps(raw | {key: value}).encode()
    (tmp_path / "config.json").write_bytes(data)
    line = refused(f"model.path={tmp_path}")
    assert line.startswith(f"{tmp_path / 'config.json'}: ") and said in line


def test_a_damaged_first_sample_is_a_warning_and_the_run_starts(made, tmp_path, capsys, started):
    write_shards([*records(1, None), *records(9)], tmp_path / "mixed")
    command = ["train", str(made / "run.yaml"), f"data.train={tmp_path / 'mixed'}"]
    for argv in ([*command, "--dry-run"], [*command, f"output={tmp_path / 'run'}"]):
        assert main(argv) == 0
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith("megatron-sr1: warning: ") and "no gold answer" in warning
    assert len(started) == 1


def dry_run(capsys, *argv):
    assert main(["train", *argv, "--dry-run"]) == 0
    said = capsys.readouterr()
    return said.out, said.err.splitlines()


def test_a_typo_in_a_path_is_a_warning_at_the_end(made, capsys):
    typos = ["model.path=nowhere", "data.train=tarin", "evaluation.sets.a.path=evla"]
    _, warnings = dry_run(capsys, str(made / "run.yaml"), *typos)
    assert len(warnings) == 3
    for typo, warning in zip(sorted(typos), sorted(warnings), strict=True):
        assert warning.startswith(f"megatron-sr1: warning: {typo} does not exist")


def test_more_ranks_than_cores_are_a_warning(made, capsys, started, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    many = [str(made / "run.yaml"), "launch.num_processes=4", f"output={tmp_path / 'run'}"]
    _, warnings = dry_run(capsys, *many, f"model.path={made / 'shape'}")
    assert any("launch.num_processes=4, but this machine has 2 cores" in w for w in warnings)
    assert main(["train", *many]) == 0 and len(started) == 1
    assert "this machine has 2 cores" in capsys.readouterr().err
    _, warnings = dry_run(capsys, str(made / "run.yaml"), "model.path=x", "launch.num_processes=2")
    assert not any("cores" in w for w in warnings)


@pytest.mark.parametrize("model", ["nowhere", "shape"])
def test_a_dry_run_without_weights_takes_no_torch_and_no_seconds(made, model):
    argv = ["train", str(made / "run.yaml"), "--dry-run", f"model.path={made / model}"]
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", NOT_TORCH, *argv], capture_output=True, text=True, cwd=ROOT
    )
    after = os.times()
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert after.children_user - before.children_user < 3
    if model == "shape":  # the number that test_dry_run.py compares with Megatron's classes
        assert "3,754,622,976 parameters" in done.stdout and "on each rank" in done.stdout
        assert "holds no weights" in done.stderr


def test_version_is_the_packages_and_every_command_describes_itself(capsys):
    def said(*argv):
        with pytest.raises(SystemExit, match="0"):
            parser.parse(argv)
        return capsys.readouterr().out

    assert said("--version") == f"megatron-sr1 {parser.VERSION}\n"
    assert f'version="{parser.VERSION}"' in (ROOT / "setup.py").read_text()
    for command in ("demo", "report", "doctor", *parser.RUN_COMMANDS, "plan"):
        usage, description, *_ = said(command, "--help").split("\n\n")
        assert usage.startswith("usage:") and len(description) > 80, command


# Real processes in place of the ranks: they save what they are told to, and wait.
INTERRUPTED = """
import contextlib
import sys
from megatron_sr1 import cli
from megatron_sr1.launch import torchrun
rank = '''
import time
from pathlib import Path
latest = Path({latest!r})
if {saves}:
    latest.parent.mkdir(parents=True)
    latest.write_text("step_40")
print("up", flush=True)
time.sleep(60)
'''
torchrun.build_command = lambda arguments, num_ranks: [sys.executable, "-c", rank]
stage = lambda config, groups: exec(rank)
cli.one_rank = lambda config: contextlib.nullcontext((stage, None))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("num_ranks", "saves"), [(1, True), (2, True), (2, False)])
def test_ctrl_c_says_what_was_saved_and_how_to_continue(made, tmp_path, num_ranks, saves):
    latest = tmp_path / "run" / "checkpoints" / "latest"
    program = INTERRUPTED.format(latest=str(latest), saves=saves)
    command = [sys.executable, "-c", program, "train", str(made / "run.yaml")]
    process = subprocess.Popen(
        [*command, f"output={tmp_path / 'run'}", f"launch.num_processes={num_ranks}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "up\n"
    time.sleep(0.2)  # the launcher installs its handler after the start of the ranks
    os.killpg(process.pid, signal.SIGINT)
    line = process.communicate(timeout=30)[1].splitlines()[-1]
    assert process.returncode == 130 and line.startswith("megatron-sr1: interrupted; ")
    if saves:
        assert f"{latest.parent}/step_40 is saved, the same command continues from it" in line
    else:
        assert "nothing was saved yet (checkpoint.every_steps=20)" in line
