"""Published weights into the model and out of it, one tensor at a time.

The model's chunks may have any tensor- and pipeline-parallel layout.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_sr1.checkpoint import mapping
from megatron_sr1.checkpoint.hf_files import HFSource, check_target, write_like
from megatron_sr1.checkpoint.mapping import HF_EMBEDDING, HF_OUTPUT, Entry, entries
from megatron_sr1.checkpoint.tensors import sharing, unwrap
from megatron_sr1.checkpoint.transforms import join, merged, publish, slices
from megatron_sr1.errors import CheckpointError
from megatron_sr1.model.hf_config import HFConfig
from megatron_sr1.runtime.groups import Groups, gather_objects

if TYPE_CHECKING:
    from megatron_sr1.model.adapters import Adapters  # imports Megatron; conversion does not

log = logging.getLogger(__name__)
NUM_NAMED = 12  # tensors that an error names
NUM_ROWS = 8192  # of the vocabulary, compared at a time


def load_hf(
    chunks: Sequence[Any], directory: str | Path, hf_config: HFConfig, groups: Groups
) -> None:
    """Fill the chunks from safetensors; each rank reads its own blocks, one tensor at a time.

    All ranks raise `CheckpointError` if tensors are missing, unexpected or of the wrong shape.
    """
    source = HFSource(directory)
    check_tensors(source, hf_config)
    source.need_weights()
    for entry, parameter in local_parameters(chunks, hf_config):
        group = sharing(entry, groups)
        wanted = slices(entry, group.rank, group.size, parameter.shape[0])
        value = join(entry, [source.read(*block) for block in wanted], group.size)
        with torch.no_grad():
            if entry.form != "vocabulary":
                assert parameter.shape == value.shape, (entry.name, parameter.shape, value.shape)
            parameter[: len(value)].copy_(value)
            parameter[len(value) :].zero_()


def check_tensors(source: HFSource, hf_config: HFConfig) -> None:
    """Compare a source's tensors with what the configuration asks for.

    Raises `CheckpointError`, naming the tensors that are missing, unexpected or of the wrong shape,
    or saying that the output layer is not the embedding that it is tied to.
    """
    expected = {
        name: shape
        for entry in entries(hf_config)
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    found = source.tensors
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    has_tied_copy = hf_config.tie_word_embeddings and HF_OUTPUT in found
    if has_tied_copy:  # some publishers write a tied output layer all the same
        expected[HF_OUTPUT] = expected[HF_EMBEDDING]
    unexpected = [f"{t.name} (in {t.file})" for name, t in found.items() if name not in expected]
    wrong = [
        f"{t.name} (in {t.file}): {list(t.shape)}, expected {list(expected[name])}"
        for name, t in found.items()
        if name in expected and t.shape != expected[name]
    ]
    problems = [
        f"{len(names)} {what}: " + ", ".join(names[:NUM_NAMED] + ["…"] * (len(names) > NUM_NAMED))
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source.directory}: the weights are not those that config.json describes; tensors "
            + "; ".join(problems)
        )
    if has_tied_copy:
        _check_tied(source, hf_config)


def _check_tied(source: HFSource, hf_config: HFConfig) -> None:
    """Refuse an output layer that differs from the embedding it is tied to: it would be lost."""
    flags = hf_config.tie_flags
    said = " and ".join(f"{name}={str(flag).lower()}" for name, flag in flags.items())
    if not source.has_weights:
        if len(set(flags.values())) > 1:
            log.warning(
                "%s: config.json has %s; %s is taken for a copy of the embedding, which cannot be "
                "checked here, without the published weights",
                *(source.directory, said, HF_OUTPUT),
            )
        return
    dtype, num_rows = source.tensors[HF_OUTPUT].dtype, hf_config.text.vocab_size
    for first in range(0, num_rows, NUM_ROWS):
        rows = slice(first, min(first + NUM_ROWS, num_rows))
        output = source.read(HF_OUTPUT, (rows,))
        embedding = source.read(HF_EMBEDDING, (rows,)).to(dtype)
        if not torch.equal(output.view(torch.uint8), embedding.view(torch.uint8)):
            gap = (output.float() - embedding.float()).abs().max().item()
            raise CheckpointError(
                f"{source.directory}: config.json has {said}, so that the output layer is the "
                f"embedding, but {HF_OUTPUT} differs from {HF_EMBEDDING} (by up to {gap:.2g} in "
                f"rows {first} to {rows.stop - 1}); if it is an output layer of its own, set "
                "tie_word_embeddings to false in every place; if not, remove the tensor"
            )


def with_tied_copy(
    weights: Iterable[tuple[str, torch.Tensor]], source: HFSource, hf_config: HFConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, and after the embedding its copy if the source has a tied output layer."""
    for name, tensor in weights:
        yield name, tensor
        if name == HF_EMBEDDING and hf_config.tie_word_embeddings and HF_OUTPUT in source.tensors:
            yield HF_OUTPUT, tensor


def local_parameters(
    chunks: Sequence[Any], hf_config: HFConfig
) -> Iterator[tuple[Entry, torch.nn.Parameter]]:
    """Yield this rank's parameters, each with its entry, in the chunks' order, without adapters.

    With tied embeddings a last stage's copy of the embedding comes with the embedding's entry.
    """
    table = {entry.name: entry for entry in entries(hf_config)}
    if hf_config.tie_word_embeddings:
        table[mapping.OUTPUT] = table[mapping.EMBEDDING]
    for _, name, parameter in named_parameters(chunks):
        if not name.endswith((mapping.ADAPTER_A, mapping.ADAPTER_B)):
            assert name in table, f"no row of the table is about parameter {name}"
            yield table[name], parameter


def named_parameters(
    chunks: Sequence[Any],
) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """Yield the module, the name as entries have it, and the parameter, for all on this rank."""
    for chunk in chunks:
        layers = unwrap(chunk).language_model.decoder.layers
        first_layer = int(layers[0].layer_number) - 1 if len(layers) else 0
        for path, module in chunk.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                yield module, mapping.canonical_parameter(name, first_layer), parameter


def export_weights(
    chunks: Sequence[Any],
    hf_config: HFConfig,
    groups: Groups,
    left_out: Collection[str] = (),
    gather: Gather | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield whole tensors under their published names, on every rank, in the order of computation.

    Adapters are merged into the weights that they belong to. Collective: all ranks iterate to the
    end. A stage broadcasts its shard to the others, then the tensor-parallel ranks gather the
    parameter; no more than one is whole at a time. A parameter made of any of the published names
    in `left_out` is neither sent nor yielded. Tensors have the model's type and device; they may be
    views of live parameters, which the next update changes. `gather` is one of these chunks, which
    saves looking for their parameters.
    """
    gather, left_out = gather or Gather(chunks, groups), frozenset(left_out)
    adapters = adapters_of(chunks)
    for entry in entries(hf_config):
        if left_out.isdisjoint(entry.hf_names):
            for name, weight in gather(entry):
                pair = adapters and adapters.modules.get(name.removesuffix(".weight"))
                if adapters and pair:
                    ((_, a),), ((_, b),) = gather(pair[0]), gather(pair[1])
                    weight = merged(weight, a, b, adapters.scale)
                yield name, weight


def adapters_of(chunks: Sequence[Any]) -> Adapters | None:
    """Return the adapters of a model, if it has any."""
    found: list[Adapters | None] = [unwrap(chunk).adapters for chunk in chunks]
    return found[0] if found else None


class Gather:
    """Makes parameters of a model whole on every rank, one at a time, with their present values."""

    def __init__(self, chunks: Sequence[Any], groups: Groups) -> None:
        """Find out which stage holds what; collective over the stages."""
        self._groups, self._mine = groups, dict[str, torch.Tensor]()
        for _, name, parameter in named_parameters(chunks):
            self._mine.setdefault(name, parameter)
        facts = {name: (tuple(shard.shape), shard.dtype) for name, shard in self._mine.items()}
        self._by_stage = gather_objects(facts, groups.pipeline)

    def __call__(self, entry: Entry) -> list[tuple[str, torch.Tensor]]:
        """Return a parameter as published tensors; collective, all ranks ask in one order."""
        pipeline = self._groups.pipeline
        owner = next((s for s, facts in enumerate(self._by_stage) if entry.name in facts), None)
        assert owner is not None, f"no stage holds {entry.name}"
        shape, dtype = self._by_stage[owner][entry.name]
        if owner == pipeline.rank:
            # From host memory, if an engine has its room on the device (rollout.make_room).
            shard = self._mine[entry.name].detach().to(self._groups.device).contiguous()
        else:
            shard = torch.empty(shape, dtype=dtype, device=self._groups.device)
        if pipeline.size > 1:
            dist.broadcast(shard, src=pipeline.ranks[owner], group=pipeline.process_group)
        shards, group = [shard], sharing(entry, self._groups)
        if entry.shard_dim is not None and group.size > 1:
            shards = [torch.empty_like(shard) for _ in range(group.size)]
            dist.all_gather(shards, shard, group=group.process_group)
        return publish(entry, shards)


def save_hf(
    chunks: Sequence[Any],
    hf_config: HFConfig,
    groups: Groups,
    source_directory: str | Path,
    target_directory: str | Path,
) -> None:
    """Write a directory like the source's with the chunks' weights; collective over all ranks.

    The source is a Hugging Face directory, or the copy of one in a Megatron checkpoint. Names,
    types, the split into files and the index are the source's; all other files are copied byte for
    byte. Rank 0 writes one tensor at a time under a temporary name, then renames; it replaces only
    a model. Raises `CheckpointError` for any other target, or if the source is of another shape.
    """
    source, target = HFSource(source_directory), Path(target_directory)
    check_tensors(source, hf_config)
    check_target(source, target)
    weights = export_weights(chunks, hf_config, groups)
    if groups.world.rank == 0:
        write_like(source, target, with_tied_copy(weights, source, hf_config))
    else:
        for _ in weights:
            pass
    dist.barrier(group=groups.world.process_group)
