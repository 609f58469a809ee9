"""Files are written whole or not at all, and what stops that is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from griffin_vllm.errors import GriffinError
from griffin_vllm.files import write_whole


@pytest.mark.parametrize("name", ["file/below.json", "missing/below.json", "x" * 300])
def test_what_stops_the_writing_is_named_whatever_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("whole")
    with pytest.raises(GriffinError, match=r": cannot be written \("):
        write_whole(tmp_path / name, "new")
    assert (tmp_path / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
