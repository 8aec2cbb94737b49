"""The engine on a GPU: sleep gives memory back, and weights come again with a sync.

In bfloat16, so numbers are compared to a few hundredths of a nat.
"""

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def setup():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "parity"))
    import rollout_setup

    return rollout_setup


@pytest.fixture(scope="module")
def engine(tiny_model, setup):
    from megatron_sr1.config.rollout import RolloutConfig
    from megatron_sr1.rollout.engine import Engine
    from megatron_sr1.runtime.device import select_device, start_distributed

    start_distributed(select_device("cuda"))
    return Engine(
        tiny_model,
        RolloutConfig(
            max_model_len=256,
            max_num_seqs=64,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
            sleep_level=2,
        ),
        setup.processor(tiny_model),
        device_kind="cuda",
        dtype="bfloat16",
    )


@pytest.fixture
def requests(tiny_model, setup):
    prompts = [setup.prompt(tiny_model, k, num_images=k % 3) for k in range(6)]
    return [setup.request(p, str(k), max_tokens=12, seed=k) for k, p in enumerate(prompts)]


def assert_near_transformers(tiny_model, setup, engine, requests):
    for request, found in zip(requests, engine.generate(requests), strict=True):
        index = int(request.id)
        prompt = setup.prompt(tiny_model, index, num_images=index % 3)
        expected = setup.reference_logprobs(tiny_model, prompt, found.token_ids)
        gaps = [abs(a - b) for a, b in zip(found.logprobs, expected, strict=True)]
        assert sum(gaps) / len(gaps) < 0.03 and max(gaps) < 0.3


def test_sampled_logprobs_are_near_transformers(tiny_model, setup, engine, requests):
    assert_near_transformers(tiny_model, setup, engine, requests)


def test_draws_depend_on_the_seed_and_not_on_the_order(engine, requests):
    forwards = [c.token_ids for c in engine.generate(requests)]
    assert forwards == [c.token_ids for c in engine.generate(requests[::-1])[::-1]]


def test_level_2_frees_memory_and_asks_for_a_sync(tiny_model, setup, engine, requests):
    from megatron_sr1.errors import EngineError

    free_awake = torch.cuda.mem_get_info()[0]
    engine.sleep()
    assert torch.cuda.mem_get_info()[0] > free_awake + 2**30
    with pytest.raises(EngineError, match="dropped its weights"):
        engine.submit(requests)
    engine.wake()
    with pytest.raises(EngineError, match="sync them first"):
        engine.submit(requests)
    state = setup.reference(tiny_model).state_dict()
    engine.sync(((name, tensor.cuda()) for name, tensor in state.items()), version=1)
    assert_near_transformers(tiny_model, setup, engine, requests)


def test_repeated_sleep_keeps_no_memory(tiny_model, setup, engine, requests):
    state = setup.reference(tiny_model).state_dict()
    free = []
    for version in range(2, 5):
        engine.sleep()
        free.append(torch.cuda.mem_get_info()[0])
        engine.wake()
        engine.sync(state.items(), version=version)
        engine.generate(requests)
    assert max(free) - min(free) < 2**26
