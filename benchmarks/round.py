"""Where one round of speculative decoding spends its time, phase by phase, speculators side by side.

    python benchmarks/round.py --target T --methods griffin:HEAD,eagle:HEAD --prompts FILE --json OUT.json

A round is one engine step in which every request of the batch decodes: the target verifies the drafts (K a request, or
fewer where chains end early), the head makes the next ones. The engine runs in this process and vLLM's own functions
are timed, each without the phases inside it, so that phases add up to the round. It has one core less than the machine,
as a worker of ``vllm serve`` has: there the scheduler takes the last one. On CPU only: a GPU works behind the clock.

- ``scheduling``: choosing requests, taking in tokens and drafts
- ``target inputs``, ``target metadata``: batch state and input tensors; attention metadata
- ``target forward``, ``target logits``: the model over drafts and the token before them; its ``lm_head``
- ``verification``: rejection sampling and its bookkeeping
- ``draft inputs``, ``draft metadata``: the head's input tensors, of all its passes; attention metadata
- ``first draft``, ``later drafts``: the head's passes, and choosing a token from them (``lm_head``)
- ``rest``: everything else in the step, detokenisation for one

Conversations' first turns are answered in batches of ``--concurrency``, greedily and past EOS (the acceptance length is
of that, too). All ``--repeats`` (engine starts, in an order that rotates) go through the same rounds, so of each round
the repeat of median duration counts, and a spell of other work on the machine does not. ``draft_step_ms`` is one later
draft, head and ``lm_head``.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import engines, options, records
from benchmarks.methods import in_turn, method_name, runs
from benchmarks.tables import pipes
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.tune_engine import decode

if TYPE_CHECKING:
    from vllm import LLM

WARM_UP_TOKENS = 16
COLUMNS = (
    "method",
    "head",
    "num_speculative_tokens",
    "concurrency",
    "rounds",
    "acceptance_length",
    "round_ms",
    "draft_step_ms",
)
PHASES = (
    "scheduling",
    "target inputs",
    "target metadata",
    "target forward",
    "target logits",
    "verification",
    "draft inputs",
    "draft metadata",
    "first draft: head",
    "first draft: lm_head",
    "later drafts: head",
    "later drafts: lm_head",
    "rest",
)


class Round(NamedTuple):
    """Seconds of a round and of its phases, the tokens that each request got, and the draft steps behind the first:
    where chains stop early or are looked up, fewer than K - 1."""

    seconds: float
    phases: dict[str, float]
    tokens: list[int]
    later_drafts: int


class Stopwatch:
    """Seconds and calls of each phase since the outermost timed function was last entered."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        # of the functions that are running, the seconds of the timed ones inside them
        self._inside: list[float] = []

    def time(self, owner: Any, method: str, phase: str, later: str | None = None) -> None:
        """From now on take the time of ``owner.method``; the calls after a round's first count for ``later``."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                self.seconds.clear()
                self.calls.clear()
            name = later if later and self.calls[phase] else phase
            self.calls[name] += 1
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[name] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        setattr(owner, method, timed)


def watch(llm: LLM) -> Stopwatch:
    """Time the phases of an engine in this process."""
    engine: Any = llm.llm_engine
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    stopwatch = Stopwatch()
    stopwatch.time(engine, "step", "rest")
    for method in ("schedule", "update_from_output", "update_draft_token_ids"):
        stopwatch.time(core.scheduler, method, "scheduling")
    stopwatch.time(runner, "execute_model", "target inputs")
    stopwatch.time(runner, "_build_attention_metadata", "target metadata")
    stopwatch.time(runner, "_model_forward", "target forward")
    stopwatch.time(runner.model, "compute_logits", "target logits")
    stopwatch.time(runner, "sample_tokens", "verification")
    if hasattr(runner, "drafter"):
        drafter = runner.drafter
        stopwatch.time(runner, "propose_draft_token_ids", "draft inputs")
        for method in ("build_per_group_and_layer_attn_metadata", "_update_positions_dependent_metadata"):
            stopwatch.time(drafter, method, "draft metadata")
        stopwatch.time(drafter.model, "forward", "first draft: head", "later drafts: head")
        stopwatch.time(drafter, "_sample_draft_tokens", "first draft: lm_head", "later drafts: lm_head")
    return stopwatch


def measure(
    llm: LLM, stopwatch: Stopwatch, prompts: Sequence[list[int]], batch: int, tokens: int
) -> Iterator[Round]:
    """The rounds of answering all ``prompts`` (token ids), ``batch`` at a time, ``tokens`` each."""
    list(decode(llm.llm_engine, islice(cycle(prompts), batch), WARM_UP_TOKENS))
    for first in range(0, len(prompts), batch):
        for seconds, counts in decode(llm.llm_engine, islice(cycle(prompts), first, first + batch), tokens):
            yield Round(seconds, dict(stopwatch.seconds), counts, stopwatch.calls["later drafts: head"])


def undisturbed(repeats: Sequence[Sequence[Round]]) -> list[Round]:
    """Of each round, in order, the (lower) median of its repeats by duration."""
    return [
        sorted(same, key=lambda one: one.seconds)[(len(same) - 1) // 2]
        for same in zip(*repeats, strict=False)
    ]


def summarise(repeats: Sequence[Sequence[Round]]) -> dict[str, Any]:
    """The measured fields of a result row."""
    rounds = undisturbed(repeats)
    phases = {phase: 1000 * fmean(one.phases.get(phase, 0.0) for one in rounds) for phase in PHASES}
    later = phases["later drafts: head"] + phases["later drafts: lm_head"]
    steps = fmean(one.later_drafts for one in rounds)
    return {
        "rounds": len(rounds),
        "acceptance_length": fmean(count for one in rounds for count in one.tokens),
        "round_ms": 1000 * fmean(one.seconds for one in rounds),
        "draft_step_ms": later / steps if steps else None,
        "phases_ms": phases,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Milliseconds and share of each phase, a line a phase and a column a row of the record."""

    def title(row: dict[str, Any]) -> str:
        return f"{method_name(row, details=False)}, K={row['num_speculative_tokens']}, {row['concurrency']} at a time"

    def cell(ms: float | None, row: dict[str, Any]) -> str:
        return f"{ms:.2f} ({ms / row['round_ms']:.0%})" if ms else ""

    lines = [[phase, *(cell(row["phases_ms"][phase], row) for row in rows)] for phase in PHASES]
    totals = ["round", *(f"{row['round_ms']:.2f}" for row in rows)]
    step = ["one later draft", *(cell(row["draft_step_ms"], row) for row in rows)]
    return [["phase, ms (share)", *map(title, rows)], *lines, totals, step]


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser(__doc__, without=("--temperature", "--turns"), max_tokens=64, turns=1)
    parser.add_argument("--repeats", type=int, default=3, help="engine starts of each method")
    args = parser.parse_args(argv)
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise GriffinError("round.py: times functions by the clock, which says something on CPU only")
    # the functions that are timed must be in this process
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    methods, sets = options.load_inputs(args)
    record = records.Record("round", args, sets)
    record.settings["repeats"] = args.repeats
    record.settings["threads"] = torch.get_num_threads()
    planned = runs(methods, args.num_speculative_tokens, args.dtype)
    measured: dict[tuple[int, int], list[list[Round]]] = {}
    for _, number in in_turn(args.repeats, len(planned)):
        run = planned[number]
        with record.attempt(run), engines.start(run, **options.engine_arguments(args)) as llm:
            record.note_engine(run, engines.resolved_settings(llm))
            prompts = [
                engines.render_turns(llm.get_tokenizer(), conversation.turns[:1], [])
                for one in sets
                for conversation in one.conversations
            ]
            stopwatch = watch(llm)
            for batch in args.concurrency:
                rounds = list(measure(llm, stopwatch, prompts, batch, args.max_tokens))
                measured.setdefault((number, batch), []).append(rounds)
        record.results = [
            {
                **planned[number].fields(),
                "concurrency": batch,
                **summarise(repeats),
            }
            for (number, batch), repeats in sorted(measured.items())
        ]
    status = record.finish(COLUMNS)
    print(pipes(table(record.results)))
    return status


if __name__ == "__main__":
    options.execute(main)
