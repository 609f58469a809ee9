"""Seconds from the command to a server that answers, speculators side by side.

    python benchmarks/startup.py --target T --methods eagle:HEAD,griffin:HEAD,none --json OUT.json

Every start is ``vllm serve`` in a fresh process, up to its first healthy answer; the methods take turns, in an order
that rotates, ``--repeats`` times after a first turn, which fills vLLM's caches and does not count.
``startup_seconds`` is the median of a method's starts, ``beyond_first`` the median of the differences to the first
method within a turn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import options, records, served
from benchmarks.methods import Run, in_turn, runs

COLUMNS = ("method", "head", "num_speculative_tokens", "startup_seconds", "beyond_first", "starts")


def main(argv: Sequence[str] | None = None) -> int:
    asks_nothing = ("--prompts", "--num-prompts", "--turns", "--temperature", "--max-tokens")
    parser = options.parser(__doc__, without=asks_nothing, prompts=[])
    parser.add_argument("--repeats", type=int, default=5, help="starts of each method")
    args = parser.parse_args(argv)
    methods, sets = options.load_inputs(args)
    record = records.Record("startup", args, sets)
    record.settings["repeats"] = args.repeats
    planned = runs(methods, args.num_speculative_tokens, args.dtype)
    arguments = options.engine_arguments(args)
    starts: list[dict[int, float]] = [{} for _ in planned]
    for repeat, number in in_turn(args.repeats + 1, len(planned)):
        with record.attempt(planned[number]):
            began = time.monotonic()
            with served.server(planned[number], arguments):
                if repeat:
                    starts[number][repeat] = time.monotonic() - began
                record.note_engine(planned[number], served.asked(arguments))
        record.results = rows(planned, starts)
    return record.finish(COLUMNS)


def rows(planned: Sequence[Run], starts: Sequence[dict[int, float]]) -> list[dict[str, Any]]:
    """Result rows; ``starts`` holds the seconds of each run by repeat."""
    results = []
    for run, seconds in zip(planned, starts, strict=True):
        if not seconds:
            continue
        row: dict[str, Any] = {
            **run.fields(),
            "startup_seconds": median(seconds.values()),
            "starts": list(seconds.values()),
        }
        if both := seconds.keys() & starts[0].keys():
            row["beyond_first"] = median(seconds[repeat] - starts[0][repeat] for repeat in both)
        results.append(row)
    return results


if __name__ == "__main__":
    options.execute(main)
