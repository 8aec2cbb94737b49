"""One GRPO step of two updates on invented rollouts; write what each update measured.

Usage: two_updates.py MODEL_DIR SHARDS_DIR OUT.json LEARNING_RATE...
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_sr1 import stages
from megatron_sr1.config.loading import load_config
from megatron_sr1.records import Completion, Reward, Rollout
from megatron_sr1.runtime.device import stop_distributed
from megatron_sr1.trainer.grading import Graded, Verdict
from megatron_sr1.trainer.grpo import credit_fields, own_samples, with_fields, with_logprobs
from megatron_sr1.trainer.objective import Credit, grpo_loss
from megatron_sr1.trainer.rollouts import Drawn, Entry
from megatron_sr1.trainer.step import update

NUM_PROMPTS, NUM_SAMPLES = 6, 2


def configuration(model_dir, shards, output, learning_rate):
    overrides = {
        "model.path": model_dir,
        "model.dtype": "float32",
        "data.train": shards,
        "data.prompts_per_step": NUM_PROMPTS,
        "data.pass1_template": "brief",
        "data.pass2_template": "brief",
        "data.max_prompt_tokens": 128,
        "data.pack_tokens": 128,
        "data.min_pixels": 784,
        "data.max_pixels": 200704,
        "rollout.samples_per_prompt": NUM_SAMPLES,
        "algorithm.prompts_per_update": NUM_PROMPTS // 2,
        "algorithm.kl_coefficient": 0,
        "optimizer.learning_rate": learning_rate,
        "optimizer.num_steps": 1,
        "launch.device": "cpu",
        "launch.threads": 1,
        "output": output,
    }
    return load_config(None, [f"{key}={value}" for key, value in overrides.items()])


def invented(samples, rank, num_ranks):
    """Rollouts of random tokens for the first prompts, and random advantages.

    The replica of each rank has every other prompt, or all if there is one.
    """
    rng = np.random.default_rng(12)
    unjudged = Reward(0.0, 0.0, None, False, 0.0, None, None)
    entries, verdicts, held = [], [], {}
    for index in range(NUM_PROMPTS):
        for sample in range(NUM_SAMPLES):
            tokens = tuple(rng.integers(10, 300, size=int(rng.integers(6, 30))).tolist())
            logprobs = tuple((-6 + 0.1 * rng.standard_normal(len(tokens))).tolist())
            completion = Completion(tokens, logprobs, "", "stop")
            prompt = samples.prompt(index).token_ids
            rollout = Rollout(index, sample, prompt, completion, None, None, 0)
            replica = index % num_ranks
            if replica == rank:
                held[rollout.key] = rollout
            entries.append(Entry(rollout.key, replica, samples.size(rollout, home=0)))
            verdicts.append(Verdict(rollout.key, unjudged, None))
    advantages = rng.standard_normal((NUM_PROMPTS, NUM_SAMPLES))
    drawn = Drawn(list(range(NUM_PROMPTS)), entries, held, {}, is_leader=True)
    return drawn, Graded(verdicts, [], Credit(advantages), {})


def step(config, groups):
    """What each of the two updates measured, and sums of the weights afterwards."""
    context, samples, actor, _ = stages.start(config, groups)
    drawn, graded = invented(samples, groups.data.rank, groups.data.size)
    owned = own_samples(context, samples, drawn, drawn.entries, range(groups.data.size))
    updates = [samples.pack([each.sample for each in own], groups) for own in owned]
    updates = with_logprobs(context, actor, owned, updates, None)
    updates = with_fields(updates, credit_fields(samples, owned, updates, graded))
    loss = grpo_loss(config.algorithm, config.rollout)
    measured = []
    for batches in updates:
        measured.append(update(actor, batches, loss, config.rollout.temperature))
    context.close()
    weights = {name: float(tensor.double().abs().sum()) for name, tensor in actor.weights()}
    return {"updates": measured, "weights": weights}


def main():
    model_dir, shards, out, *rates = sys.argv[1:]
    groups, found = None, {}
    for rate in rates:
        config = configuration(model_dir, shards, f"{out}.run_{rate}", rate)
        if groups is None:
            groups = stages.start_ranks(config)
        found[rate] = step(config, groups)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    stop_distributed()


if __name__ == "__main__":
    main()
