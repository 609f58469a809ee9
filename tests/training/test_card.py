"""The model card of a trained head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.export import model_card
from tests.training.tiny import HEAD, settings


def test_card_of_a_long_run_shows_a_few_points_of_its_curves_up_to_the_last(data: Path) -> None:
    log: list[dict[str, Any]] = []
    for step in range(10, 1010, 10):
        log.append({"kind": "train", "step": step, "loss": 1000 / step})
        log.append({"kind": "validation", "step": step, "acceptance_length": 2.0, "accuracy": [0.5, 0.25]})
    config = settings(Path("target"), data, Path("o"))
    card = model_card(HEAD, config, TokenDataset(data, "train").manifest, log, None, 0)
    rows = card.split("accuracy by draft step |\n")[1].splitlines()[1:]
    assert 8 < len(rows) <= 16
    assert rows[-1] == "| 1000 | 1.000 | 2.000 | 0.500, 0.250 |"
    assert "simulated acceptance length" not in card
