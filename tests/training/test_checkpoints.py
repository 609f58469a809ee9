"""Checkpoints are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from griffin_vllm.errors import GriffinError
from griffin_vllm.training.checkpoints import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tests.full_disk import full_disk


def state(step: int) -> TrainingState:
    return TrainingState(
        step, 1.0, {"weight": torch.full((1000,), float(step))}, {"state": {0: torch.ones(9)}}
    )


def test_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, state(7)))
    assert loaded.step == 7
    assert torch.equal(loaded.weights["weight"], state(7).weights["weight"])
    assert torch.equal(loaded.optimizer["state"][0], torch.ones(9))


def test_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_full_disk_is_one_line_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, state(1))
    with (
        full_disk(),
        pytest.raises(GriffinError, match=r"cannot be written .* the last good one is .*step-00000001"),
    ):
        save_checkpoint(tmp_path, state(2))
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert load_checkpoint(good).step == 1


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1))
    (path / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(GriffinError, match=r"step-00000001: is damaged .*remove it"):
        load_checkpoint(path)


def test_folder_that_was_being_written_when_the_process_died_does_not_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    (tmp_path / ".step-00000002.abcd").mkdir()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000001"
