"""Adapters that PEFT itself makes and saves, on the tiny model."""

import torch

EVERYWHERE = r".*(_proj|visual\..*qkv|visual\..*attn\.proj|merger\.mlp\.[02])"
LANGUAGE = r".*language_model\..*_proj"


def base_model(directory):
    from transformers import Qwen2_5_VLForConditionalGeneration

    from megatron_sr1.runtime.cpu import patch_torchvision

    patch_torchvision()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def peft_adapter(model_dir, seed=0, dtype=torch.float32, **settings):
    """A PEFT model with random A and B; settings are those of LoraConfig."""
    import peft

    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 6, "target_modules": EVERYWHERE, "init_lora_weights": False}
    model = peft.get_peft_model(base_model(model_dir), peft.LoraConfig(**given | settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).mul(0.1).to(dtype)
    return model.eval()
