"""Packaging of ds_slm: all metadata is here; pyproject.toml holds only the settings of tools.

ds_configs/, hostfiles/ and sft/ belong to the checkout, so the project is installed with `pip install -e .`.
Ranges are what ought to work; constraints.txt pins what was tested.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "ds_slm" / "__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None

setup(
    name="ds-slm",
    version=VERSION[1],
    description="Train small language models with DeepSpeed, from raw text to a published model card",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["ds_slm", "ds_slm.*", "sft"]),
    package_data={"ds_slm.publish": ["*.jinja"], "ds_slm.recipe": ["library/*.toml"], "ds_slm.model": ["*.cpp"]},
    entry_points={
        "console_scripts": ["ds-slm = ds_slm.cli.main:run"],
        "torchrun.handlers": ["ds-slm = ds_slm.cluster.rendezvous:handler"],
    },
    install_requires=[
        "bitsandbytes>=0.49,<1",
        "datasets>=4,<6",
        "deepspeed>=0.19.8,<0.20",
        "gguf>=0.17,<1",  # `ds-slm export --gguf`
        "huggingface-hub>=1,<3",
        "jinja2>=3.1,<4",  # chat templates, and a report's page
        "matplotlib>=3.9,<4",  # the curves beside a model card, and in a report
        "ninja>=1.11",  # DeepSpeed's offload compiles an op with it
        "numpy>=2,<3",
        "protobuf>=5",  # transformers reads a SentencePiece tokenizer.model with it
        "psutil>=6",
        "pyarrow>=17",
        "pydantic>=2.11,<3",
        "regex>=2024.5",
        "rich>=13",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2,<1",
        "setuptools>=70",  # and with it
        "tensorboard>=2.18,<3",
        "tiktoken>=0.9,<1",
        "tokenizers>=0.22,<1",
        "tomli-w>=1.1,<2",
        "torch>=2.11,<3",
        "transformers>=5.17,<6",
        "typer>=0.16,<1",
    ],
    extras_require={
        "device-map": ["accelerate>=1.10,<2"],  # transformers' device_map="..." needs it
        "eval": ["lm-eval>=0.4.13,<0.5"],
        "mlx": ["mlx[cpu]>=0.32,<1", "mlx-lm>=0.32,<1"],  # for a slow test; it has wheels for glibc 2.35 and newer
        "dev": [
            "accelerate>=1.10,<2",  # lm_eval's own scorer, the oracle of ours, needs it
            "hypothesis>=6.120",
            "lm-eval>=0.4.13,<0.5",
            "pyright[nodejs]>=1.1.400",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "ruff>=0.12",
            "trl>=1.16,<2",  # an oracle of the labels
            "xllamacpp>=2026.10",  # llama.cpp in the process, the oracle of GGUF files
            "xxhash>=3",
        ],
    },
)
