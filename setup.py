"""The package: what is installed, and what it needs. The tools' settings: pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-eso",
    version="0.1.0",
    description="Pretraining of Eso-LMs (hybrid autoregressive and diffusion) on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            name + suffix
            for name in ("pretrain", "megatron_eso", "data_tools", "checkpoints_conversion")
            for suffix in ("", ".*")
        ]
    ),
    package_data={"pretrain": ["configs/**/*.toml"]},
    install_requires=[
        "annotated-types",
        "megatron-core==0.16.1",
        "numpy>=1.26",
        "psutil",  # megatron-core's checkpoint writer imports it and does not declare it
        "pyarrow",
        "safetensors",
        "sentencepiece>=0.2.3",
        "tensorboard",
        "tokenizers",
        "torch>=2.6",
        "xxhash",
        "zstandard",
    ],
    extras_require={
        "hf": ["transformers"],
        "wandb": ["wandb"],
        "remote": ["aiohttp", "fsspec", "gcsfs", "s3fs"],
        "dev": [
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-timeout",
            "ruff",
            "s3fs",
            "transformers",
            "webdataset",
        ],
    },
)
