"""Import what a rank needs, without running a thread of ours: processes are forked afterwards."""

import atexit
import gc
import importlib

from megatron_sr1.rollout.vllm_api import set_environment
from megatron_sr1.runtime import cpu
from megatron_sr1.runtime.cpu import patch_torchvision

set_environment()
patch_torchvision()
cpu.install()
for _name in ("distributed", "optimizer", "dist_checkpointing", "pipeline_parallel"):
    importlib.import_module(f"megatron.core.{_name}")
for _name in ("stages", "report.report", "trainer.grpo", "trainer.sft"):
    importlib.import_module(f"megatron_sr1.{_name}")
_transformers = importlib.import_module("transformers")
assert _transformers.AutoTokenizer and _transformers.Qwen2VLImageProcessor
importlib.import_module("vllm")
importlib.import_module("vllm.model_executor.models.qwen2_5_vl")
assert importlib.import_module("vllm.platforms").current_platform.is_cpu()
_wandb_media = importlib.import_module("wandb.sdk.data_types._private").MEDIA_TMP
for _folder in (_wandb_media, importlib.import_module("wandb").Artifact._TMP_DIR):
    atexit.unregister(_folder.cleanup)  # the first rank to end would remove it for the later ones
    _folder._finalizer.detach()
gc.freeze()  # a rank's collections need not visit the libraries
