"""What a run writes down as it goes: ``log.jsonl``, which resuming reads back, and tensorboard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from griffin_vllm.errors import GriffinError
from griffin_vllm.files import write_whole


class RunLog:
    """The log of one run; rows past a resumed checkpoint are dropped.

    Raises:
        GriffinError: the log cannot be written, or a line of it is damaged.
    """

    def __init__(self, output: Path, done: int, *, writes: bool) -> None:
        """``done``: optimiser steps of the checkpoint; ``writes``: one process does, the others only ask."""
        self.path, self.writes = output / "log.jsonl", writes
        if not writes:
            return
        rows = [row for row in self.rows() if row["step"] <= done]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        try:
            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1)
        except OSError as error:
            raise self._unwritten(error) from error

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a row; a list of numbers is one tensorboard curve an entry."""
        if not self.writes:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            for name, value in values.items():
                curves = (
                    {f"{name}/{n}": entry for n, entry in enumerate(value, start=1)}
                    if isinstance(value, list)
                    else {name: value}
                )
                for curve, number in curves.items():
                    self._board.add_scalar(f"{kind}/{curve}", number, step)
        except OSError as error:
            raise self._unwritten(error) from error

    def has(self, kind: str, step: int) -> bool:
        return any((row["kind"], row["step"]) == (kind, step) for row in self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """Every whole row; what a process that died left of a last line is none."""
        if not self.path.is_file():
            return []
        *lines, _ = self.path.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                row["step"], row["kind"]
            except (ValueError, KeyError, TypeError) as error:
                raise GriffinError(
                    f"{self.path}: line {number} is damaged ({GriffinError.reason(error)}); remove it"
                ) from error
            rows.append(row)
        return rows

    def _unwritten(self, error: OSError) -> GriffinError:
        return GriffinError(f"{self.path.parent}: the log cannot be written ({GriffinError.reason(error)})")
