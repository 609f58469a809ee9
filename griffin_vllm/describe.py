"""What a head is, for people and scripts: ``griffin inspect``."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from griffin_vllm.checkpoint import CONFIG_FILE, DRAFT_TO_TARGET, TARGET_TO_DRAFT, Head, tensor_shapes
from griffin_vllm.config import target_sizes
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import exists_here, read_json


def describe(head: Head) -> dict[str, Any]:
    """Sizes, provenance and place of a head, ready for JSON."""
    card = head.folder / "README.md"
    return {
        "folder": str(head.folder),
        "layout": "served" if head.is_served_layout else "reference",
        "weights": head.weights.name,
        "parameters": sum(
            prod(shape)
            for name, shape in tensor_shapes(head.config).items()
            if name not in (DRAFT_TO_TARGET, TARGET_TO_DRAFT)
        ),
        **head.config.model_dump(),
        "model_card": str(card) if card.is_file() else None,
    }


def misfit(head: Head, target: str) -> str | None:
    """Why ``head`` cannot serve ``target`` (folder or Hub id), or None when it can.

    Raises:
        GriffinError: there is no such target.
    """
    sizes = target_sizes(_target_config(target), target)
    try:
        head.config.check_target(head.folder / CONFIG_FILE, *sizes)
    except GriffinError as error:
        return str(error)
    return None


def _target_config(target: str) -> dict[str, Any]:
    if exists_here(target):
        return read_json(Path(target) / CONFIG_FILE)
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(target, CONFIG_FILE)))
    except GriffinError:
        raise
    except Exception as error:  # offline, no such repository, no access: the client has one class for each
        raise GriffinError(
            f"{target}: is no folder and not on the Hub ({GriffinError.reason(error)})"
        ) from error
