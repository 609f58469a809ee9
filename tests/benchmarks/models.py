"""The tiny models of the serving tests and a prompt file, as the benchmarks' command lines want them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving import tiny

CONVERSATIONS = 4


def write_models(folder: Path) -> None:
    """``target``, a ``head`` that is often right, a ``worse`` one, and ``prompts.jsonl`` of two turns each."""
    tiny.write_target(folder / "target")
    tiny.write_head(folder / "head")
    tiny.write_head(folder / "worse")
    weights = folder / "worse" / "model.safetensors"
    tensors = load_file(weights)
    torch.manual_seed(2)
    tensors["fc.fc.weight"] += 0.2 * torch.randn(tensors["fc.fc.weight"].shape)
    save_file(tensors, weights)
    lines = [
        json.dumps({"question_id": i, "turns": [f"question {i * i}", "and then?"]})
        for i in range(CONVERSATIONS)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


def arguments(folder: Path, methods: str, *more: str) -> list[str]:
    """A command line for the models in ``folder``; the record goes to ``out.json``."""
    options = {
        "--target": folder / "target",
        "--methods": methods,
        "--prompts": folder / "prompts.jsonl",
        "--num-speculative-tokens": 3,
        "--max-tokens": 24,
        "--max-model-len": 256,
        "--dtype": "float32",
        "--kv-cache-gib": 0.05,
        "--json": folder / "out.json",
    }
    return [str(word) for option in options.items() for word in option] + ["--enforce-eager", *more]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


@contextmanager
def engines_in_this_process() -> Iterator[pytest.MonkeyPatch]:
    """Engines start in seconds here, and a test can plant a fault in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        yield patch
