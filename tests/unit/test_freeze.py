"""Freeze patterns that would do nothing, or half of something, are refused."""

import pytest

from megatron_sr1.errors import ConfigError
from megatron_sr1.model.hf_config import read_hf_config
from megatron_sr1.trainer.actor import freeze


@pytest.mark.parametrize("pattern", ["^vision[.]", "model.layers.9.", "q_proj.bias$"])
def test_pattern_that_matches_nothing_or_a_part_is_refused(tiny_model, pattern):
    with pytest.raises(ConfigError, match="model.freeze"):
        freeze([], read_hf_config(tiny_model), ["^visual[.]", pattern])
