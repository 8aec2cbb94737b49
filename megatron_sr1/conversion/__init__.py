"""Conversion between Hugging Face directories and Megatron checkpoints, one tensor at a time."""
