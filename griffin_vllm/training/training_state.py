"""Training checkpoints: whole or absent, and enough to continue bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from griffin_vllm.errors import GriffinError
from griffin_vllm.files import atomic_folder

KEEP = 2
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainingState:
    """``step``: optimiser steps done; ``weights``: the head in float32; ``optimizer``: its state dict."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def save_checkpoint(folder: Path, state: TrainingState) -> Path:
    """Write ``folder/step-N`` and forget all but the last two.

    Raises:
        GriffinError: the disk is full or not writable; the earlier checkpoints are untouched.
    """
    path = folder / f"step-{state.step:08d}"
    try:
        with atomic_folder(path) as staging:
            save_file({k: v.contiguous() for k, v in state.weights.items()}, staging / "head.safetensors")
            torch.save(state.optimizer, staging / "optimizer.pt")
            (staging / "state.json").write_text(json.dumps({"step": state.step}), encoding="utf-8")
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch.save's error for a full disk is the second
        kept = latest_checkpoint(folder)
        remains = f"the last good one is {kept}" if kept else "there is none before it"
        raise GriffinError(f"{path}: cannot be written ({GriffinError.reason(error)}); {remains}") from error
    # the second are what a process that was killed while it wrote has left
    for old in (*_checkpoints(folder)[:-KEEP], *folder.glob(".step-*")):
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path) -> TrainingState:
    """Raises GriffinError where a file was damaged after it was written."""
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return TrainingState(
            meta["step"],
            load_file(path / "head.safetensors"),
            torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        )
    except (
        *(OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError),
        *(ValueError, KeyError, TypeError),
    ) as error:
        raise GriffinError(
            f"{path}: is damaged ({GriffinError.reason(error)}); remove it to continue from the one before"
        ) from error


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(_checkpoints(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
