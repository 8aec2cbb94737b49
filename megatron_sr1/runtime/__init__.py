"""Devices, process groups, random state, failures, logs and files: what every package builds on."""
