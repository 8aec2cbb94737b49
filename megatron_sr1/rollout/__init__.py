"""Sampling: the colocated vLLM engine, its weight sync, and the two passes of a rollout."""
