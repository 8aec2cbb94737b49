"""Models of Transformer Engine's layers against local ones, on ranks; see test_te_double.py.

Run as `te_layouts.py CASES LAYOUT…` with the double on the path. What is expected comes from local
layers in one process.
"""

import sys
from pathlib import Path

import transformer_engine

from megatron_sr1.config.run import ParallelConfig
from megatron_sr1.model import layers
from megatron_sr1.runtime.device import select_device, start_distributed
from megatron_sr1.runtime.groups import make_groups
from tests.distributed.ranks import model_layouts
from tests.layouts import destroy_groups


def main():
    from megatron.core.extensions import transformer_engine as extensions

    assert "te_double" in transformer_engine.__file__ and extensions.HAVE_TE
    cases = sorted(Path(sys.argv[1]).iterdir())
    layouts = sys.argv[2:]
    device = select_device("cpu")
    start_distributed(device)
    alone = make_groups(ParallelConfig(), device)
    expected = {case: model_layouts.measure(case, alone) for case in cases}
    layers.require_transformer_engine = lambda: None  # it asks for CUDA
    problems = []
    for layout in layouts:
        destroy_groups()
        groups = make_groups(model_layouts.parallel_of(layout), device)
        for case in cases:
            found = model_layouts.measure(case, groups, layout, spec="transformer_engine")
            gaps = model_layouts.compare(found, expected[case], case)
            bad = {what: gap for what, gap in gaps.items() if not gap < model_layouts.TOLERANCE}
            problems += [f"{case.name} {layout}: {bad}"] if bad else []
    print("\n".join(problems) or f"SAME {len(cases) * len(layouts)} models", flush=True)
    model_layouts.leave(problems)


if __name__ == "__main__":
    main()
