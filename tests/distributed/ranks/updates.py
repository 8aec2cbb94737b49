"""Run two updates from one batch under several layouts and packings; write what came of each.

Usage: updates.py MODEL_DIR OUT.json LAYOUT...
A layout is SHORT_FORM@pack_tokens[f|a][p][:objective]: the short form is that of `layout_settings`,
f freezes the vision tower, a trains adapters on all linear layers, p shares prompts, and the
objective is a key of OBJECTIVES.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from megatron_sr1.config.loading import load_config
from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.config.training import AlgorithmConfig
from megatron_sr1.data.processor import Processor
from megatron_sr1.model.row_split import split_row
from megatron_sr1.records import PackedBatch, TrainSample
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import Group, make_groups
from megatron_sr1.trainer.actor import Reference, add_adapters, load_actor_model, make_actor
from megatron_sr1.trainer.objective import grpo_loss
from megatron_sr1.trainer.step import sample_logprobs, update
from tests.layouts import destroy_groups, layout_settings, pack_rows, random_samples

LOGPROBS = ("old_logprobs", "engine_logprobs", "reference_logprobs")
ADAPTERS = ["adapter.rank=4", "adapter.targets=['_proj$','qkv','mlp']", "adapter.alpha=8"]
WIDE = {"gspo_clip_low": 0.02, "gspo_clip_high": 0.03}
OBJECTIVES = {
    "token_mean": {},
    "sequence_mean": {"loss": "sequence_mean"},
    "dr_grpo": {"loss": "dr_grpo"},
    "gspo": {"loss": "gspo", **WIDE},
    "gspo_corrected": {"loss": "gspo", **WIDE, "importance_sampling": "sequence"}
    | {"mask_beyond_nats": 0.03},
    "token_corrected": {"importance_sampling": "token", "mask_beyond_nats": 0.03},
    "all_masked": {"mask_beyond_nats": 1e-12},
    "even_masked": {"mask_beyond_nats": 0.5},
}


def make_samples(processor: Processor) -> tuple[list[TrainSample], list[list[Image.Image]]]:
    """Eleven sequences: no image, one, two of unequal sizes; random tokens and numbers.

    The tenth is long, is text alone, and learns its last two tokens only. The seventh and the ninth
    are other responses to the prompt of the sixth: some packings and layouts have all in a row.
    """
    images = [[(84, 28), (56, 112), (140, 84)][: index % 3] for index in range(11)]
    num_text = [7 + 5 * index % 26 for index in range(11)]
    num_text[9] = 64
    samples, pictures = random_samples(processor, images, num_text)
    for number in (6, 8):
        samples[number] = another_response(samples[number], samples[5])
    length = len(samples[9].token_ids)
    samples[9] = replace(samples[9], loss_mask=np.arange(length) >= length - 2)
    return samples, pictures


def another_response(sample: TrainSample, other: TrainSample) -> TrainSample:
    """Put the other sample's prompt, with its images, before the tokens of a sample of text."""
    num_prompt = int(other.loss_mask.argmax())
    text = sample.token_ids[sample.token_ids >= 10]
    token_ids = np.concatenate([other.token_ids[:num_prompt], text])
    numbers = {
        name: np.resize(getattr(sample, name), len(token_ids)) for name in ("advantages", *LOGPROBS)
    }
    mask = np.arange(len(token_ids)) >= num_prompt
    return replace(other, token_ids=token_ids, loss_mask=mask, **numbers)


def run_layout(layout: str, model_dir: str, processor: Processor) -> dict:
    """What one layout gives, with the vision tower frozen where it says f.

    Loss and gradient norm of two updates, logprobs before and after, exported weights."""
    short_form, pack_tokens, trained, shared, objective = re.fullmatch(
        r"(\w+)@(\d+)([fa]?)(p?)(?::(\w+))?", layout
    ).groups()
    settings = [*layout_settings(short_form), f"model.path={model_dir}"]
    settings += [*ADAPTERS, "optimizer.learning_rate=1e-2"] if trained == "a" else []
    config = load_config(None, ["optimizer.learning_rate=1e-3", *settings])
    groups = make_groups(config.parallel, select_device("cpu"))
    chunks, hf_config, source = load_actor_model(config, groups)
    add_adapters(config, chunks, hf_config, groups)
    reference = Reference(chunks)
    config.model.freeze = ["^visual[.]"] if trained == "f" else []
    actor = make_actor(config, chunks, hf_config, source, groups, num_updates=2)
    samples, pictures = make_samples(processor)
    if objective == "even_masked":  # of two data-parallel ranks the first has nothing left
        far = [np.float32(number % 2 == 0) for number in range(len(samples))]
        samples = [
            replace(s, engine_logprobs=s.old_logprobs + gap)
            for s, gap in zip(samples, far, strict=True)
        ]
    own = samples[groups.data.rank :: groups.data.size]
    batches = pack_rows(samples, pictures, processor, groups, int(pack_tokens), bool(shared))
    if shared:
        assert any(batch.shared_tokens.any() for batch in batches), "no prompt is shared"
    if groups.data.size == 1 and groups.context.size > 1 and len(batches) > 1:
        check_hard_cases(batches, groups.context, processor.image_pad_id)
    before = sample_logprobs(actor, own, batches, 0.7)
    algorithm = AlgorithmConfig(kl_coefficient=0.1, **OBJECTIVES[objective or "token_mean"])
    loss = grpo_loss(algorithm, RolloutConfig(max_response_tokens=64))
    updates = [update(actor, batches, loss, 0.7) for _ in range(2)]
    after = sample_logprobs(actor, own, batches, 0.7)
    with reference.in_place():
        again = sample_logprobs(actor, own, batches, 0.7)
    restored = sample_logprobs(actor, own, batches, 0.7)
    weights = {name: tensor.clone() for name, tensor in actor.weights()}
    found = {
        "updates": updates,
        "weights": {n: [float(w.double().sum()), float(w.abs().max())] for n, w in weights.items()},
        "after": _in_order(after, groups),
        "before": _in_order(before, groups),
        "reference_gap": max(float(abs(a - b).max()) for a, b in zip(before, again, strict=True)),
        "restored_gap": max(float(abs(a - b).max()) for a, b in zip(after, restored, strict=True)),
    }

    destroy_groups()
    return found


def check_hard_cases(batches: list[PackedBatch], context: Group, image_pad_id: int) -> None:
    """The rows hold what is hard to split, so that the comparison says something about it."""
    lonely, shared = False, False
    for batch in batches:
        parts = [
            split_row(batch.cu_seqlens, replace(context, rank=rank)) for rank in range(context.size)
        ]
        lonely |= any(not part.take(batch.loss_mask, dim=1).any() for part in parts)
        is_image = batch.input_ids == image_pad_id
        runs = (is_image[:, 1:] & ~is_image[:, :-1]).cumsum(1)  # numbers the images
        held = [set(part.take(F.pad(runs, (1, 0)) * is_image, 1)[0].tolist()) for part in parts]
        shared |= bool((held[0] & held[1]) - {0})
    assert lonely, "no rank without a target"
    assert shared, "no image with tokens on two ranks"


def _in_order(rows: list[np.ndarray], groups) -> list[list[float]]:
    parts = [None] * groups.data.size
    dist.all_gather_object(parts, [row.tolist() for row in rows], group=groups.data.process_group)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def main() -> None:
    model_dir, out, *layouts = sys.argv[1:]
    start_distributed(select_device("cpu"), 120)
    processor = Processor(model_dir, 784, 200704)
    found = {layout: run_layout(layout, model_dir, processor) for layout in layouts}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
