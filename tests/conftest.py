"""What tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_target() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder, written on first use."""
    folder = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.importorskip("gguf")
        from griffin_vllm.demo import write_demo_model

        write_demo_model(folder)
    return folder
