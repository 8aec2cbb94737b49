"""Adapters in one process: what is refused, what is trained and kept, dropout, initial values."""

import json
from dataclasses import asdict

import pytest
import torch

from megatron_sr1.checkpoint.adapters import initial_value, local_adapters
from megatron_sr1.checkpoint.folders import resolve_model
from megatron_sr1.checkpoint.mapping import adapter_entries, linear_modules
from megatron_sr1.checkpoint.megatron_optimizer import ensure_state
from megatron_sr1.checkpoint.tensors import sharded_state
from megatron_sr1.config.adapter import AdapterConfig
from megatron_sr1.config.loading import load_config
from megatron_sr1.errors import CheckpointError, ConfigError
from megatron_sr1.model.adapters import AdaptedOutput, Adapters, LowRank
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.groups import Group
from megatron_sr1.trainer.actor import Reference, add_adapters, load_actor_model, make_actor
from megatron_sr1.trainer.context import Context
from megatron_sr1.trainer.step import update
from tests.checkpoint_run import text_row

COMMON = ["stage=grpo", "data.train=x", "optimizer.num_steps=4", "adapter.rank=4"]


def make_run(model, groups, *settings, output="unused"):
    keys = [f"model.path={model}", f"output={output}", "model.dtype=float32", *COMMON, *settings]
    config = load_config(None, keys)
    chunks, hf_config, source = load_actor_model(config, groups)
    add_adapters(config, chunks, hf_config, groups)
    return config, make_actor(config, chunks, hf_config, source, groups, num_updates=4)


def mean_loss(logprobs, batch, non_loss_data=False):
    total, count = -(logprobs * batch.loss_mask).sum(), batch.loss_mask.sum()
    return total, count.int(), {"loss": (total.detach(), count)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stage=eval"], "stage=eval, which evaluates model.path as it is"),
        (["model.freeze=['^visual[.]']"], "freezes all weights"),
        (["adapter.dropout=0.1"], "would not be the one that generated"),
        (["adapter.targets=[]"], "adapter.targets is empty"),
        (["adapter.targets=['(']"], "is no regular expression"),
        (["optimizer.state=bfloat16", "model.dtype=bfloat16"], "not adapter.dtype=float32"),
        (["optimizer.gradients=bfloat16", "model.dtype=bfloat16"], "set adapter.dtype=model"),
        (["rollout.make_room=optimizer", "model.dtype=bfloat16"], "with adapter.dtype=float32"),
        (["adapter.rank=0", "adapter.path=x"], "needs adapter.rank"),
    ],
)
def test_settings_that_adapters_cannot_honour_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["model.path=x", "model.dtype=float32", *COMMON, *settings])


@pytest.mark.parametrize("pattern", ["embed_tokens", "lm_head", "patch_embed", "norm", "qq_proj"])
def test_a_target_that_is_no_linear_layer_is_refused(pattern, tiny_model):
    with pytest.raises(ConfigError, match=f"adapter.targets: '{pattern}' matches no linear layer"):
        adapter_entries(read_hf_config(tiny_model), ["q_proj", pattern], 4)


def test_gradients_state_and_checkpoint_are_of_adapters_alone_to_the_byte(tiny_model, groups):
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    _, actor = make_run(tiny_model, groups)
    pairs = adapter_entries(actor.hf_config, AdapterConfig().targets, 4)
    count = sum(s[0] * s[1] for pair in pairs.values() for e in pair for s in e.hf_shapes)
    assert len(pairs) == 2 * 7
    buffers = [buffer for wrapped in actor.wrapped for buffer in wrapped.buffers]
    assert sum(buffer.grad_data.nbytes for buffer in buffers) == 4 * count
    with cpu.megatron_mode():
        update(actor, [text_row()], mean_loss, temperature=1.0)
        ensure_state(actor.optimizer)
        kept = sharded_state(actor.wrapped, actor.optimizer, is_loading=False)
    (inner,) = actor.optimizer.chained_optimizers
    moments = [t for state in inner.optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(t.nbytes for t in moments) == 2 * 4 * count  # weights are their own master
    tensors = [item.data for item in nested_values(kept) if hasattr(item, "replica_id")]
    assert sum(getattr(tensor, "nbytes", 0) for tensor in tensors) == (1 + 3) * 4 * count
    reference = Reference(actor.chunks)
    assert not reference._frozen and not reference._parameters


def test_bfloat16_weights_stay_while_float32_adapters_learn(tiny_model, groups):
    config, actor = make_run(
        tiny_model, groups, "model.dtype=bfloat16", "parallel.distributed_optimizer=false"
    )
    assert config.trained_dtype == "float32"
    before = {n: p.detach().clone() for n, p in actor.chunks[0].named_parameters()}
    for _ in range(2):
        update(actor, [text_row()], mean_loss, temperature=1.0)
    own = {id(parameter) for _, parameter in local_adapters(actor.chunks)}
    for name, parameter in actor.chunks[0].named_parameters():
        is_adapter = id(parameter) in own
        assert parameter.dtype == (torch.float32 if is_adapter else torch.bfloat16)
        assert torch.equal(parameter, before[name]) != is_adapter, name
    weights = dict(actor.weights())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_after_the_first_sync_only_layers_with_adapters_and_those_fused_with_them_are_sent(
    tiny_model, groups
):
    _, actor = make_run(tiny_model, groups, "adapter.targets=['layers[.]1[.].*(v_proj|down_proj)']")
    sent = {name for name, _ in actor.weights(actor.frozen)}
    layer = "model.layers.1."
    qkv = [f"{layer}self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")]
    assert sent == {*qkv, f"{layer}mlp.down_proj.weight"}


@pytest.mark.parametrize(
    "change",
    ["adapter.rank=8", "adapter.alpha=8", "adapter.targets=['q_proj']", "adapter.scaling=rslora"],
)
def test_a_checkpoint_is_resumed_with_the_same_adapters_alone(change, saved, groups):
    tiny_model, output = saved
    config, actor = make_run(tiny_model, groups, output=output)
    before = [parameter.detach().clone() for _, parameter in local_adapters(actor.chunks)]
    context = Context(config, groups, 100)
    context.start(actor)
    assert context.step == 1
    after = [parameter for _, parameter in local_adapters(actor.chunks)]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    for settings in ([change], ["adapter.rank=0"]):
        config, actor = make_run(tiny_model, groups, *settings, output=output)
        with pytest.raises(ConfigError, match="was saved with adapter="):
            Context(config, groups, 100).start(actor)


def test_a_checkpoint_of_adapters_is_no_model(saved):
    with pytest.raises(CheckpointError, match=f"holds adapters alone, of {saved[0]}"):
        resolve_model(saved[1] / "checkpoints")


@pytest.fixture(scope="module")
def saved(tiny_model, groups, tmp_path_factory):
    """A model, and a run with adapters of it that saved its first step."""
    output = tmp_path_factory.mktemp("run")
    config, actor = make_run(tiny_model, groups, "checkpoint.every_steps=1", output=output)
    context = Context(config, groups, 100)
    context.start(actor)
    with torch.no_grad():
        for _, parameter in local_adapters(actor.chunks):
            parameter.fill_(0.5)
    context.finish_step({}, actor)
    context.close()
    state = json.loads((output / "checkpoints" / "step_1" / "state.json").read_text())["state"]
    kept = {name: state["adapter"][name] for name in ("rank", "alpha", "scaling", "targets")}
    assert kept.items() <= asdict(config.adapter).items()
    return tiny_model, output


def test_initial_values_have_the_spread_of_pefts_and_depend_on_seed_and_name(tiny_model):
    pairs = adapter_entries(read_hf_config(tiny_model), ["(q|k)_proj"], 64)
    (a, b), (other, _) = list(pairs.values())[:2]
    for init, wanted in (("kaiming", 128**-0.5 / 3**0.5), ("gaussian", 1 / 64)):
        settings = AdapterConfig(rank=64, init=init)
        value = initial_value(a, settings, seed=1)
        assert value.std() == pytest.approx(wanted, rel=0.05) and abs(value.mean()) < 0.1 * wanted
        assert torch.equal(value, initial_value(a, settings, seed=1))
        for changed in (initial_value(a, settings, 2), initial_value(other, settings, 1)):
            assert not torch.equal(value, changed)
        assert not initial_value(b, settings, seed=1).any()


def test_dropout_is_on_each_adapters_own_input_in_training_alone(groups):
    """B A is the identity: what is added is the input as it was dropped."""
    size, probability = 64, 0.25
    parts = [LowRank(torch.eye(size), torch.eye(size), (None, None)) for _ in range(2)]
    hook = AdaptedOutput(
        Adapters({}, scale=1.0),
        parts,
        torch.cat,
        probability,
        is_row=False,
        group=Group.of(torch.distributed.group.WORLD),
        sequence_parallel=False,
    )
    linear, hidden = torch.nn.Linear(size, 2 * size), torch.ones(400, 1, size)
    out = torch.zeros(400, 1, 2 * size)
    with cpu.megatron_mode(), torch.no_grad():
        first, second = hook(linear, (hidden,), (out, None))[0].chunk(2, dim=-1)
        again = hook(linear, (hidden,), (out, None))[0]
        still = hook(linear.eval(), (hidden,), (out, None))[0]
    for part in (first, second):
        assert (part == 0).float().mean() == pytest.approx(0.25, abs=0.02)
        assert part.mean() == pytest.approx(1, abs=0.02)
    assert not torch.equal(first, second) and not torch.equal(first, again[..., :size])
    assert torch.equal(still, torch.ones_like(still))


def test_every_linear_layer_of_the_published_model_can_have_an_adapter(tiny_model):
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    matrices = {name for name, shape in shapes.items() if len(shape) == 2}
    others = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {f"{m}.weight" for m in linear_modules(read_hf_config(tiny_model))} == matrices - others
