"""Checks of the trainer on the GPUs of this machine, a row of a table each (docs/gpu.md)."""
