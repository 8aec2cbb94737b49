"""Shorter ways of decode steps against vLLM's own: equal sequences, steps and cache blocks."""

import pytest
import rollout_setup as setup

FREE_BLOCKS = 64
"""Too few for all sequences to their end, so that some are preempted and computed again."""


@pytest.fixture(scope="module")
def engine(tiny_model):
    return setup.engine(tiny_model)[0]


def generate(engine, requests, monkeypatch):
    """Return completions, preempted requests, and the number of cached blocks after each step."""
    scheduler, done, cached, preempted = engine.scheduler, {}, [], []
    assert scheduler.reset_prefix_cache()
    pool = scheduler.kv_cache_manager.block_pool
    held = pool.get_new_blocks(pool.get_num_free_blocks() - FREE_BLOCKS)
    preempt = type(scheduler)._preempt_request

    def counted(request, *args, **kwargs):
        preempted.append(request.request_id.rsplit("-", 1)[0])
        return preempt(scheduler, request, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_preempt_request", counted)
        engine.submit(requests)
        while engine.num_live:
            done |= {each.id: each.completion for each in engine.step()}
            cached.append(len(pool.cached_block_hash_to_block))
    pool.free_blocks(held)
    return done, preempted, cached


def test_sequences_steps_and_blocks_are_those_of_vllms_own_methods(tiny_model, engine, monkeypatch):
    prompts = [setup.prompt(tiny_model, k, num_images=k % 3) for k in range(6)]
    monkeypatch.setattr(setup, "SIZES", ((84, 56), (56, 84)))  # as many tokens, other positions
    prompts += [setup.prompt(tiny_model, k) for k in range(2)]
    requests = [
        setup.request(prompt, f"{k}.{n}", seed=10 * k + n, max_tokens=40)
        for k, prompt in enumerate(prompts)
        for n in range(4)
    ]
    short = generate(engine, requests, monkeypatch)
    runner = engine._llm.llm_engine.model_executor.driver_worker.model_runner
    replaced = {
        engine.scheduler.kv_cache_manager: ("allocate_slots",),
        engine.scheduler: ("_try_schedule_encoder_inputs",),
        runner: ("_init_mrope_positions", "_calc_mrope_positions", "_gather_mm_embeddings"),
    }
    for holder, names in replaced.items():
        for name in names:
            monkeypatch.delattr(holder, name)  # the class has vLLM's own
    assert short == generate(engine, requests, monkeypatch)
    _, preempted, cached = short
    assert len(cached) > 40 and max(cached) > FREE_BLOCKS / 2 and len(preempted) > 3
