"""Check a resolved configuration: each setting by itself, then settings that depend on others.

A rule yields a message if it is broken; {KEY} in it stands for KEY=VALUE.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from urllib.parse import urlsplit

from megatron_sr1.config.fields import check_setting, settings
from megatron_sr1.config.rollout import LARGEST_LORA_RANK, RewardConfig, SpansConfig
from megatron_sr1.config.run import Config
from megatron_sr1.errors import ConfigError

LARGEST_BETA2 = 0.995
"""Of a second moment in bfloat16: with 8 bits, v * beta2 rounds back to v beyond 1 - 2^-8."""
TAG = re.compile("[A-Za-z][A-Za-z0-9_-]*")
Broken = Iterator[str]


def validate(config: Config) -> None:
    """Check values beyond their types; a ConfigError names key, value and what is accepted."""
    for key, each, value in settings(config):
        check_setting(key, each, value)
    groups: list[Callable[[Config], Broken]] = [_model, _adapter, _memory, _run]
    groups += [_evaluation, _endpoints]
    has_engine = config.stage != "sft" or config.evaluation.generate
    groups += [_prompts, _pass2, _rollout, _reward] if has_engine else []
    groups += [_engine_beside_actor] if has_engine and config.stage != "eval" else []
    groups += [_algorithm] if config.stage == "grpo" else []
    for rules in groups:
        for message in rules(config):
            raise ConfigError(re.sub(r"\{([a-z0-9_.]+)\}", lambda m: _given(config, m[1]), message))


def with_steps(config: Config, num_samples: int) -> Config:
    """Return the configuration with `num_epochs` and `warmup_ratio` as steps and updates; check it.

    `num_samples` is the number of training samples. Epochs are counted without the prompts that
    `algorithm.filter_groups` draws besides.
    """
    optimizer = config.optimizer
    if optimizer.num_epochs is not None:
        steps = _rounded_up(optimizer.num_epochs * num_samples / config.data.prompts_per_step)
        optimizer = replace(optimizer, num_steps=max(steps, 1), num_epochs=None)
        config = replace(config, optimizer=optimizer)
    if optimizer.warmup_ratio is not None:
        updates = _rounded_up(optimizer.warmup_ratio * config.num_updates)
        optimizer = replace(optimizer, warmup_steps=updates, warmup_ratio=None)
        config = replace(config, optimizer=optimizer)
    validate(config)
    return config


def _rounded_up(value: float) -> int:
    return math.ceil(round(value, 6))  # 0.1 * 30 is a little more than 3


def _given(config: Config, key: str) -> str:
    value = attrgetter(key)(config)
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _check_patterns(key: str, patterns: Iterable[str], advice: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problem = f"{pattern!r} is no regular expression: {error}"
            raise ConfigError(f"{key}: {problem}; {advice}") from None


def _model(config: Config) -> Broken:
    model, parallel = config.model, config.parallel
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor of 2 or more"
    if parallel.pipeline == 1 and (parallel.virtual > 1 or parallel.stage_layers):
        yield "parallel.virtual and parallel.stage_layers need parallel.pipeline of 2 or more"
    itself = "a published name, with its dots as [.], matches itself"
    _check_patterns("model.freeze", model.freeze, itself)
    if model.fp8 is not None and model.spec != "transformer_engine":
        yield "model.fp8 needs model.spec=transformer_engine"
    if model.bf16_layers_at_start + model.bf16_layers_at_end > 0:
        kept = "{model.bf16_layers_at_start}, {model.bf16_layers_at_end}"
        if model.fp8 is None:
            yield f"{kept}: without model.fp8 no layer is in FP8; set it or leave these out"
        if model.fp8_recipe == "delayed":
            advice = "set model.fp8_recipe=current, blockwise or mxfp8"
            yield f"{kept}: delayed scaling takes all layers or none; {advice}"


def _adapter(config: Config) -> Broken:
    adapter = config.adapter
    if not adapter.rank:
        if adapter.path:
            yield "{adapter.path} needs adapter.rank, which the adapter's own files name"
        return
    if config.stage == "eval":
        advice = "evaluate the merged model in hf/ of a run, or set adapter.rank=0"
        yield f"{{adapter.rank}} with stage=eval, which evaluates model.path as it is; {advice}"
    if config.model.freeze:
        advice = "leave it out; adapter.targets says what is trained"
        yield f"{{model.freeze}} with {{adapter.rank}}, which freezes all weights; {advice}"
    if config.stage == "grpo" and adapter.dropout:
        reason = "the policy that is updated would not be the one that generated"
        yield f"{{adapter.dropout}} with stage=grpo: {reason}; set adapter.dropout=0"
    if not adapter.targets:
        yield "adapter.targets is empty; name layers, such as q_proj"
    _check_patterns("adapter.targets", adapter.targets, "give one such as q_proj")


def _memory(config: Config) -> Broken:
    optimizer, rollout, dtype = config.optimizer, config.rollout, config.trained_dtype
    if config.model.dtype != "bfloat16" and rollout.quantization is not None:
        wrong = "is for weights in bfloat16, not {model.dtype}; set model.dtype=bfloat16"
        yield f"{{rollout.quantization}} {wrong}"
    key, value = "model.dtype", "bfloat16"
    if config.model.dtype != dtype:
        key, value = "adapter.dtype", "model"
    if dtype != "bfloat16":
        wrong = f"is for weights in bfloat16, not {{{key}}}; set {key}={value}"
        for name in ("state", "gradients"):
            if getattr(optimizer, name) == "bfloat16":
                yield f"optimizer.{name}=bfloat16 {wrong} or optimizer.{name}=float32"
    is_special = optimizer.state == "bfloat16" or optimizer.offload
    if is_special and not config.parallel.distributed_optimizer:
        yield "{optimizer.state}, {optimizer.offload} need parallel.distributed_optimizer=true"
    if rollout.make_room == "optimizer" and (dtype == "float32" or is_special):
        yield (
            f"{{rollout.make_room}} with {{{key}}}, {{optimizer.state}}, {{optimizer.offload}}: it "
            "moves float32 state beside bfloat16 weights; set rollout.make_room=gradients, or "
            "optimizer.offload=true to keep the state in host memory always"
        )
    if optimizer.state == "bfloat16" and optimizer.beta2 > LARGEST_BETA2:
        reason = "a second moment in bfloat16 cannot shrink by less than 2^-8 of itself"
        advice = f"set {LARGEST_BETA2} or less"
        yield f"{{optimizer.beta2}} with {{optimizer.state}}: {reason}; {advice}"


def _run(config: Config) -> Broken:
    optimizer, checkpoint, steps = config.optimizer, config.checkpoint, config.logging.profile_steps
    if config.data.min_pixels > config.data.max_pixels:
        yield "{data.min_pixels} is more than {data.max_pixels}"
    if config.stage != "eval" and optimizer.num_steps is None and optimizer.num_epochs is None:
        yield "{optimizer.num_steps}, {optimizer.num_epochs}: set one of them"
    is_decay = optimizer.schedule != "constant"
    if is_decay and optimizer.min_learning_rate > optimizer.learning_rate:
        names = "{optimizer.min_learning_rate} is more than {optimizer.learning_rate}"
        yield f"{names}; a decay ends below its peak"
    if steps:
        if len(steps) != 2 or steps[0] > steps[1]:
            yield f"logging.profile_steps is {steps}; expected [first, last], from 1"
        if config.stage != "eval" and steps[0] > (optimizer.num_steps or steps[0]):
            yield "{logging.profile_steps} begins after the last step, {optimizer.num_steps}"
    if checkpoint.keep_best and config.stage != "eval":
        keep = "{checkpoint.keep_best}"
        if not config.evaluation.sets:
            yield f"{keep} needs an evaluation, and evaluation.sets is empty"
        has_answers = config.stage == "grpo" or config.evaluation.generate
        if not has_answers if checkpoint.best_by != "min loss" else config.stage == "grpo":
            gives = "verdicts" if has_answers else "a loss"
            yield f"{{checkpoint.best_by}}: an evaluation gives {gives} with stage={config.stage}"
        if checkpoint.keep_last == 0:
            yield f"{keep}: checkpoint.keep_last=0 keeps all; set it to 1 or more"
        is_own = checkpoint.best_by in ("max accuracy", "min loss")
        if config.reward.recipe == "vision_r1" and not is_own:
            none = "reward.recipe=vision_r1 has none; use 'max accuracy'"
            yield f"{{checkpoint.best_by}} needs descriptions, and {none}"


def _evaluation(config: Config) -> Broken:
    evaluation = config.evaluation
    for name in evaluation.sets:
        if name in ("average", "weighted_average"):
            yield f"evaluation.sets.{name}: the results over all sets have that name; use another"
        n = evaluation.setting(name, "samples_per_prompt")
        if n > 1 and evaluation.setting(name, "temperature") == 0:
            yield (
                f"evaluation.sets.{name}: {n} greedy responses to a question are one response; set "
                "a temperature above 0, or samples_per_prompt=1"
            )
    if (evaluation.every_steps or evaluation.at_start) and not evaluation.sets:
        keys = "{evaluation.every_steps}, {evaluation.at_start}"
        yield f"{keys}, but evaluation.sets is empty: name a set, evaluation.sets.NAME.path=DIR"


def _prompts(config: Config) -> Broken:
    data, spans = config.data, config.reward.spans
    names = [spans.description, spans.think, spans.answer]
    for key in ("description", "think", "answer"):
        if not TAG.fullmatch(getattr(spans, key)):
            expected = "expected the name of a tag: a letter, then letters, digits, _ and -"
            yield f"{{reward.spans.{key}}}; {expected}, such as {key}"
    if len(set(names)) < len(names):
        yield (
            "{reward.spans.description}, {reward.spans.think}, {reward.spans.answer}: expected "
            "three different names, as each marks a span of its own"
        )
    passes = ["pass1"] if config.reward.recipe == "vision_r1" else ["pass1", "pass2"]
    for key in [f"{each}_template" for each in passes if spans != SpansConfig()]:
        if getattr(data, key).partition("_")[0] == "full":
            wanted = "<description>, <think> and \\boxed{}, and reward.spans has others"
            yield f"{{data.{key}}} asks for {wanted}; give a template of your own (docs/prompts.md)"


def _endpoints(config: Config) -> Broken:
    expected = "expected an address such as http://127.0.0.1:8000/v1"
    for key, endpoint in config.endpoints().items():
        try:
            url = urlsplit(endpoint.base_url)
            is_address = url.scheme in ("http", "https") and bool(url.hostname)
        except ValueError:  # such as an unclosed bracket
            is_address = False
        if not is_address:
            yield f"{{{key}.base_url}}; {expected}"
        if url.username or url.password or url.query:
            reason = "it would be written to files; name a variable that holds the key"
            yield f"{key}.base_url has a user, a password or a query: {reason}, {key}.api_key_env"
        if not endpoint.model:
            yield f"{key}.model is not set; name the model at {{{key}.base_url}}"


def _pass2(config: Config) -> Broken:
    rollout = config.rollout
    by_likelihood, is_greedy = rollout.pass2_mode == "likelihood", rollout.pass2_temperature == 0
    several = rollout.pass2_samples > 1
    if by_likelihood and (several or not is_greedy):
        unused = "{rollout.pass2_samples} and {rollout.pass2_temperature} would do nothing"
        advice = "leave both out or set pass2_mode=generate"
        yield f"rollout.pass2_mode=likelihood samples no answers, {unused}; {advice}"
    if several and is_greedy:
        yield "{rollout.pass2_samples} greedy answers are one answer; set rollout.pass2_temperature"
    if config.stage == "grpo" and config.reward.recipe != "vision_sr1":
        for setting, is_set in {
            "rollout.pass2_mode": rollout.pass2_mode != "generate",
            "rollout.pass2_samples": several,
            "reward.question_baseline": config.reward.question_baseline,
        }.items():
            if is_set:
                lacking = "is about the self-reward, and {reward.recipe} has none"
                yield f"{{{setting}}} {lacking}; use recipe=vision_sr1"


def _reward(config: Config) -> Broken:
    reward, plain = config.reward, RewardConfig()
    bounds = reward.function_range
    if len(bounds) != 2 or bounds[0] >= bounds[1]:
        yield "{reward.function_range}; expected the lowest and the highest value, such as [-1, 1]"
    if not reward.function:
        for key in ("function_for", "function_range", "arguments"):
            if getattr(reward, key) != getattr(plain, key):
                yield f"{{reward.{key}}} is about reward.function, which is not set"
    if config.stage != "grpo":
        return
    cache, longest = reward.overlong.cache_tokens, config.rollout.max_response_tokens
    if cache > longest:
        yield "{reward.overlong.cache_tokens} is more than {rollout.max_response_tokens}"
    if config.algorithm.credit != "scalar" and (cache or reward.function_for == "total"):
        unused = "reward.overlong" if cache else "{reward.function_for}"
        problem = f"{unused} is part of the total, which {{algorithm.credit}} does not use"
        yield f"{problem}; use credit=scalar"


def _rollout(config: Config) -> Broken:
    data, rollout = config.data, config.rollout
    if rollout.top_p != 1.0 or rollout.top_k != 0:
        reason = "training rollouts are sampled from the whole distribution"
        yield f"{{rollout.top_p}}, {{rollout.top_k}}: {reason}; set top_p=1 and top_k=0"
    if data.max_prompt_tokens + rollout.max_response_tokens > rollout.max_model_len:
        total = "{data.max_prompt_tokens} + {rollout.max_response_tokens}"
        advice = "raise the last or lower one of the others"
        yield f"{total} is more than {{rollout.max_model_len}}; {advice}"


def _engine_beside_actor(config: Config) -> Broken:
    adapter, rollout = config.adapter, config.rollout
    if rollout.make_room == "weights":
        if adapter.rank == 0 and not config.model.freeze:
            advice = "set adapter.rank or model.freeze, or make_room=gradients"
            yield f"{{rollout.make_room}} is about weights that are not trained; {advice}"
        both = "holds weights of engine and actor on the GPU together, which make_room avoids"
        if rollout.sleep_level == 0:
            yield f"{{rollout.make_room}}: {{rollout.sleep_level}} {both}; set 1 or 2"
        if rollout.canary_bound:
            yield f"{{rollout.make_room}}: {{rollout.canary_bound}} {both}; set it to 0"
    if rollout.lora == "merged":
        return
    if adapter.rank == 0:
        yield "{rollout.lora} needs adapters; set adapter.rank, or rollout.lora=merged"
    if adapter.rank > LARGEST_LORA_RANK:
        yield f"{{rollout.lora}}: {{adapter.rank}} is above {LARGEST_LORA_RANK}; use lora=merged"
    if rollout.sleep_level == 2:
        reason = "sleep level 2 drops the weights that the adapters are added to"
        yield f"{{rollout.lora}} with {{rollout.sleep_level}}: {reason}; set sleep_level=1"
    if rollout.quantization is not None:
        reason = "adapters beside quantised weights are not checked"
        yield f"{{rollout.lora}} with {{rollout.quantization}}: {reason}; use lora=merged"


def _algorithm(config: Config) -> Broken:
    if config.rollout.samples_per_prompt < 2:
        reason = "responses to a prompt are compared, and one alone would teach nothing"
        advice = "set 2 or more, for example 8"
        yield f"{{rollout.samples_per_prompt}} with stage=grpo: {reason}; {advice}"
    if config.algorithm.credit != "scalar" and config.reward.recipe != "vision_sr1":
        problem = "{algorithm.credit} divides the self-reward, and {reward.recipe} has none"
        yield f"{problem}; use credit=scalar or recipe=vision_sr1"
    if config.data.prompts_per_step % config.algorithm.prompts_per_update > 0:
        yield "{algorithm.prompts_per_update} does not divide {data.prompts_per_step}"
