"""Megatron-Core trainer for self-rewarding reinforcement learning of vision-language models."""
