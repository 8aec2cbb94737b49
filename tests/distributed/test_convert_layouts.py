"""What the converter writes without Megatron is what Megatron writes, and is read under any layout.

Not covered: Transformer Engine's layers (their names in a checkpoint are the same; see
tests/distributed/test_te_double.py), context parallelism, which splits no weights.
"""

from pathlib import Path

import pytest

from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.checkpoint.tensors import METADATA, unwrap
from megatron_sr1.config.run import ModelConfig, ParallelConfig
from megatron_sr1.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_sr1.conversion.units import UnitReader, units
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.runtime import cpu
from tests.checkpoint_files import files_of, write_two_files

SCRIPT = Path(__file__).parent / "ranks" / "checkpoints.py"
LAYOUTS = ("1x1x1b", "2x1x1b", "1x2x1b")


def quiet(what, done_bytes, total_bytes):
    pass


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """An untied bfloat16 model in two files, whose vocabulary of 383 is padded on two ranks."""
    from megatron_sr1.demo.digits import corpus_texts
    from megatron_sr1.demo.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("untied")
    make_tiny_model(folder / "one", corpus_texts(), vocab_size=383, tie_word_embeddings=False)
    return write_two_files(folder / "one", folder / "two", in_memory=True)


def described_by_megatron(directory, groups):
    """Key, global shape and offset of each shard of a model on one rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_sr1.model.qwen25_vl import build_model

    with cpu.megatron_mode():
        (chunk,) = build_model(
            read_hf_config(directory), groups, ModelConfig(dtype="float32"), ParallelConfig()
        )
        state = unwrap(chunk).sharded_state_dict(prefix="", metadata=dict(METADATA))
        apply_factories(state)
    shards = [s for s in nested_values(state) if isinstance(s, ShardedTensor)]
    return sorted(
        (s.key, tuple(s.global_shape), tuple(s.global_offset), tuple(s.data.shape)) for s in shards
    )


@pytest.mark.parametrize("tied", [True, False])
def test_units_are_where_megatron_puts_them(tiny_model, untied, groups, tied):
    directory = tiny_model if tied else untied
    found = units(read_hf_config(directory))
    mine = sorted((u.key, u.global_shape, u.offsets, u.parameter_shape) for u in found)
    assert mine == described_by_megatron(directory, groups)


@pytest.fixture(scope="module")
def loaded(tiny_model, untied, run_ranks, tmp_path_factory):
    """Converted checkpoints, loaded by Megatron under each layout, exported and saved again."""
    out = tmp_path_factory.mktemp("loaded")
    for source in (tiny_model, untied):
        hf_to_megatron(source, out / "converted" / source.name, None, quiet, 2**20)
    converted = [out / "converted" / source.name for source in (tiny_model, untied)]
    run_ranks(
        SCRIPT, 2, "resave", out, f"{converted[0]}:1x2x1", f"{converted[1]}:{','.join(LAYOUTS)}"
    )
    return out


def test_a_converted_model_loads_under_a_pipeline_with_tied_embeddings(loaded, tiny_model):
    assert files_of(loaded / tiny_model.name / "1x2x1") == files_of(tiny_model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_model_loads_under_every_layout(loaded, untied, layout):
    assert files_of(loaded / untied.name / layout) == files_of(untied)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_every_layout_saved_converts_back(loaded, untied, tmp_path, layout):
    """Two ranks' pieces are put together, and the padding of the vocabulary is left out."""
    found = resolve_model(loaded / untied.name / f"{layout}.saved")
    all_units = units(read_hf_config(found.hf_files))
    reader = UnitReader(found.weights, all_units)
    pieces = {len(reader.pieces(unit)) for unit in all_units}
    assert pieces == ({1, 2} if layout == "2x1x1b" else {1})
    megatron_to_hf(found, tmp_path / "hf", True, quiet)
    assert files_of(tmp_path / "hf") == files_of(untied)
