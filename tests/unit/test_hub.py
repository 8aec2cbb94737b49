"""Models by their names on the hub: found in its cache, fixed to a commit, or one clear error."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from huggingface_hub import constants

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.cli import main
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import Config, ModelConfig
from megatron_sr1.errors import CheckpointError, ConfigError
from megatron_sr1.launch.preflight import check_paths, fix_commit
from megatron_sr1.runtime import hub
from megatron_sr1.runtime.device import stop_distributed
from tests.hub_files import add_snapshot
from tests.ranks import ROOT
from tools.convert_checkpoint import main as convert

NAME = "lab/Tiny-VL.v2"
OLD, NEW = "0" * 40, "1" * 40


@pytest.fixture
def home(tmp_path, tiny_model, monkeypatch):
    """HF_HOME with one model, in this process too, and a working directory without that path."""
    add_snapshot(tmp_path / "home", NAME, tiny_model, commit=OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    hub._find.cache_clear()
    yield tmp_path / "home"
    hub._find.cache_clear()


def move_main(home, tiny_model):
    """The publisher replaces the model by another; the next process sees it."""
    other = home / "other"
    shutil.copytree(tiny_model, other)
    (other / "generation_config.json").write_text("{}")
    add_snapshot(home, NAME, other, commit=NEW)
    hub._find.cache_clear()


def config(output="run", **model):
    return Config(output=output, model=ModelConfig(path=NAME, **model))


def test_a_hub_name_is_resolved_to_its_snapshot(home, tiny_model):
    found = resolve_model(NAME)
    assert (found.kind, found.weights, found.hf_files) == ("huggingface", *[found.weights] * 2)
    assert found.weights.name == OLD and found.weights.is_relative_to(home)
    for path in tiny_model.iterdir():
        assert (found.weights / path.name).read_bytes() == path.read_bytes()


def test_a_path_on_this_machine_comes_before_the_hub(home, tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is no model: looked for config.json"):
        resolve_model(NAME)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", True),
        ("runs/demo/hf", False),
        ("/models/qwen", False),
        ("./qwen", False),
        ("../qwen", False),
        ("qwen", False),
        ("a/b c", False),
    ],
)
def test_only_owner_and_name_are_a_hub_name(name, is_one):
    assert hub.is_hub_name(name) == is_one


def test_a_revision_is_a_branch_or_a_commit(home, tiny_model):
    move_main(home, tiny_model)
    add_snapshot(home, NAME, tiny_model, commit=OLD, ref="v1")
    found = {at: resolve_model(NAME, at).weights.name for at in ("main", "v1", OLD, NEW)}
    assert found == {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}


@pytest.mark.parametrize("name", ["lab/absent", NAME])
def test_offline_the_error_names_the_cache_and_what_to_download(home, name):
    with pytest.raises(ConfigError) as error:
        resolve_model(name, "v9")
    told = str(error.value)
    assert told.startswith(f"{name} at revision v9: not in the hub's cache {home}/hub, and HF_HUB_")
    assert told.endswith(f"this machine sees: hf download {name} --revision v9")


def test_without_a_network_it_is_one_clear_error_of_the_command_line(home, tmp_path):
    """Not in offline mode: the library tries an address that refuses the connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "megatron_sr1", "train", ROOT / "examples/digits_cpu.yaml"]
            + ["model.path=lab/absent"],
            env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": nowhere},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    absent = f"error: model.path=lab/absent: no such directory in {tmp_path}, and as a name on"
    assert absent in line and "and the hub cannot be reached; download it where" in line
    assert line.endswith("hf download lab/absent") and "Traceback" not in done.stderr


def test_a_run_fixes_the_commit_and_keeps_it_when_it_is_started_again(home, tmp_path, tiny_model):
    first = fix_commit(config())
    assert (first.model.commit, first.model.path) == (OLD, NAME)
    (tmp_path / "run").mkdir()
    saved = {"model": {"path": NAME, "revision": "main", "commit": OLD}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    move_main(home, tiny_model)
    assert fix_commit(config()).model.commit == OLD
    assert fix_commit(config(output="other")).model.commit == NEW
    assert fix_commit(config(revision=NEW)).model.commit == NEW
    afresh = replace(config(), checkpoint=replace(config().checkpoint, resume=False))
    assert fix_commit(afresh).model.commit == NEW
    for damaged in ("{", "[]", '{"model": null}', '{"model": {}}'):
        (tmp_path / "run" / "config.json").write_text(damaged)
        assert fix_commit(config()).model.commit == NEW


def test_a_local_model_has_no_commit(tiny_model):
    local = Config(model=ModelConfig(path=str(tiny_model)))
    assert fix_commit(local) is local


def test_the_checks_before_a_start_accept_a_hub_name(home, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").touch()
    started = replace(config(), data=replace(config().data, train="shards"))
    check_paths(started)
    with pytest.raises(CheckpointError, match="lab/none: no such directory.* hf download lab/none"):
        check_paths(replace(started, model=ModelConfig(path="lab/none")))


def test_a_dry_run_describes_a_hub_model_or_says_that_it_is_not_there(home, capsys):
    stop_distributed()  # other modules may leave a world of one
    example = str(ROOT / "examples/digits_cpu.yaml")
    assert main(["train", example, "--dry-run", f"model.path={NAME}"]) == 0
    out, err = capsys.readouterr()
    assert f"model       {NAME} at {OLD[:12]} (huggingface), " in out and "model.path" not in err
    assert main(["train", example, "--dry-run", "model.path=lab/none"]) == 0
    out, err = capsys.readouterr()
    assert "model       lab/none: does not exist, not checked" in out
    assert "model.path=lab/none: no such directory in" in err and "hf download lab/none" in err
    assert "model.path=lab/none does not exist: it was not checked" in err


def test_the_planner_reads_a_hub_models_configuration_without_torch(home):
    example = str(ROOT / "examples/digits_cpu.yaml")
    program = (
        "import sys; from megatron_sr1.cli import main\n"
        f"main(['plan', {example!r}, '--gpus', '8', '--gpu', 'h100', 'model.path={NAME}'])\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert f"model     {NAME}, " in done.stdout and done.stdout.endswith("[]\n"), done.stderr


def test_the_conversion_takes_a_hub_name(home, capsys):
    for options in (["--dry-run"], []):
        assert convert(["hf-to-megatron", NAME, "converted", *options]) == 0, (
            capsys.readouterr().err
        )
    assert resolve_model("converted").kind == "megatron"
    assert convert(["hf-to-megatron", "lab/none", "other"]) == 1
    assert capsys.readouterr().err.endswith("hf download lab/none\n")


@pytest.mark.slow
def test_training_from_a_hub_name_resumes_from_the_commit_that_it_began_with(
    home, tmp_path, tiny_model
):
    from megatron_sr1.demo.digits import make_digits

    make_digits(tmp_path / "data", 1, num_train=8, num_eval=8, num_cold_start=16)

    def train(steps):
        own = [f"model.path={NAME}", "output=run", "data.train=data/cold_start", "stage=sft"]
        own += [f"optimizer.num_steps={steps}", "launch.num_processes=2", "evaluation.sets="]
        own += ["data.prompts_per_step=8"]
        command = [sys.executable, "-m", "megatron_sr1", "train"]
        done = subprocess.run(
            [*command, ROOT / "examples/digits_cpu.yaml", *own],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return load_config(None, [f"model.{k}={v}" for k, v in saved().items() if k == "path"])

    def saved():
        return json.loads((tmp_path / "run" / "config.json").read_text())["model"]

    train(1)
    assert (saved()["path"], saved()["commit"]) == (NAME, OLD)
    move_main(home, tiny_model)
    train(2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert saved()["commit"] == OLD and [json.loads(t)["step"] for t in lines] == [1, 2]
