"""Stages of a run: supervised cold start, GRPO with self-reward, evaluation, the demo."""
