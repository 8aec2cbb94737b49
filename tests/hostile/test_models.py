"""Untrusted model directories and configurations are read as data and never executed.

Not covered: tokenizer.json files that are valid but hostile to the tokenizers library.
"""

import json
import shutil

import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.data import sandbox
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import ConfigError, DataError, SR1Error

MAX_TEMPLATE_SECONDS = 0.5
TEMPLATES = {
    "classes of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "builtins": "{{ self.__init__.__globals__.__builtins__.open('executed', 'w') }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('touch executed') }}",
    "formatting": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a name of its own": "{{ open('executed', 'w') }}",
    "importing": "{% import '/etc/hostname' as x %}{{ x }}",
    "including": "{% include '/etc/hostname' %}",
    "no end": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a range without bound": "{% for a in range(10**12) %}x{% endfor %}",
    "8 million characters": "{{ 'x' * 8388608 }}",
    "dividing by zero": "{{ 1 // 0 }}",
    "not closed": "{% for m in messages %}",
    "changing the messages": "{{ messages.clear() }}",
}


@pytest.fixture
def model(tiny_model, tmp_path, monkeypatch):
    """A model's folder without weights; what runs in the test's folder leaves a trace there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def refusal(model, tmp_path):
    """The one line with which the folder is refused, nothing of it having run."""
    with pytest.raises(SR1Error) as error:
        Processor(model, 784, 200704)
    assert not (tmp_path / "executed").exists()
    said = str(error.value)
    assert said.isprintable() and len(said) < 1000 and str(model) in said
    return said


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_runs_in_the_sandbox_and_within_its_time(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "TEMPLATE_SECONDS", MAX_TEMPLATE_SECONDS)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES[name]}))
    assert "chat template" in refusal(model, tmp_path)


@pytest.mark.parametrize("value", [3, None, ["x"], {"default": "x"}])
def test_a_template_that_is_no_text_is_refused(value, model, tmp_path):
    (model / "chat_template.json").write_text(json.dumps({"chat_template": value}))
    assert "expected an object with the text chat_template" in refusal(model, tmp_path)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_code_beside_a_model_is_not_imported(file, model, tmp_path):
    """`auto_map` names classes for transformers to import: used as if it were not there."""
    names = ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoModel")
    values = json.loads((model / file).read_text()) if (model / file).is_file() else {}
    values["auto_map"] = dict.fromkeys(names, "evil.Evil")
    values["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    (model / file).write_text(json.dumps(values))
    (model / "evil.py").write_text("open('executed', 'w')\nclass Evil: pass\n")
    try:
        Processor(model, 784, 200704)
    except DataError as error:
        assert str(error).isprintable()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 100_000),
        ("preprocessor_config.json", b"\x80\x04N."),
        ("preprocessor_config.json", b'{"merge_size": 1e400}'),
        ("preprocessor_config.json", b'{"patch_size": "x"}'),
        ("generation_config.json", b'{"eos_token_id": ["x"]}'),
        ("chat_template.json", b"\xff"),
    ],
)
def test_a_damaged_file_of_a_model_is_reported_in_one_line(file, data, model, tmp_path):
    (model / file).write_bytes(data)
    refusal(model, tmp_path)


CONFIGURATIONS = {
    "an object of Python": ("seed: !!python/object/apply:os.system ['touch executed']", "YAML"),
    "a name of Python": ("output: !!python/name:os.system", "YAML"),
    "a tag of its own": ("output: !evil x", "YAML"),
    "a bomb of aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "\n".join(
            f"{b}: &{b} [{','.join(9 * [f'*{a}'])}]"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "expansion exceeds",
    ),
    "a resolver": ("output: ${oc.create:x}", "interpolations"),
    "another key": ("output: ${model.path}", "interpolations"),
    "a key twice": ("seed: 1\nseed: 2", "YAML"),
    "nested 2,000 deep": ("seed: " + "[" * 2000, "YAML|deep"),
    "not text": ("\x00\x01", "YAML"),
    "a string where a group belongs": ("model: x", 'model is "x"; expected a mapping'),
    "a long key": ("k" * 900 + ": 1", "unknown key"),
    "a long value": (f"model: {{freeze: {'x' * 9000}}}", "expected a list of strings"),
    "unknown groups, 40 deep": ("{a: " * 40 + "1" + "}" * 40, "unknown key"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_hostile_configuration_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, said = CONFIGURATIONS[name]
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        load_config(tmp_path / "run.yaml", ["model.path=x"])
    assert not (tmp_path / "executed").exists()
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
