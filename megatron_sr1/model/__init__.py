"""The actor: Qwen2.5-VL on Megatron-Core, its vision tower and its logprobs."""
