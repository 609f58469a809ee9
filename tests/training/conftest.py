"""What several of the trainer's tests start from; a module gets its own copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import write_data, write_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tokens", target)
