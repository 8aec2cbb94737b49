"""The engine against transformers: sampled tokens, their logprobs, rejected requests.

Not covered: bfloat16, sleep levels (they do nothing on a CPU), lengths beyond one block of the
key/value cache per prompt.
"""

import gc
import json
import shutil
import weakref
from dataclasses import fields, replace

import pytest
import rollout_setup as setup
import torch

from megatron_sr1.config.rollout import RolloutConfig
from megatron_sr1.errors import EngineError
from megatron_sr1.rollout.engine import Engine


@pytest.fixture(scope="module")
def engine(tiny_model):
    return setup.engine(tiny_model)[0]


def assert_close(found, expected, bound=1e-5):
    assert len(found) == len(expected) > 0
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < bound


def test_start_leaves_the_random_state_and_the_thread_setter_alone(tiny_model, engine):
    assert setup.engine(tiny_model)[1]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_sampling_leaves_the_random_state_alone(tiny_model, engine):
    before = torch.get_rng_state()
    engine.generate([setup.request(setup.prompt(tiny_model, 0), "a", seed=1)])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_greedy_tokens_and_logprobs_equal_transformers(tiny_model, engine, num_images):
    prompt = setup.prompt(tiny_model, num_images, num_images)
    (found,) = engine.generate([setup.request(prompt, "a", temperature=0.0, max_tokens=12)])
    logits = setup.reference_logits(tiny_model, prompt, found.token_ids)
    allowed = logits.clone()
    allowed[:, list(setup.processor(tiny_model).vision_token_ids)] = float("-inf")
    assert list(found.token_ids) == allowed.argmax(-1).tolist()
    assert_close(found.logprobs, setup.reference_logprobs(tiny_model, prompt, found.token_ids))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_logprobs_are_of_the_whole_softmax_at_the_temperature(
    tiny_model, engine, temperature
):
    prompts = [setup.prompt(tiny_model, k) for k in range(4)]
    requests = [
        setup.request(p, str(k), temperature=temperature, max_tokens=10, seed=k)
        for k, p in enumerate(prompts)
    ]
    for prompt, found in zip(prompts, engine.generate(requests), strict=True):
        expected = setup.reference_logprobs(tiny_model, prompt, found.token_ids, temperature)
        assert_close(found.logprobs, expected)


@pytest.mark.field
def test_the_configuration_takes_the_temperatures_that_vllm_takes_as_they_are(engine):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    limits = {field.name: field.metadata for field in fields(RolloutConfig)}["temperature"]
    for temperature in (limits["at_least"], limits["at_most"]):
        assert SamplingParams(temperature=temperature).temperature == temperature
    assert SamplingParams(temperature=limits["at_least"] / 2).temperature == limits["at_least"]
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=limits["at_most"] + 0.01)


def test_banned_ids_are_never_sampled(tiny_model, engine):
    prompt = setup.prompt(tiny_model, 0)
    requests = [setup.request(prompt, str(k), max_tokens=24, seed=k) for k in range(200)]
    drawn = {t for c in engine.generate(requests) for t in c.token_ids}
    assert len(drawn) > 300, "a random model draws nearly everything"
    assert not drawn & set(setup.processor(tiny_model).vision_token_ids)


def test_sampled_tokens_depend_on_the_seed_and_not_on_other_requests(tiny_model, engine):
    prompts = [setup.prompt(tiny_model, k, num_images=k % 3) for k in range(8)]
    requests = [setup.request(p, str(k), seed=50 + k) for k, p in enumerate(prompts)]
    together = engine.generate(requests)
    backwards = engine.generate(requests[::-1])[::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in backwards]
    assert engine.generate(requests[5:6])[0].token_ids == together[5].token_ids
    (other,) = engine.generate([replace(requests[5], seed=99)])
    assert other.token_ids != together[5].token_ids


def test_scored_logprobs_equal_the_sampled_ones_and_transformers(tiny_model, engine):
    prompt = setup.prompt(tiny_model, 1, num_images=2)
    (sampled,) = engine.generate([setup.request(prompt, "a", max_tokens=9, seed=4)])
    scored = engine.logprobs(prompt.token_ids, sampled.token_ids, prompt.vision)
    assert_close(scored, sampled.logprobs)
    assert_close(scored, setup.reference_logprobs(tiny_model, prompt, sampled.token_ids))


def test_text_is_decoded_without_special_tokens_and_the_end_of_turn_is_kept(tiny_model, engine):
    prompt = setup.prompt(tiny_model, 0)
    (end,) = {setup.processor(tiny_model).tokenizer.eos_token_id}
    requests = [setup.request(prompt, str(k), max_tokens=64, seed=k) for k in range(120)]
    completions = engine.generate(requests)
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped and all(c.token_ids[-1] == end for c in stopped)
    assert all(len(c.token_ids) == len(c.logprobs) for c in completions)
    assert all("<|im_end|>" not in c.text for c in completions)
    cut = [c for c in completions if c.finish_reason == "length"]
    assert cut and all(len(c.token_ids) == 64 for c in cut)


def test_prompts_that_are_not_expanded_for_their_images_are_rejected(tiny_model, engine):
    prompt = setup.prompt(tiny_model, 0, num_images=2)
    pad = setup.processor(tiny_model).image_pad_id
    request = setup.request(prompt, "odd", max_tokens=4)
    ids = list(prompt.token_ids)
    first, second = ids.index(pad), len(ids) - ids[::-1].index(pad) - 1
    moved = [*ids[:first], *ids[first + 1 : second], pad, *ids[second:]]  # from one to the other
    collapsed = [t for t, before in zip(ids, [0, *ids], strict=False) if (t, before) != (pad, pad)]
    for wrong in ([*ids, pad], collapsed, moved):
        with pytest.raises(EngineError, match="odd.* image tokens, its images make"):
            engine.submit([replace(request, token_ids=tuple(wrong))])
    assert engine.num_live == 0


def test_lengths_that_do_not_fit_are_rejected(tiny_model, engine):
    prompt = setup.prompt(tiny_model, 0)
    with pytest.raises(EngineError, match="long.*max_model_len"):
        engine.submit([setup.request(prompt, "long", max_tokens=250)])
    response = [30] * (256 - len(prompt.token_ids))
    with pytest.raises(EngineError, match="score: .*max_model_len"):
        engine.logprobs(prompt.token_ids, response, prompt.vision)
    assert len(engine.logprobs(prompt.token_ids, response[1:], prompt.vision)) > 200
    assert engine.num_live == 0


def test_sleep_and_wake_change_nothing_on_a_cpu(tiny_model, engine):
    request = setup.request(setup.prompt(tiny_model, 0), "a", seed=1)
    (before,) = engine.generate([request])
    engine.sleep()
    engine.wake()
    (after,) = engine.generate([request])
    assert after.token_ids == before.token_ids
    assert_close(after.logprobs, before.logprobs)  # the image may have been encoded with others


@pytest.mark.field
def test_encoded_images_are_dropped_when_the_engine_goes_to_sleep(tiny_model, engine):
    """hiyouga/EasyR1#11002: they stayed while the actor learned."""
    core = engine._core.engine_core.engine_core
    cache = core.model_executor.driver_worker.model_runner.encoder_cache
    prompts = [setup.prompt(tiny_model, 40 + k, num_images=2) for k in range(3)]
    requests = [setup.request(p, str(k), max_tokens=4, seed=k) for k, p in enumerate(prompts)]
    before = engine.generate(requests)
    assert len(cache) >= 6
    engine.sleep()
    assert not cache and not engine.scheduler.encoder_cache_manager.cached
    engine.wake()
    assert engine.generate(requests) == before


def exported(model):
    """As the actor does: an output layer that is tied to the embedding has no tensor of its own."""
    return {n: tensor for n, tensor in model.state_dict().items() if n != "lm_head.weight"}


def perturbed(tiny_model):
    """Change every tensor of the transformers model and return them."""
    model = setup.reference(tiny_model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    assert model.config.tie_word_embeddings
    return exported(model)


def test_synced_weights_serve_the_next_request_with_the_same_images(tiny_model, engine):
    """Both requests have the same images: an embedding cached for the first would be detected."""
    prompt = setup.prompt(tiny_model, 1, num_images=2)
    greedy = setup.request(prompt, "a", temperature=0.0, max_tokens=12)
    (before,) = engine.generate([greedy])
    engine.sync(perturbed(tiny_model).items(), version=5)
    (after,) = engine.generate([greedy])
    assert after.token_ids != before.token_ids
    logits = setup.reference_logits(tiny_model, prompt, after.token_ids)
    assert list(after.token_ids) == logits.argmax(-1).tolist()
    expected = setup.reference_logprobs(tiny_model, prompt, after.token_ids)
    assert_close(after.logprobs, expected, 1e-4)
    assert engine.weight_version == 5


def test_sync_holds_three_tensors_of_the_stream_at_a_time(tiny_model, engine):
    state = exported(setup.reference(tiny_model))
    alive, most = [], 0

    def stream():
        nonlocal most
        for name, tensor in state.items():
            memory = tensor.numpy().copy()  # lives as long as any tensor that is a view of it
            alive.append(weakref.ref(memory))
            most = max(most, sum(made() is not None for made in alive))
            yield name, torch.from_numpy(memory)
            del memory

    engine.sync(stream(), version=6)
    assert len(alive) > 50 and most <= 3, most  # vLLM reads ahead


def test_later_syncs_copy_each_tensor_without_vllm_searching_its_place(
    tiny_model, engine, monkeypatch
):
    greedy = setup.request(setup.prompt(tiny_model, 1), "a", temperature=0.0, max_tokens=12)
    weights = exported(setup.reference(tiny_model))
    engine.sync(weights.items(), version=7)
    (expected,) = engine.generate([greedy])
    core, searched = engine._core.engine_core.engine_core, []
    model = core.model_executor.driver_worker.model_runner.model
    monkeypatch.setattr(model, "load_weights", lambda weights: searched.extend(weights) or set())
    engine.sync(((name, 2 * tensor) for name, tensor in weights.items()), version=8)
    assert engine.generate([greedy])[0].logprobs != expected.logprobs
    engine.sync(weights.items(), version=9)
    assert searched == []
    (found,) = engine.generate([greedy])
    assert found.token_ids == expected.token_ids and found.logprobs == expected.logprobs


@pytest.fixture(scope="module")
def second(tiny_model, engine, tmp_path_factory):
    """A list with another engine, whose model has two end tokens, as the published ones have."""
    directory = tmp_path_factory.mktemp("two_ends") / "model"
    shutil.copytree(tiny_model, directory)
    path = directory / "generation_config.json"
    config = json.loads(path.read_text())
    config["eos_token_id"] = [config["eos_token_id"], config["pad_token_id"]]
    path.write_text(json.dumps(config))
    return [Engine(directory, RolloutConfig(max_model_len=256, max_num_seqs=128))], config[
        "eos_token_id"
    ]


@pytest.mark.field
def test_a_second_end_token_ends_a_response_that_does_not_count_as_truncated(tiny_model, second):
    """huggingface/trl#7039."""
    (other,), ends = second
    prompt = setup.prompt(tiny_model, 0, num_images=0)
    requests = [setup.request(prompt, str(k), max_tokens=64, seed=k) for k in range(120)]
    completions = other.generate(requests)
    last = [c.token_ids[-1] for c in completions if c.finish_reason == "stop"]
    assert set(last) == set(ends)
    for found in completions:
        assert len(found.logprobs) == len(found.token_ids)
        assert not set(found.token_ids[:-1]) & set(ends)  # the end is a token of the response
        assert (found.finish_reason == "length") == (found.token_ids[-1] not in ends)


def test_a_collected_engine_leaves_the_others_and_the_process_group_alone(
    tiny_model, engine, second
):
    request = setup.request(setup.prompt(tiny_model, 0), "a", seed=1)
    (before,) = engine.generate([request])
    collected = second[0].pop()
    collected.generate([replace(request, vision=None, token_ids=(30,))])
    alive = weakref.ref(collected)
    del collected
    gc.collect()
    assert alive() is None
    assert torch.distributed.is_initialized()
    assert engine.generate([request])[0].token_ids == before.token_ids


def test_norms_and_products_on_a_cpu_are_compiled_ones_on_the_weights_themselves(
    tiny_model, engine
):
    prompt = setup.prompt(tiny_model, 0, num_images=1)
    with torch.profiler.profile() as profiled:
        engine.generate([setup.request(prompt, "norms", max_tokens=2)])
    names = {event.key for event in profiled.key_averages()}
    assert {"_C::rms_norm", "_C::fused_add_rms_norm"} <= names
    assert "aten::rsqrt" not in names and not any("onednn" in name for name in names), names


def test_prompts_of_less_than_two_blocks_are_computed_once_in_a_step(
    tiny_model, engine, monkeypatch
):
    ids = (setup.prompt(tiny_model, 0, num_images=0).token_ids * 24)[:24]
    schedule, computed = engine.scheduler.schedule, []

    def recorded(*arguments, **named):
        output = schedule(*arguments, **named)
        computed.append(list(output.num_scheduled_tokens.values()))
        return output

    monkeypatch.setattr(engine.scheduler, "schedule", recorded)
    engine.generate([setup.Request(f"short {n}", ids, None, max_tokens=1) for n in range(3)])
    assert computed[0] == [24, 8, 8]


def test_sync_is_rejected_between_the_steps_of_a_request(tiny_model, engine):
    engine.submit([setup.request(setup.prompt(tiny_model, 0), "a", max_tokens=3)])
    with pytest.raises(EngineError, match="working on 1 request"):
        engine.sync(iter(()), version=7)
    while engine.num_live:
        engine.step()
