"""Estimate the memory and the step time of a run from its configuration."""
