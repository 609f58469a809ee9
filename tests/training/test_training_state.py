"""Checkpoints are whole or absent."""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from griffin_vllm.errors import GriffinError
from griffin_vllm.training.training_state import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tests.full_disk import full_disk


def state(step: int) -> TrainingState:
    return TrainingState(step, {"weight": torch.full((1000,), float(step))}, {"state": {0: torch.ones(9)}})


def test_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, state(7)))
    assert loaded.step == 7
    assert torch.equal(loaded.weights["weight"], state(7).weights["weight"])
    assert torch.equal(loaded.optimizer["state"][0], torch.ones(9))


def test_checkpoint_that_also_tells_its_seconds_as_older_ones_do_is_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(7))
    (path / "state.json").write_text(json.dumps({"step": 7, "seconds": 3.5}))
    assert load_checkpoint(path).step == 7


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


@pytest.mark.parametrize("kept", [0, 1, 10, -10, None], ids=lambda kept: f"first {kept} bytes")
@pytest.mark.parametrize("name", ["head.safetensors", "optimizer.pt", "state.json"])
def test_damaged_checkpoint_is_named(tmp_path: Path, name: str, kept: int | None) -> None:
    path = save_checkpoint(tmp_path, state(1))
    file = path / name
    content = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(content[:kept])
    with pytest.raises(GriffinError, match=r"step-00000001: is damaged .*remove it"):
        load_checkpoint(path)


def test_folder_that_was_being_written_when_the_process_died_does_not_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    (tmp_path / ".step-00000002.abcd").mkdir()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000001"


def save_and_be_killed(folder: Path, step: int, moment: int) -> bool:
    """Save in a child process that gets SIGKILL when it touches ``folder`` for the ``moment``-th time."""
    child = os.fork()
    if child == 0:
        left = moment

        def kill(_: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if any(str(folder) in str(argument) for argument in arguments):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(kill)
            save_checkpoint(folder, state(step))
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_process_that_is_killed_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    step = 2
    for moment in count():
        killed = save_and_be_killed(tmp_path, step + 1, moment)
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        found = load_checkpoint(latest)
        assert found.step in (step, step + 1)
        assert found.weights["weight"][0] == found.step
        step = found.step
        if not killed:
            break
    assert moment > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (step - 1, step)]
