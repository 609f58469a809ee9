"""The records of the benchmarks as the report reads them, and what names their rows and groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.methods import TUNED, UNTUNED, WITHOUT_HEAD
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import read_json
from griffin_vllm.training.data import LOOP_THRESHOLD

TITLES = {
    "acceptance": "Acceptance length",
    "speed": "Speed",
    "losslessness": "Losslessness",
    "soak": "Soak",
    "round": "One round",
    "startup": "Engine start",
}
# Groups of acceptance lengths. How repetitive an answer is: its share of distinct 4-grams is below the number.
REPETITION = ((LOOP_THRESHOLD, "loops"), (0.9, "repeats"), (2.0, "varied"))
# Tokens in a context: fewer than one of these, or not.
CONTEXT_EDGES = (128, 256, 512, 1024, 2048, 4096)


class ReadRecord(NamedTuple):
    """What ``records.Record`` wrote, its file's stem, and rows of other records that its own are compared with."""

    settings: dict[str, Any]
    results: list[dict[str, Any]]
    name: str
    baselines: Sequence[dict[str, Any]] = ()
    failures: Sequence[dict[str, Any]] = ()

    @property
    def kind(self) -> str:
        return str(self.settings["benchmark"])


def drafts(row: dict[str, Any]) -> str:
    if "schedule" in row:
        return UNTUNED if row.get("untuned") else TUNED
    return f"{row['num_speculative_tokens'] or ''}" + (" (best)" if row.get("best_k") else "")


def is_baseline(row: dict[str, Any]) -> bool:
    """Whether others are compared with this row: a second ``none`` has an interval, the first one has not."""
    return row["method"] == "none" and "speedup_ci" not in row


def read_record(path: Path) -> ReadRecord:
    written = read_json(path)
    settings, results = written.get("settings", {}), written.get("results")
    if settings.get("benchmark") not in TITLES or not isinstance(results, list):
        raise GriffinError(f"{path}: is not a record of one of {', '.join(TITLES)}.py")
    return ReadRecord(settings, results, path.stem, failures=written.get("failures", ()))


def read_records(paths: Sequence[Path]) -> list[ReadRecord]:
    """Records that share what they were asked share the rows of methods without a head, too."""
    read = [read_record(path) for path in paths]

    def asked(record: ReadRecord) -> list[Any]:
        settings = record.settings
        dtype = settings.get("engine", {}).get("dtype")
        return [record.kind, dtype, *(settings[name] for name in ("target", "prompts", "max_tokens"))]

    return [
        record._replace(
            baselines=[
                row
                for other in read
                if record.kind == "acceptance" and other is not record and asked(other) == asked(record)
                for row in other.results
                if row["method"] in WITHOUT_HEAD
                and row["method"] not in {ours["method"] for ours in record.results}
            ]
        )
        for record in read
    ]
