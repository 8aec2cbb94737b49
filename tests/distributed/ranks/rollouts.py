"""On each rank: roll out, sync, roll out again, sync half a model; writes what came out.

Arguments: model directory, output directory, engine tensor parallelism.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.errors import EngineError
from megatron_sr1.rollout.engine import Engine
from megatron_sr1.rollout.readings import RolloutHooks
from megatron_sr1.rollout.two_pass import roll_out
from megatron_sr1.runtime.device import select_device, start_distributed, stop_distributed
from tests.parity import rollout_setup as setup


def refusal(call):
    """Message of the error that a call ends with."""
    try:
        call()
    except EngineError as error:
        return str(error)
    return "accepted"


def time_limits():
    """Seconds that a collective of vLLM's own groups may take."""
    from vllm.distributed.parallel_state import get_tp_group

    groups = get_tp_group().cpu_group, get_tp_group().device_group
    cpu = torch.device("cpu")
    return [each._get_backend(cpu).options._timeout.total_seconds() for each in groups]


def main(model_dir, output, tensor_parallel):
    start_distributed(select_device("cpu"), timeout_seconds=120)
    processor = setup.processor(model_dir)
    engine = Engine(
        model_dir,
        RolloutConfig(tensor_parallel=tensor_parallel, max_model_len=256, max_num_seqs=64),
        processor,
        timeout_seconds=777.0,
    )

    def reading_prompt(description):
        parts = [{"type": "text", "text": f"Read {description}"}]
        return processor.encode_text([{"role": "user", "content": parts}])

    def roll(prompts):
        rollouts, _ = roll_out(
            engine,
            prompts,
            RolloutConfig(
                samples_per_prompt=4,
                max_response_tokens=20,
                pass2_temperature=1.0,
                max_reading_tokens=8,
                pass2_samples=2,
            ),
            RolloutHooks(
                question_only=True,
                find_description=lambda text: text.split("x")[0] if "x" in text else None,
                reading_prompts=lambda asked: [reading_prompt(text) for _, text in asked],
                seed_of=lambda index, sample, part: (1000 * index + 10 * sample + part) % 2**31,
                closing_mark="x",
            ),
        )
        return [
            {
                "index": r.index,
                "sample": r.sample,
                "tokens": r.completion.token_ids,
                "logprobs": r.completion.logprobs,
                "reading": [a.token_ids for a in r.reading.answers] if r.reading else None,
                "version": r.weight_version,
            }
            for r in rollouts
        ]

    prompts = [setup.prompt(model_dir, k) for k in range(4)]
    mine = prompts[engine.replica :: engine.num_replicas]
    before = roll(mine)
    generator = torch.Generator().manual_seed(11)
    state = setup.reference(model_dir).state_dict()
    changed = (
        (name, tensor + 0.05 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in state.items()
    )
    engine.sync(changed, version=1)
    result = {
        "replica": engine.replica,
        "num_replicas": engine.num_replicas,
        "is_replica_leader": engine.is_replica_leader,
        "time_limits": time_limits(),
        "before": before,
        "after": roll(mine),
    }
    state = {name: tensor for name, tensor in state.items() if "gate_proj" not in name}
    result["refused"] = [refusal(lambda: engine.sync(state.items(), version=2))]
    result["refused"].append(refusal(lambda: roll(mine)))
    (Path(output) / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    stop_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
