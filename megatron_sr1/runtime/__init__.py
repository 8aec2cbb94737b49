"""Devices, process groups, seeds and failures: what every room stands on."""
