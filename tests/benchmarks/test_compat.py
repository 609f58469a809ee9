"""What griffin-vllm needs of vLLM is found in its source, or named where it is missing."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import compat
from benchmarks.vllm_source import Source, missing, uses
from griffin_vllm.errors import GriffinError

FILES = {
    "__init__.py": "LAZY = {'Args': '.args:Args'}\nfrom .args import Args\nfrom vllm.tools import *",
    "_version.py": "__version__ = version = '0.99.1'",
    "args.py": "from typing import Any\nfrom vllm.base import Base\nclass Args(Base):\n    model: str = ''",
    "base.py": (
        "class Base:\n"
        "    tokens: int = 0\n"
        "    def create(self, target, parallel=None):\n"
        "        local = 1\n"
        "        self.made = True\n"
    ),
    "tools/__init__.py": "from .deep import work\nfrom torch import nn",
    "tools/deep.py": (
        "from typing import overload\n"
        "@overload\ndef work(fast): ...\n"
        "def work(fast, *, careful=False): ...\n"
        "try:\n    import x\nexcept ImportError:\n    def fallback(**more): ..."
    ),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vllm" / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "need",
    [
        "vllm:Args",
        "vllm:Args.create(target, parallel)",
        "vllm:Args.made",
        "vllm:Args(model, tokens)",
        "vllm:work(fast, careful)",
        "vllm:tools",
        "vllm.tools:deep.work",
        "vllm.tools:nn",
        "vllm.tools.deep:fallback(anything)",
    ],
)
def test_what_is_there_is_found(root: Path, need: str) -> None:
    assert Source(root).fits(*need.split(":"))


@pytest.mark.parametrize(
    "need",
    [
        "vllm:Other",
        "vllm:Args.local",
        "vllm:Args.create(target, head)",
        "vllm:Args(speed)",
        "vllm:work(slow)",
        "vllm.gone:Args",
        "vllm.tools:deep.play",
        "vllm.tools:nan",
    ],
)
def test_what_is_missing_is_not_found(root: Path, need: str) -> None:
    assert not Source(root).fits(*need.split(":"))


def test_imports_attributes_of_modules_and_keywords_are_uses(root: Path) -> None:
    ours = "import json\nfrom vllm import tools, Args as A\nfrom json import dumps\nA(model=1)\ntools.work(fast=1)"
    assert set(uses(ast.parse(ours), Source(root))) == {
        ("vllm", "tools"),
        ("vllm", "Args"),
        ("vllm", "Args(model)"),
        ("vllm.tools", "work"),
    }


def test_a_vllm_that_lacks_everything_is_told_what_it_lacks(root: Path) -> None:
    version, row = compat.read(root)
    assert version == "0.99.1"
    assert row["names"] == len(row["missing"]) > 50
    assert "vllm.engine.arg_utils:EngineArgs.add_cli_args(parser)" in row["missing"]
    assert not compat.is_sound(row)
    assert "0.99.1 was read, not run" in compat.markdown({"run": {}, "read": {version: row}})


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match="holds no vLLM"):
        compat.read(tmp_path)


def test_the_installed_vllm_lacks_nothing() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("no vLLM is installed")
    names, lacks = missing(Path(found.origin).parents[1])
    assert names > 50
    assert lacks == []


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_config" name="test_a" time="1.2" />
<testcase classname="tests.test_checkpoint" name="test_b[x]" time="1.4"><failure message="no">trace</failure></testcase>
<testcase classname="" name="tests.serving.test_tune" time="0.1"><error message="collection">trace</error></testcase>
</testsuite></testsuites>"""


def test_results_are_counted_by_column_and_a_failure_or_nothing_at_all_is_unsound() -> None:
    cells = compat.count(ElementTree.ElementTree(ElementTree.fromstring(REPORT)))
    assert cells["unit tests"] == {"passed": 1, "failure": 1, "seconds": 3}
    assert cells["tune"] == {"seconds": 0}
    row = {"transformers": "5", "cells": cells}
    assert "| 0.28.0 | 5 | 1, 1 failure | 0 |" in compat.markdown({"run": {"0.28.0": row}, "read": {}})
    assert not compat.is_sound({"cells": {"unit tests": cells["unit tests"]}})
    assert not compat.is_sound({"cells": {"tune": cells["tune"]}})
    assert compat.is_sound({"cells": {"unit tests": {"passed": 1, "seconds": 3}}})
