"""The list of checks, the most informative first; free of torch.

A check is a function that is called with a `Bench` and yields rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sr1.gpu_checks.bench import Bench


@dataclass(frozen=True)
class Check:
    """A part of the table.

    Attributes:
        function: module and name, `training:step`; a module without a dot is one of this package.
        meaning: what it means if the check raises.
        seconds: expected on an H100 (an estimate). It is not started with less time left, and is
            stopped after a multiple.
        session: consecutive checks with one name share a process, and what it has built.
        needs: packages that must be installed, by their import names.
        arguments: passed after the bench.
    """

    name: str
    function: str
    meaning: str
    seconds: float
    session: str = "actor"
    needs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


_STEP = "training on a GPU does not work; the trace is in the log beside the table"
VARIANTS: dict[str, tuple[str, ...]] = {
    "model.recompute=selective": (),
    "model.recompute=full": (),
    "optimizer.gradients=bfloat16": (),
    "optimizer.offload=true": (),
    "rollout.make_room=optimizer": (),
    "optimizer.state=bfloat16": ("optimi",),
}
"""Settings of an SFT step that are compared with the default ones, and what they need."""
CHECKS = (
    Check("device", "device:facts", "torch does not run on this GPU", 10),
    Check("actor", "numerics:actor", "the actor does not run on a GPU as it does on a CPU", 30),
    Check("step", "training:step", _STEP, 30),
    Check("attention", "attention:packed_rows", "SDPA does not take our packed rows", 10),
    Check(
        "engine",
        "engine:engine",
        "rollouts on a GPU do not work; the trace is in the log beside the table",
        150,
        session="engine",
        needs=("vllm",),
    ),
    Check(
        "transformer_engine",
        "numerics:transformer_engine",
        "model.spec=transformer_engine does not work here; use model.spec=local",
        60,
        session="te",
        needs=("transformer_engine",),
    ),
    Check(
        "grpo",
        "grpo:run",
        "the stages do not run on a GPU from end to end; read the log beside the table",
        150,
        session="grpo",
        needs=("vllm", "omegaconf", "sklearn", "math_verify"),
    ),
    *(
        Check(name, "training:variant", _STEP, 12, needs=needs, arguments=(name,))
        for name, needs in VARIANTS.items()
    ),
    Check("checkpoint", "training:checkpoint", "a run on GPUs could not be resumed", 45),
    Check("two ranks", "ranks:two_ranks", "data-parallel training over NCCL does not work", 60),
)
"""All checks, the most informative first."""


def make_bench(kind: str, directory: Path, model: Path | None) -> Bench:
    """Return what the checks of a process share; imports torch."""
    from megatron_sr1.gpu_checks.bench import Bench

    return Bench(kind, directory, model)
