"""The runner of tools/gpu_check.py, with checks that misbehave, and its checks on a CPU."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sr1.gpu_checks import attention, kernels, numerics, registry, training
from megatron_sr1.gpu_checks.bench import PUBLISHED, Bench
from megatron_sr1.gpu_checks.rows import Row, at_least, at_most, fact
from megatron_sr1.gpu_checks.runner import LEAST_SECONDS, Runner
from tests.ranks import ROOT

PACKAGE = ROOT / "megatron_sr1" / "gpu_checks"
BAD = "tests.gpu_check_cases"


@pytest.fixture
def run(tmp_path):
    """Run checks that misbehave; returns rows by check, and the file."""

    def run(*chosen, minutes=5.0):
        output = tmp_path / "table.json"
        runner = Runner("cpu", tmp_path, output, minutes, lambda row: None, registry=BAD)
        found = {}
        for row in runner.run(chosen):
            found.setdefault(row.check, []).append(row)
        return found, json.loads(output.read_text())

    return run


def test_a_check_that_raises_crashes_or_spoils_the_device_is_a_row_and_the_others_go_on(run):
    found, table = run(
        *("good", "raises", "too large", "crashes", "after a crash", "spoils", "after spoiling"),
        *("same process", "other session"),
    )
    statuses = {name: [row.status for row in rows] for name, rows in found.items()}
    assert statuses == {
        "good": ["info", "ok"],
        "raises": ["info", "ERROR"],
        "too large": ["info", "FAIL"],
        "crashes": ["info", "ERROR"],
        "after a crash": ["info"],
        "spoils": ["info", "ERROR"],
        "after spoiling": ["info"],
        "same process": ["info"],
        "other session": ["info"],
    }
    assert found["raises"][1].note == "ValueError: first line"
    assert found["raises"][1].meaning == "what raises means"
    assert "-11" in found["crashes"][1].note  # SIGSEGV
    processes = {name: rows[0].value for name, rows in found.items()}
    assert processes["after a crash"] == processes["spoils"]
    assert processes["spoils"] != processes["after spoiling"] == processes["same process"]
    assert processes["other session"] != processes["same process"]
    assert table["finished"] and len(table["rows"]) == sum(map(len, found.values()))
    assert os.getpid() not in processes.values()


def test_a_missing_library_and_too_little_time_are_rows_that_say_so(run):
    found, _ = run("without library", "long", "good")
    assert found["without library"][0].status == found["long"][0].status == "skipped"
    assert found["without library"][0].note == "not installed: no_such_library"
    assert "3600" in found["long"][0].note
    assert found["good"][1].status == "ok"


def test_the_time_limit_stops_a_check_and_keeps_its_rows(run):
    started = time.monotonic()
    found, _ = run("hangs", "good", minutes=6 / 60)
    assert time.monotonic() - started < 15
    assert [row.status for row in found["hangs"]] == ["info", "skipped"]
    assert "time limit" in found["hangs"][1].note


def test_a_check_that_hangs_is_stopped_and_the_next_one_runs(run, monkeypatch):
    monkeypatch.setitem(LEAST_SECONDS, "cpu", 4.0)
    found, _ = run("hangs", "good", "process")
    assert found["hangs"][1].status == "ERROR" and "too long" in found["hangs"][1].note


def test_a_kill_loses_no_row_and_leaves_no_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from megatron_sr1.gpu_checks.runner import Runner\n"
        f"Runner('cpu', Path({str(tmp_path)!r}), Path({str(tmp_path / 't.json')!r}), 5.0,"
        f" lambda row: print(row.line(), flush=True), registry={BAD!r})"
        ".run(['same process', 'hangs'])"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    worker = int(float(process.stdout.readline().split(": ")[-1].replace(",", "")))
    assert "before" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    table = json.loads((tmp_path / "t.json").read_text())
    assert [row["check"] for row in table["rows"]] == ["same process", "hangs"]
    assert table["running"] == "hangs" and not table["finished"]
    until = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < until, "the worker outlives the run"
        time.sleep(0.1)


def test_limits_count_nan_as_a_failure_and_json_has_no_nan():
    nan = float("nan")
    assert at_most("x", nan, 1.0, "").is_bad and at_least("x", nan, 1.0, "").is_bad
    assert not at_most("x", 1.0, 1.0, "").is_bad and at_least("x", 0.9, 1.0, "").is_bad
    assert at_most("x", nan, 1.0, "").as_json()["value"] == "nan"
    assert Row(**at_most("x", 0.5, 1.0, "").as_json()) == at_most("x", 0.5, 1.0, "")
    assert not fact("x", nan).is_bad
    line = at_most("x", 2.0, 1.0, "turn it off", "s").line()
    assert "FAIL" in line and "2 s" in line and line.endswith("-> turn it off")


def test_each_check_names_a_function_that_is_there():
    names = [check.name for check in registry.CHECKS]
    assert len(set(names)) == len(names)
    for check in registry.CHECKS:
        module, function = check.function.split(":")
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        (found,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
        assert len(found.args.args) == 1 + len(check.arguments)
        assert check.meaning and check.seconds > 0


def test_checks_of_the_actor_need_no_library_beside_torch_transformers_and_megatron():
    """Those that machines with a borrowed GPU lack; the parent does without torch, too."""
    program = """
import sys
class Missing:
    names = {"vllm", "omegaconf", "math_verify", "openai", "optimi", "transformer_engine"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import megatron_sr1.gpu_checks.runner, megatron_sr1.gpu_checks.worker
assert not {"torch", "megatron", "numpy"} & sys.modules.keys()
from megatron_sr1.gpu_checks import attention, device, numerics, ranks, training, engine
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def bench(groups, tmp_path_factory):
    made = Bench("cpu", tmp_path_factory.mktemp("bench"))
    made.groups = groups  # there can be only one set of them in a process
    return made


def statuses(rows):
    return {row.name: row.status for row in rows}


def test_the_actor_is_as_near_to_transformers_as_the_limits_ask(bench):
    found = statuses(numerics.actor(bench))
    assert len(found) == 4 and set(found.values()) == {"ok"}


def test_an_actor_with_a_wrong_norm_fails(bench, monkeypatch):
    monkeypatch.setattr(
        "megatron_sr1.model.layers.RMSNorm.forward", lambda self, x: x * self.weight
    )
    found = statuses(numerics.actor(bench))
    assert set(found.values()) == {"FAIL"}


def test_attention_is_compared_with_its_definition(bench, monkeypatch):
    right = statuses(attention.packed_rows(bench))
    compared = {name for name, status in right.items() if status != "info"}
    assert len(compared) == 8 and {right[name] for name in compared} == {"ok"}

    def without_mask(q, k, v, plan):
        return attend(q, k, v, replace(plan, is_causal=False))

    attend = attention.attend
    monkeypatch.setattr(attention, "attend", without_mask)
    wrong = statuses(attention.packed_rows(bench))
    failed = {name for name in compared if wrong[name] == "FAIL"}
    assert failed == {"text: result", "text: gradients"}


def test_a_step_is_measured_and_another_setting_computes_the_same(bench):
    rows = list(training.step(bench))
    assert not any(row.is_bad for row in rows)
    shares = {row.name: row.value for row in rows if row.name.startswith("share of ")}
    assert {"share of products", "share of attention"} <= shares.keys()
    again = list(training.variant(bench, "model.recompute=full"))
    assert statuses(again)["first loss, off the default's"] == "ok"
    bench.known["loss"] *= 1.1
    rows = training.variant(bench, "optimizer.gradients=bfloat16")
    assert statuses(rows)["first loss, off the default's"] == "FAIL"


def test_the_models_widths_are_those_of_the_published_3b():
    raw = json.loads((ROOT / "tests" / "published" / "qwen25vl_3b.json").read_text())
    few = {"num_hidden_layers", "depth", "fullatt_block_indexes", "max_position_embeddings"}
    text = {k: v for k, v in PUBLISHED.text.items() if k not in few | {"rope_parameters"}}
    vision = {k: v for k, v in PUBLISHED.vision.items() if k not in few}
    assert text == {name: raw[name] for name in text}
    assert vision == {name: raw["vision_config"][name] for name in vision}
    rope = PUBLISHED.text["rope_parameters"]
    assert rope["mrope_section"] == raw["rope_scaling"]["mrope_section"]
    assert rope["rope_theta"] == raw["rope_theta"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<cutlass>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgs)", "communication"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdam>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        (
            "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>",
            kernels.OTHER,
        ),
        ("triton_poi_fused_mul_silu_0", kernels.OTHER),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "reductions"),
    ],
)
def test_kernels_are_counted_in_their_class(name, group):
    assert kernels.class_of(name) == group


def test_the_time_of_kernels_that_overlap_counts_once():
    assert kernels.covered([(0.0, 2.0), (5.0, 6.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0
    assert kernels.covered([]) == 0.0
