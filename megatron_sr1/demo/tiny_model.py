"""A tiny Qwen2.5-VL with random weights, for the demo and for tests.

In: texts to train a byte-pair vocabulary on. Out: a complete Hugging Face directory, which
transformers and vLLM read like a published checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

MAX_VOCABULARY = 4096
"""Most tokens of a vocabulary that is trained here; an embedding may have more rows."""
SPECIAL_NAMES = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad"
SPECIAL_TOKENS = [f"<|{name}|>" for name in SPECIAL_NAMES.split()]
# Without a default system turn. Each image of a turn becomes one pad between its marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(
    directory: str | Path,
    corpus: Iterable[str],
    *,
    vocab_size: int = 384,
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 2,
    tie_word_embeddings: bool = True,
) -> None:
    """Write a tiny Qwen2.5-VL with random float32 weights.

    The byte-pair vocabulary of the corpus has at most `vocab_size` tokens, the embedding has that
    many rows. `hidden_size` and `num_layers` are those of the language model; the former is a
    multiple of 64, as heads have 32 channels. The vision tower has two layers.
    """
    heads = hidden_size // 32
    write_random_model(
        Path(directory),
        corpus,
        text={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope(10000.0, 4, 6, 6),
            "tie_word_embeddings": tie_word_embeddings,
        },
        vision={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": hidden_size,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        seed=seed,
    )


def rope(theta: float, *sections: int) -> dict[str, Any]:
    """Return transformers' parameters of a rotary embedding; sections are time, height, width."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}


def write_random_model(
    target: Path,
    corpus: Iterable[str],
    text: dict[str, Any],
    vision: dict[str, Any],
    seed: int,
    device: str = "cpu",
    change: Callable[[Any], Any] = lambda model: model,
) -> None:
    """Write a Hugging Face directory of a Qwen2.5-VL with random weights.

    The vocabulary is trained on the corpus and may be smaller than the embedding. `text` and
    `vision` are transformers' settings of both parts. The weights are drawn on `device`, as
    transformers initialises them, in float32; `change` returns the model to save.
    """
    import torch

    from megatron_sr1.runtime.cpu import patch_torchvision

    patch_torchvision()
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
    )

    target.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(target, corpus, min(text["vocab_size"], MAX_VOCABULARY))
    ends = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    config = Qwen2_5_VLConfig(
        text_config={**text, **ends},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = change(Qwen2_5_VLForConditionalGeneration(config))
    model.save_pretrained(target)
    Qwen2VLImageProcessor(min_pixels=784, max_pixels=200704).save_pretrained(target)


def _write_tokenizer(target: Path, corpus: Iterable[str], vocab_size: int) -> dict[str, int]:
    """Train and write the tokenizer; return the ids of its special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # One digit a token, with the space before it; a tag with its space can become one token.
    words = Regex(r" ?\p{N}| ?[^\s\p{N}]+|\s")
    split = pre_tokenizers.Split(words, behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["user\nassistant\n"] * 1000
    tokenizer.train_from_iterator(chain(corpus, roles), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(target)
    # The trainer numbers them first.
    return {token: number for number, token in enumerate(SPECIAL_TOKENS)}
