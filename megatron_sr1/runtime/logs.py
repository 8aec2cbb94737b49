"""What a process writes to the terminal: our log lines, and messages of libraries that matter.

In: `logging.level`. Out: log lines on stderr. Unless the level is debug, messages of libraries that
a user can do nothing about are dropped: warnings about their own future or about optional packages
(`megatron-sr1 doctor` reports what is not installed), loading bars, and the few log lines below.
"""

from __future__ import annotations

import logging
import os
import warnings

EXPECTED = {
    "megatron.core.rerun_state_machine": ("Implicit initialization", "initialized in mode"),
    # Ranks of one replica keep different parts of the optimizer's state.
    "megatron.core.dist_checkpointing.validation": ("common state dict differs",),
    # On a CPU there is one generator for both.
    "megatron.core.tensor_parallel.random": ("CPU RNG state changed within GPU",),
    # The Triton that torch depends on is for GPUs.
    "vllm.triton_utils.importing": ("Triton is installed, but doesn't include CPU backend",),
}
"""Logger -> parts of the messages that every run causes and that mean nothing."""


def configure_logging(level: str) -> None:
    """Log to stderr; ranks other than 0 log warnings only, with their number.

    `level` is debug, info or warning; debug shows everything that libraries write.
    """
    rank = int(os.environ.get("RANK", "0"))
    name = "%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s rank {rank}: %(message)s"
    logging.basicConfig(format=name, datefmt="%H:%M:%S", force=True)
    chosen = getattr(logging, level.upper()) if rank == 0 else logging.WARNING
    logging.getLogger("megatron_sr1").setLevel(chosen)
    if level == "debug":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # rollout/vllm_api.py's is ERROR
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for logger in EXPECTED:
        logging.getLogger(logger).addFilter(_is_unexpected)


def silence_native_warnings(level: str) -> None:
    """Silence warnings of torch's C++ code in this process and its children, unless debugging.

    Must be called before torch is imported. It is meant for runs on one machine: with several, the
    same switch would hide why a rank does not reach the others.
    """
    if level != "debug":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in EXPECTED[record.name])
