"""Settings of the data: shards, image sizes, packing."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.config.fields import choice, number


@dataclass
class DataConfig:
    """Shards and how a step is drawn from them."""

    train: str = ""
    """Folder of webdataset shards to learn from (tools/make_shards.py writes them)."""
    eval: str = ""
    """Folder of webdataset shards held out."""
    eval_limit: int = number(0, at_least=0)
    """Use the first so many held-out samples; 0 means all."""
    prompts_per_step: int = number(512, at_least=1)
    """GRPO: prompts rolled out a step; SFT: sequences a step."""
    shuffle: bool = True
    """New order each epoch, from the seed."""
    prompt_style: str = choice("full", "full", "brief")
    """Instructions: full (published models) | brief (a model that was trained on them)."""
    packing: bool = True
    """Sequences share micro-batches; false: each has its own."""
    pack_tokens: int = number(8192, at_least=1)
    """Budget of a micro-batch: its tokens, and its images' patches at what a patch takes of the
    work of a token (docs/scaling.md); a larger sequence gets one of its own."""
    max_prompt_tokens: int = number(6000, at_least=1)
    """Longer prompts and conversations (images expanded) are skipped and counted."""
    max_skipped: int = number(100, at_least=0)
    """So many bad or too long samples stop the run."""
    min_pixels: int = number(262144, at_least=784, at_most=2**27)
    """Smallest image area, pixels; a token of the language model is 28 x 28."""
    max_pixels: int = number(4194304, at_least=784, at_most=2**27)
    """Largest image area, pixels; rounding to patches may exceed it (docs/data.md)."""

    @property
    def row_budget(self) -> int:
        """Budget of a micro-batch, tokens; 0 if each sequence has a micro-batch of its own."""
        return self.pack_tokens if self.packing else 0
