"""The whole plan of published models and of the examples."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sr1.checkpoint.mapping import TOWER
from megatron_sr1.config.loading import load_config
from megatron_sr1.config.run import ParallelConfig
from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import check_layout, parse_hf_config
from megatron_sr1.planning.activations import Activations
from megatron_sr1.planning.actor_time import ActorCost
from megatron_sr1.planning.engine_time import Replica
from megatron_sr1.planning.estimates import choose, estimate, estimates, variants
from megatron_sr1.planning.layout import (
    Layout,
    balanced_stages,
    configured,
    cut_keys,
)
from megatron_sr1.planning.memory import StaticMemory, static_memory
from megatron_sr1.planning.workload import num_parameters, planned_run
from megatron_sr1.runtime.gpus import GPUS, find_gpu
from tools.memory_table import table

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "tests" / "published"
SEVEN = ROOT / "examples" / "qwen25vl_7b.yaml"
ENOUGH = {"3b": (8, "a100"), "7b": (8, "h100"), "32b": (32, "h100"), "72b": (64, "h100")}
TEXT, VISION = "text activations", "vision activations"


def published(size):
    return parse_hf_config(json.loads((PUBLISHED / f"qwen25vl_{size}.json").read_text()))


def planned(size, *keys, path=SEVEN):
    num_gpus, name = ENOUGH[size]
    run = planned_run(load_config(path, list(keys)), published(size), find_gpu(name))
    return run, estimates(run, num_gpus)


@pytest.mark.parametrize("size", ENOUGH)
def test_the_proposed_layout_of_a_published_model_divides_it_and_fits(size):
    run, found = planned(size)
    config, hf_config, best = run.config, run.hf_config, choose(found)
    assert best is not None and best.memory.peak <= run.gpu.memory_bytes
    assert best.layout.num_ranks == ENOUGH[size][0]
    for heads in (hf_config.text.num_attention_heads, hf_config.vision.num_heads):
        assert heads % best.layout.engine == 0
    again = load_config(SEVEN, best.layout.overrides(config))
    check_layout(hf_config, again.parallel)
    assert configured(again, ENOUGH[size][0]) == best.layout
    assert all(0 < mfu < 1 for name, mfu in best.mfu.items() if name != "sync")


@pytest.mark.parametrize(("size", "gpu"), [("3b", GPUS["a100-40gb"]),
                                           ("7b", GPUS["h100"]), ("7b", GPUS["a100"])])  # fmt: skip
def test_the_layout_of_an_example_fits_the_machine_that_it_names(size, gpu):
    config = load_config(ROOT / "examples" / f"qwen25vl_{size}.yaml")
    own = estimate(planned_run(config, published(size), gpu), configured(config, 8))
    assert own.fits and own.memory.peak < gpu.memory_bytes


def test_static_memory_of_the_7b_equals_docs_memory():
    """docs/memory.md: 74.6 GB with four data-parallel ranks, 39.4 in bfloat16 with eight."""
    config, hf_config = load_config(SEVEN), published("7b")
    assert static_memory(config, hf_config, Layout(data=4), 0).device / 1e9 == pytest.approx(
        74.6, abs=0.1
    )
    keys = ["optimizer.state=bfloat16", "optimizer.gradients=bfloat16", "optimizer.beta2=0.99"]
    low = static_memory(load_config(SEVEN, keys), hf_config, Layout(data=8), 0)
    assert low.device / 1e9 == pytest.approx(39.4, abs=0.1)


def test_layouts_that_fit_come_first_and_the_fastest_of_them_first():
    run, found = planned("7b")
    fitting = [e for e in found if e.fits]
    assert found[: len(fitting)] == fitting and 0 < len(fitting) < len(found)
    assert fitting == sorted(fitting, key=lambda e: e.step_seconds)
    assert all(e.memory.peak > run.gpu.memory_bytes for e in found[len(fitting) :])


def test_among_nearly_equal_times_the_least_split_layout_is_proposed():
    _, found = planned("72b")
    fastest, best = found[0], choose(found)
    assert fastest.layout.context > 1 and best.layout.context == 1
    assert best.step_seconds < 1.1 * fastest.step_seconds


def test_a_frozen_tower_keeps_no_activations_and_updates_faster():
    keys = ["stage=sft"]
    trained = choose(planned("7b", *keys)[-1])
    frozen_keys = [*keys, "model.freeze=['^visual[.]']"]
    run, _ = planned("7b", *frozen_keys)
    frozen = estimate(run, trained.layout)
    assert trained.memory.activations[VISION] > 0 == frozen.memory.activations[VISION]
    assert frozen.seconds["update"] < trained.seconds["update"]
    assert set(frozen.seconds) == {"update"}


def test_stages_are_balanced_by_work():
    two, three, four = (Layout(pipeline=stages) for stages in (2, 3, 4))
    assert balanced_stages(four, 8, 0, 1, 0) == (2, 2, 2, 2)
    assert balanced_stages(two, 10, 3, 1, 1) == (4, 6)
    assert balanced_stages(three, 9, 100, 1, 0) == (1, 4, 4)


def test_with_virtual_stages_ranks_are_balanced_rather_than_stages():
    """The tower takes as long as 3 layers: its rank gets 3 fewer, its stage only one."""
    layout = Layout(pipeline=2, virtual=2)
    layers = balanced_stages(layout, 11, 3, 1, 0)
    assert layers == (1, 4, 3, 3)


def test_balanced_stages_are_faster_and_are_proposed():
    run, found = planned("72b")
    best = choose(found).layout
    assert sum(best.stage_layers) == 80 and best.stage_layers[0] == min(best.stage_layers)
    even = estimate(run, replace(best, stage_layers=()))
    assert choose(found).seconds["update"] < even.seconds["update"]
    assert choose(found).memory.activations[TEXT] != even.memory.activations[TEXT]


def test_overrides_reset_the_splits_that_a_configuration_sets():
    keys = ["parallel.pipeline=2", "parallel.virtual=2", "parallel.vision=images"]
    config = load_config(SEVEN, [*keys, "parallel.stage_layers=[7,7,8,6]"])
    own = configured(config, 8)
    assert own.virtual == 2 and own.stage_layers == (7, 7, 8, 6) and own.vision == "images"
    check_layout(published("7b"), config.parallel)
    assert configured(load_config(SEVEN, own.overrides(config)), 8) == own
    assert configured(load_config(SEVEN, own.overrides(load_config(SEVEN))), 8) == own
    plain = Layout(pipeline=2, data=4)
    again = load_config(SEVEN, ["parallel.pipeline=2", *plain.overrides(config)])
    assert configured(again, 8) == plain
    split = load_config(SEVEN, ["parallel.vision=tensor"])
    assert not [key for key in plain.overrides(split) if "vision" in key]


def test_layouts_that_the_model_refuses_are_refused():
    for wrong in ({"pipeline": 3}, {"pipeline": 2, "virtual": 3}, {"tensor": 8},
                  {"pipeline": 2, "stage_layers": [13, 14]}):  # fmt: skip
        with pytest.raises(ConfigError):
            check_layout(published("7b"), ParallelConfig(**wrong))
    check_layout(published("7b"), ParallelConfig(pipeline=3, stage_layers=[8, 10, 10]))


def test_more_stages_per_rank_shorten_the_bubble_and_need_more_memory():
    few, _ = planned("32b", "data.prompts_per_step=25", "algorithm.prompts_per_update=25")
    one = Layout(tensor=4, pipeline=4, data=2, sequence=True)
    two = replace(one, virtual=2)
    first, second = (estimate(few, layout) for layout in (one, two))
    assert second.seconds["update"] < first.seconds["update"]
    assert second.memory.activations[TEXT] > first.memory.activations[TEXT]


def test_a_tower_split_by_images_is_whole_and_shares_patches_without_all_reduces():
    run, _ = planned("7b")
    config, hf_config = run.config, run.hf_config
    split = Layout(tensor=4, data=2, sequence=True)
    whole = replace(split, vision="images")
    first, second = (static_memory(config, hf_config, layout, 0) for layout in (split, whole))
    assert second.gradients - first.gradients > 0.7 * 4 * num_parameters(hf_config, TOWER)
    held = [Activations(hf_config, layout).vision("none") for layout in (split, whole)]
    assert held[1] > 1.5 * held[0]
    many = replace(run, image_tokens=64.0)  # many small images a row
    actors = [ActorCost(many, layout) for layout in (split, whole)]
    assert actors[1].patches == pytest.approx(actors[0].patches / 4)
    assert actors[1].tower().collective_seconds < actors[0].tower().collective_seconds / 10
    one_image = ActorCost(replace(run, image_tokens=8000.0), whole)
    assert one_image.patches == one_image.run.image_patches


def test_a_proposal_comes_with_its_variants_as_keys():
    run, found = planned("32b")
    others = variants(run, choose(found).layout)
    cuts = [cut_keys(other.layout) for other in others]
    assert [cut["parallel.virtual"] for cut in cuts] == ["1", "2", "4", "1"]
    assert cuts[0]["parallel.stage_layers"] == "[]" and cuts[3]["parallel.vision"] == "images"
    for other in others:
        again = load_config(SEVEN, other.layout.overrides(run.config))
        check_layout(run.hf_config, again.parallel)


def test_the_engine_is_slower_with_more_to_do():
    hf_config = published("7b")
    replica = Replica(hf_config, GPUS["h100"], 1, 40e9, 2, 512)
    one = replica.decode_seconds(100, 500, 2048, 1000)
    assert one < replica.decode_seconds(200, 500, 2048, 1000)
    assert one < replica.decode_seconds(100, 600, 2048, 1000)
    assert one < replace(replica, gpu=GPUS["a100"]).decode_seconds(100, 500, 2048, 1000)
    forked, barrier = (
        replica.pass_seconds(planned_run(load_config(SEVEN, keys), hf_config, replica.gpu), 8)
        for keys in (["rollout.pass2=fork"], ["rollout.pass2=barrier"])
    )
    assert forked[0] == barrier[0] and 0 < forked[1] < barrier[1]


def test_one_running_sequence_is_limited_by_reading_the_weights():
    """7.6e9 text parameters less the embedding, 15 GB at 85 % of 3.35 TB/s, and 3 ms."""
    replica = Replica(published("7b"), GPUS["h100"], 1, 40e9, 2, 512)
    assert replica.step_seconds(1, 1) == pytest.approx(14.14e9 / (0.85 * 3.35e12) + 3e-3, rel=0.01)
    assert replica.token_bytes == 2 * 28 * 4 * 128 * 2


def test_every_gpu_is_found_in_upper_and_lower_case():
    assert [find_gpu(name.upper()).name for name in GPUS] == list(GPUS)
    with pytest.raises(ConfigError):
        find_gpu("")


def test_docs_planner_has_the_constants_of_every_gpu():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "docs" / "planner.md").read_text().split("## Constants")[1].splitlines()
        if line.startswith("| ")
    ]
    names, *rows = ([cells[0], cells[1:]] for cells in rows[:10])
    rates = ("memory_bytes", "peak_flops", "float32_flops", "memory_rate", "link_rate",
             "network_rate", "host_rate", "matmul_share", "attention_share")  # fmt: skip
    units = {"GB": 1e9, "TF": 1e12, "TB": 1e12, "sh": 1.0}
    assert names[1] == list(GPUS)
    for (title, cells), rate in zip(rows, rates, strict=True):
        unit = units[title.split(", ")[1][:2]]
        assert [float(c) * unit for c in cells] == pytest.approx(
            [getattr(gpu, rate) for gpu in GPUS.values()]
        ), title


def test_cards_have_no_nvlink_and_half_of_geforces_peak_as_its_sums_are_float32():
    """NVIDIA gives 330.3 and 419 TFLOP/s for float16 summed in float16."""
    for name, half_sums in {"rtx4090": 330.3e12, "rtx5090": 419e12}.items():
        assert GPUS[name].peak_flops == pytest.approx(half_sums / 2, rel=1e-3)
    assert {n for n, gpu in GPUS.items() if gpu.link_rate == gpu.host_rate} == {
        "rtx4090", "rtx5090", "l40s", "rtxpro6000"
    }  # fmt: skip


def test_docs_planner_has_the_table_that_planner_errors_prints():
    done = subprocess.run(
        [sys.executable, "tools/planner_errors.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs" / "planner.md").read_text()


def test_docs_memory_has_the_table_that_memory_table_prints():
    assert table() in (ROOT / "docs" / "memory.md").read_text()


def test_without_packing_a_row_is_a_sequence():
    assert load_config(SEVEN, []).data.row_budget == 8192
    assert load_config(SEVEN, ["data.packing=false"]).data.row_budget == 0


def test_beside_the_engine_is_what_make_room_leaves():
    static = StaticMemory(frozen=0, trained=1, gradients=20, optimizer=300, host=4000)
    assert static.beside_engine("none") == static.device == 321
    assert static.beside_engine("gradients") == 301
    assert static.beside_engine("optimizer") == 1
    adapters = replace(static, frozen=50_000)
    assert adapters.beside_engine("gradients") == 50_301
    assert adapters.beside_engine("weights") == 301


def test_adapters_update_faster_and_need_no_copy_of_the_reference():
    run, _ = planned("7b")
    layout = Layout(data=8, recompute="full")
    whole = estimate(run, layout)
    lora = estimate(planned("7b", "adapter.rank=16", "adapter.dtype=model")[0], layout)
    assert lora.seconds["update"] < whole.seconds["update"]
    assert lora.seconds["reference"] < whole.seconds["reference"]
    in_float32 = estimate(planned("7b", "adapter.rank=16")[0], layout)
    assert lora.seconds["update"] < in_float32.seconds["update"]
