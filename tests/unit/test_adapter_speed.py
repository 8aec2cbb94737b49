"""A step with adapters is faster than one that trains all weights, and keeps less."""

from time import perf_counter

import pytest
import torch

from megatron_sr1.demo.digits import corpus_texts
from megatron_sr1.demo.tiny_model import make_tiny_model
from megatron_sr1.trainer.step import update
from tests.checkpoint_run import text_row
from tests.unit.test_adapters import make_run, mean_loss

NUM_TOKENS, NUM_ROUNDS, RANK = 1024, 5, 8


@pytest.mark.slow
def test_a_step_with_adapters_is_faster_at_hidden_size_512(tmp_path, groups):
    make_tiny_model(tmp_path, corpus_texts(), hidden_size=512, num_layers=4)
    settings = {"full": "adapter.rank=0", "adapters": f"adapter.rank={RANK}"}
    actors = {n: make_run(tmp_path, groups, each)[1] for n, each in settings.items()}
    row, seconds = text_row(NUM_TOKENS), {name: [] for name in actors}
    row.input_ids.remainder_(200).add_(10)
    row.labels.remainder_(200).add_(10)
    for number in range(NUM_ROUNDS + 1):
        for name, actor in actors.items():
            start = perf_counter()
            update(actor, [row], mean_loss, temperature=1.0)
            if number:  # the first makes kernels
                seconds[name].append(perf_counter() - start)
    fastest = {name: min(values) for name, values in seconds.items()}
    ratio = fastest["adapters"] / fastest["full"]
    print(f"rank {RANK}: {ratio:.2f} of a full step's {fastest['full']:.2f} s")
    assert ratio < 1 and torch.get_num_threads() == 1
