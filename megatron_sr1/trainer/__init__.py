"""The training loops: supervised fine-tuning, and GRPO with self-reward."""
