"""FP8 as a region that is entered under a recipe; nothing in it is computed in FP8."""

import contextlib

STATE = {"recipe": None}
"""Of the region that the program is in; None outside."""


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return STATE["recipe"] is not None


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
    assert enabled and fp8_recipe is not None and not calibrating
    before, STATE["recipe"] = STATE["recipe"], fp8_recipe
    try:
        yield
    finally:
        STATE["recipe"] = before


def fp8_model_init(*args, **kwargs):
    raise NotImplementedError("the double keeps no weights in FP8")
