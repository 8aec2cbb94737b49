"""A chat template and a system prompt of one's own: used everywhere, exported, shown."""

import json
import shutil

import pytest
from PIL import Image

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.examples import Record
from megatron_sr1.data.processor import Processor
from megatron_sr1.data.shards import ShardReader, write_shards
from megatron_sr1.demo.digits import make_digits
from megatron_sr1.demo.tiny_model import CHAT_TEMPLATE
from megatron_sr1.dry_run import dry_run
from megatron_sr1.errors import ConfigError, DataError
from megatron_sr1.records import Example, Message
from megatron_sr1.trainer.actor import load_actor_model, make_actor
from megatron_sr1.trainer.samples import Samples, make_processor

TALK = Example(0, "k", "s.tar", (Message("user", "q"), Message("assistant", "a")), None, 0)
BRIEF = ["data.pass1_template=brief", "data.pass2_template=brief_description_first"]


@pytest.fixture
def template(tmp_path):
    """One that writes no line breaks."""
    path = tmp_path / "own.jinja"
    path.write_text(CHAT_TEMPLATE.replace("\n", ""))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return make_digits(folder, 1, num_train=2, num_eval=2, num_cold_start=2)


def said(processor):
    sample = processor.encode_conversation(TALK)
    return processor.tokenizer.decode(sample.token_ids)


def test_a_chat_template_of_ones_own_replaces_the_models(tiny_model, template):
    own, usual = Processor(tiny_model, 784, 200704, str(template)), Processor(tiny_model, 784)
    assert "\n" in said(usual) and "\n" not in said(own)
    vision = own.vision([Image.new("RGB", (28, 28))])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
    one = Example(0, "k", "s.tar", (Message("user", "<image>q"),), "1", 1)
    assert "\n" not in own.tokenizer.decode(own.encode_prompt(one, vision, messages).token_ids)


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        (None, ConfigError, "No such file or directory; expected a Jinja file"),
        (b"\xff", ConfigError, "not UTF-8"),
        (b"{{ 1 }}\n{% for m in messages %}", DataError, "does not parse: line 2"),
        (b"{{ messages.clear() }}", DataError, "fails: SecurityError"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_with_key_and_file(
    tiny_model, tmp_path, text, error, problem
):
    path = tmp_path / "own.jinja"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(error, match=problem) as caught:
        Processor(tiny_model, 784, 200704, str(path))
    assert str(caught.value).startswith(f"data.chat_template={path}")


def test_an_exported_model_is_asked_as_it_was_trained(tiny_model, template, tmp_path, groups):
    """By this package and by transformers; also where the model has the template in an old file."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    keys = [f"model.path={model}", f"output={tmp_path / 'run'}", "model.dtype=float32"]
    config = load_config(None, [*keys, f"data.chat_template={template}", "stage=sft"])
    chunks, hf_config, source = load_actor_model(config, groups)
    actor = make_actor(config, chunks, hf_config, source, groups, 1)
    actor.save_hf(tmp_path / "run" / "hf")
    exported = Processor(tmp_path / "run" / "hf", 784, 200704)
    assert said(exported) == said(make_processor(config)) != said(Processor(model, 784, 200704))
    assert exported.tokenizer.chat_template == template.read_text()
    files = {p.name for p in (tmp_path / "run" / "hf").iterdir()}
    assert files == {p.name for p in model.iterdir()} - {"chat_template.json"}
    assert (actor.source.hf_files / "chat_template.jinja").read_text() == template.read_text()


def test_a_conversation_gets_the_system_prompt_unless_it_has_a_system_turn(tiny_model, tmp_path):
    turns = (Message("user", "q"), Message("assistant", "a"))
    records = [Record(turns), Record((Message("system", "mine"), *turns))]
    write_shards(records, tmp_path / "talks")
    config = load_config(None, [f"model.path={tiny_model}", "data.system_prompt=Say <image>."])
    samples = Samples(config, str(tmp_path / "talks"), make_processor(config))
    texts = [samples.processor.tokenizer.decode(samples.conversation(i).token_ids) for i in (0, 1)]
    assert texts[0].startswith("<|im_start|>system\nSay <image>.<|im_end|>\n<|im_start|>user\nq")
    assert texts[1].startswith("<|im_start|>system\nmine<|im_end|>\n<|im_start|>user\nq")


def test_a_dry_run_shows_the_prompts_of_both_passes_with_their_special_tokens(tiny_model, shards):
    keys = [f"model.path={tiny_model}", f"evaluation.sets.a.path={shards['eval']}", *BRIEF]
    keys += ["stage=eval", "data.min_pixels=784", "data.max_pixels=200704"]
    text = dry_run(load_config(None, keys), {})
    question = ShardReader(shards["eval"]).example(0).question.removeprefix("<image>")
    assert (
        f"""\
pass 1      shard-000000.tar sample 000000000, 21 tokens, of which 3 of images
    <|im_start|>user
    <|vision_start|><|image_pad|><|vision_end|>{question}
    Describe, think, answer.<|im_end|>
    <|im_start|>assistant
pass 2      25 tokens with (the description)
    <|im_start|>user
    Read: (the description)
    {question}
    Think, answer.<|im_end|>
    <|im_start|>assistant"""
        in text
    )
    nowhere = [*keys, "evaluation.sets.a.path=nowhere"]
    assert "pass 1" not in dry_run(load_config(None, nowhere), {})


def test_shown_prompts_are_short_and_without_control_characters(tiny_model, tmp_path):
    record = Record((Message("user", f"\x1b[31m{'long ' * 5000}"),), "1")
    write_shards([Record((Message("user", "no answer"),)), record], tmp_path / "shards")
    keys = [f"model.path={tiny_model}", f"evaluation.sets.a.path={tmp_path / 'shards'}", *BRIEF]
    keys += ["stage=eval", "data.max_prompt_tokens=50000", "rollout.max_model_len=60000"]
    text = dry_run(load_config(None, keys), {})
    shown = text[text.index("pass 1") :]
    assert "sample 000000001" in shown and "more characters" in shown and len(shown) < 2500
    assert "\x1b" not in text and "\\x1b[31m" in shown
