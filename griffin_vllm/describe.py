"""What a head is, for people and scripts: ``griffin inspect``."""

from __future__ import annotations

from math import prod
from typing import Any

from griffin_vllm.checkpoint import (
    CONFIG_FILE,
    DRAFT_TO_TARGET,
    TARGET_TO_DRAFT,
    Head,
    read_target_config,
    tensor_shapes,
)
from griffin_vllm.config import target_sizes
from griffin_vllm.errors import GriffinError


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
    sizes = target_sizes(read_target_config(target, download=True), target)
    try:
        head.config.check_target(head.folder / CONFIG_FILE, *sizes)
    except GriffinError as error:
        return str(error)
    return None
