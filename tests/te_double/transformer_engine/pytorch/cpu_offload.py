"""Activations stay where they are."""

import contextlib


def get_cpu_offload_context(enabled, *args, **kwargs):
    assert not enabled, "the double offloads nothing"
    return contextlib.nullcontext(), None
