"""What a head is, for people and scripts: ``griffin inspect``."""

from __future__ import annotations

from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from griffin_vllm.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    DRAFT_TO_TARGET,
    TARGET_TO_DRAFT,
    Head,
    read_target_config,
    tensor_shapes,
)
from griffin_vllm.config import target_sizes
from griffin_vllm.errors import GriffinError

# The table that is looked for stands at a card's beginning.
MOST_CARD_LINES = 200


def describe(head: Head) -> dict[str, Any]:
    """Sizes, provenance and place of a head, ready for JSON."""
    card = head.folder / CARD_FILE
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
        "training": _first_table(card) if card.is_file() else {},
    }


def _first_table(card: Path) -> dict[str, str]:
    """A model card's first table of two columns, which `griffin train` fills with how the head was trained."""
    rows: dict[str, str] = {}
    with card.open(encoding="utf-8", errors="replace") as file:
        for line in islice(file, MOST_CARD_LINES):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if line.startswith("|") and len(cells) == 2:
                rows[cells[0]] = cells[1]
            elif rows:
                break
    return {name: value for name, value in rows.items() if name.strip("-")}


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
