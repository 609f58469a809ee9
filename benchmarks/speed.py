"""Wall-clock speed of speculators side by side, against plain decoding of the same conversations.

    python benchmarks/speed.py --target T --methods none,griffin:HEAD --prompts FILE --json OUT.json

Every repeat starts each engine anew, in an order that rotates, so that a slow spell of the machine meets all
methods. Warm-up requests are not measured. Units: ``time_per_output_token_ms`` and ``decode_tokens_per_second``
cover a request's decoding phase (first token to last), pooled; ``time_to_first_token_ms`` is the median;
``tokens_per_second`` is the throughput, prefills included.

``time_per_output_token_ms_percentiles`` are those of single requests.

``speedup`` is the ratio of decoding speeds to the first ``none``. ``speedup_ci`` is its 95 % interval from a
paired bootstrap over conversations: all turns of one are drawn together, and the same ones for both methods.
Repeats are too few to be drawn from, so each draw is multiplied by a factor with the spread that the ratio
had between repeats (Student's t of repeats - 1 degrees of freedom, on the logarithm). With one repeat that
spread is unknown and left out; two say so little about it that the interval is very wide. A second ``none``
among the methods shows what the machine's noise alone does. ``samples`` holds what these two are computed from:
tokens and seconds of the decoding phases, a line for each of ``repeats`` and a number for each of ``conversations``,
and which of these ``loops``: has an answer whose token 4-grams repeat themselves, as ``acceptance.py`` counts it. At
temperature 0 ``speedup_loop_free`` is the speedup on those that plain decoding does not loop in.

``host_overhead_share`` (a setting) of a plain step is the part in which no model runs (scheduling, input preparation,
sampling, detokenisation); speculation saves that, too. It is measured on CPU only, at concurrency 1, on the last data
set.

With ``--served`` the methods run behind ``vllm serve`` and vLLM's own client asks the first turns
(``vllm bench serve``), in repeats as above; its numbers are medians over these and come without an interval.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import engines, options, records, served
from benchmarks.engines import Answer
from benchmarks.intervals import speedup
from benchmarks.methods import Cell, Method, Run, head_digest, in_turn, runs, sampling, shown
from benchmarks.prompts import Conversation
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import read_json
from griffin_vllm.training.chat import distinct_share
from griffin_vllm.training.data import LOOP_THRESHOLD

if TYPE_CHECKING:
    from vllm import LLM

WARM_UP_TOKENS = 16
OVERHEAD_CONVERSATIONS = 3
PERCENTILES = (10, 50, 90)
COLUMNS = (
    "dataset",
    "method",
    "head",
    "num_speculative_tokens",
    "temperature",
    "concurrency",
    "num_prompts",
    "acceptance_length",
    "tokens_per_second",
    "time_per_output_token_ms",
    "time_to_first_token_ms",
    "speedup",
    "speedup_ci",
    "speedup_loop_free",
    "speedup_loop_free_ci",
)


@dataclass
class Sample:
    """One repeat of a cell.

    Attributes:
        tokens, seconds: of each conversation's decoding phases, turns added up.
        loops: conversations with an answer that repeats itself.
        request_ms: milliseconds a token of each request's decoding phase.
    """

    tokens: dict[str, int]
    seconds: dict[str, float]
    loops: set[str]
    request_ms: list[float]
    first_token_seconds: list[float]
    passes: int
    output_tokens: int
    wall_seconds: float

    @classmethod
    def of(cls, answers: Sequence[Answer], wall_seconds: float) -> Sample:
        tokens: dict[str, int] = {}
        seconds: dict[str, float] = {}
        for one in answers:
            tokens[one.conversation] = tokens.get(one.conversation, 0) + one.decode_tokens
            seconds[one.conversation] = seconds.get(one.conversation, 0.0) + one.decode_seconds
        return cls(
            tokens,
            seconds,
            {one.conversation for one in answers if distinct_share(one.tokens) < LOOP_THRESHOLD},
            [1000 * one.decode_seconds / one.decode_tokens for one in answers if one.decode_tokens],
            [one.times[0] for one in answers],
            sum(len(one.passes) for one in answers),
            sum(len(one.tokens) for one in answers),
            wall_seconds,
        )


def columns(by_repeat: dict[int, Sample]) -> dict[str, Any]:
    """A row's ``samples``; every repeat holds the same conversations."""
    repeats = sorted(by_repeat)
    names = list(by_repeat[repeats[0]].tokens)
    return {
        "conversations": names,
        "loops": [name in by_repeat[repeats[0]].loops for name in names],
        "repeats": repeats,
        "tokens": [[by_repeat[repeat].tokens[name] for name in names] for repeat in repeats],
        "seconds": [[round(by_repeat[repeat].seconds[name], 4) for name in names] for repeat in repeats],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser(
        __doc__, num_speculative_tokens=[], concurrency=[1, 2, 4, 8, 16], max_tokens=512, max_model_len=4096
    )
    options.add_draft_sample_method(parser)
    parser.add_argument("--repeats", type=int, default=3, help="engine starts of each method")
    parser.add_argument(
        "--best-k-from",
        type=Path,
        nargs="+",
        default=[],
        metavar="TUNING.json",
        help="records of this script on other prompts: run each method (also) at the K that was fastest there",
    )
    parser.add_argument("--served", action="store_true", help="measure with `vllm bench serve`")
    args = parser.parse_args(argv)
    if not args.num_speculative_tokens and not args.best_k_from:
        args.num_speculative_tokens = [5]
    methods, sets = options.load_inputs(args)
    record = records.Record("speed", args, sets)
    record.settings["repeats"] = args.repeats
    for tuning in args.best_k_from:
        check_tuning_record(tuning, record.settings, methods)
    best = best_ks(args.best_k_from) if args.best_k_from else {}
    planned = _plan(methods, args.num_speculative_tokens, best, args.dtype)
    planned = sampling(planned, args.draft_sample_method, args.temperature)
    arguments = options.engine_arguments(args)
    if args.served:
        served.measure(args, sets, record, planned, arguments)
        return record.finish(COLUMNS)

    measured: dict[Cell, dict[int, Sample]] = {}
    for repeat, engine in in_turn(args.repeats, len(planned)):
        run = planned[engine]
        with record.attempt(run), engines.start(run, **arguments) as llm:
            record.note_engine(run, engines.resolved_settings(llm))
            tokenizer = llm.get_tokenizer()
            asked = [
                engines.fitting(tokenizer, prompts.conversations, args.max_tokens, args.max_model_len)
                for prompts in sets
            ]
            for prompts, conversations in zip(sets, asked, strict=True):
                for temperature, concurrency, sample in _measure(llm, run, conversations, args):
                    cell = Cell(engine, prompts.name, temperature, concurrency)
                    measured.setdefault(cell, {})[repeat] = sample
            record.results = _rows(planned, best, measured)
            if run.method.name == "none" and "host_overhead_share" not in record.settings and _on_cpu():
                share = host_overhead_share(llm, asked[-1], args.max_tokens)
                record.settings["host_overhead_share"] = share
    return record.finish(COLUMNS)


def check_tuning_record(tuning: Path, settings: dict[str, Any], methods: Sequence[Method]) -> None:
    """Check that what was fastest in a tuning record says something about the record with ``settings``.

    Raises:
        GriffinError: it was made on another machine or vLLM, of another target, precision, load or weights of a head,
            or on prompts that are measured now.
    """
    theirs = read_json(tuning).get("settings", {})
    asked = [("machine", "cpu"), ("machine", "cores"), ("versions", "vllm")]
    asked += [
        ("arguments", name) for name in ("target", "dtype", "enforce_eager", "temperature", "concurrency")
    ]
    heads = {shown(one.head): head_digest(one) for one in methods if one.head}
    ours = {**settings, "heads": heads}
    asked += [("heads", name) for name in heads if name in theirs.get("heads", {})]
    for group, name in asked:
        found, expected = theirs.get(group, {}).get(name), ours[group].get(name)
        if found != expected:
            raise GriffinError.at(tuning, f"settings.{group}.{name}", found, f"{expected!r}, as here")
    if "first_turns" not in theirs:
        raise GriffinError.at(tuning, "settings.first_turns", None, "hashes of its prompts; measure it anew")
    tuned_on = set(chain.from_iterable(theirs["first_turns"].values()))
    for dataset, turns in settings["first_turns"].items():
        if shared := tuned_on & set(turns):
            raise GriffinError(
                f"{tuning}: holds {len(shared)} of the {len(turns)} prompts of {dataset}; "
                "the best K must come from others"
            )


def best_ks(tunings: Sequence[Path]) -> dict[Method, int]:
    """Each method's fastest number of draft tokens in tuning records, over data sets and loads."""
    speedups: dict[Method, dict[int, list[float]]] = {}
    for row in (row for tuning in tunings for row in read_json(tuning)["results"]):
        if row["method"] != "none" and "speedup" in row and "schedule" not in row:
            by_k = speedups.setdefault(Method(row["method"], row["head"]), {})
            by_k.setdefault(row["num_speculative_tokens"], []).append(row["speedup"])
    if not speedups:
        raise GriffinError(f"{', '.join(map(str, tunings))}: has no speedups to choose the best K by")
    return {method: max(by_k, key=lambda k: geometric_mean(by_k[k])) for method, by_k in speedups.items()}


def _plan(
    methods: Sequence[Method], ks: Sequence[int | str], best: dict[Method, int], dtype: str
) -> list[Run]:
    planned = []
    for method in methods:
        extra = [best[named(method)]] if named(method) in best else []
        if not ks and not extra and method.name != "none":
            raise GriffinError(
                f"--best-k-from: nothing was measured there of {method.name}"
                f"{f':{method.head}' if method.head else ''}; say --num-speculative-tokens, or leave it out"
            )
        planned += runs([method], list(dict.fromkeys([*ks, *extra])), dtype)
    return planned


def named(method: Method) -> Method:
    """The method as records call it."""
    return Method(method.name, shown(method.head) if method.head else None)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _measure(
    llm: LLM, run: Run, conversations: Sequence[Conversation], args: argparse.Namespace
) -> Iterator[tuple[float, int, Sample]]:
    for temperature in run.temperatures:
        for concurrency in args.concurrency:
            asked: dict[str, Any] = {"temperature": temperature, "concurrency": concurrency}
            engines.answer(llm, conversations[:concurrency], max_tokens=WARM_UP_TOKENS, **asked)
            start = time.perf_counter()
            answers = engines.answer(llm, conversations, max_tokens=args.max_tokens, **asked)
            yield temperature, concurrency, Sample.of(answers, time.perf_counter() - start)


def host_overhead_share(llm: LLM, conversations: Sequence[Conversation], max_tokens: int) -> float:
    """Share of plain decoding steps, one request at a time, that is not spent in the model."""
    engines.call_worker(llm, engines.time_the_model)
    in_model, in_all = 0.0, 0.0
    for conversation in conversations[:OVERHEAD_CONVERSATIONS]:
        first_turn = Conversation(conversation.id, conversation.turns[:1])
        engines.call_worker(llm, engines.model_seconds)
        [answer] = engines.answer(llm, [first_turn], max_tokens=max_tokens)
        # call 0 is the prefill
        calls = engines.call_worker(llm, engines.model_seconds)
        in_model += sum(sum(kind[1 : len(answer.tokens)]) for kind in calls)
        in_all += answer.decode_seconds
    return 1 - in_model / in_all


def _rows(
    planned: Sequence[Run],
    best: dict[Method, int],
    measured: dict[Cell, dict[int, Sample]],
) -> list[dict[str, Any]]:
    samples = {cell: columns(by_repeat) for cell, by_repeat in measured.items()}
    # -1, an engine that no cell is of, without plain decoding
    baseline = next((i for i, run in enumerate(planned) if run.method.name == "none"), -1)
    rows = []
    for cell in sorted(measured):
        run, repeats = planned[cell.engine], list(measured[cell].values())
        tokens = sum(sum(one.tokens.values()) for one in repeats)
        seconds = sum(sum(one.seconds.values()) for one in repeats)
        percentiles = np.percentile([ms for one in repeats for ms in one.request_ms], PERCENTILES)
        row = {
            **run.fields(),
            "dataset": cell.dataset,
            "temperature": cell.temperature,
            "concurrency": cell.concurrency,
            "num_prompts": len(repeats[0].tokens),
            "repeats": len(repeats),
            "acceptance_length": tokens / max(sum(one.passes for one in repeats), 1),
            "tokens_per_second": sum(one.output_tokens for one in repeats)
            / sum(one.wall_seconds for one in repeats),
            "decode_tokens_per_second": tokens / seconds,
            "time_per_output_token_ms": 1000 * seconds / tokens,
            "time_per_output_token_ms_percentiles": {
                f"p{percent}": round(float(ms), 3)
                for percent, ms in zip(PERCENTILES, percentiles, strict=True)
            },
            "time_to_first_token_ms": 1000 * median(t for one in repeats for t in one.first_token_seconds),
            "samples": samples[cell],
        }
        if best.get(named(run.method)) == run.num_speculative_tokens and not run.schedule:
            row["best_k"] = True
        plain = samples.get(cell._replace(engine=baseline))
        if cell.engine == baseline:
            row["speedup"] = 1.0
        elif plain and (compared := speedup(samples[cell], plain)):
            row["speedup"], row["speedup_ci"] = compared[0], list(compared[1])
            if cell.temperature == 0 and (free := speedup(samples[cell], plain, loop_free=True)):
                row["speedup_loop_free"], row["speedup_loop_free_ci"] = free[0], list(free[1])
        rows.append(row)
    return rows


if __name__ == "__main__":
    options.execute(main)
