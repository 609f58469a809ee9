"""Mixed traffic on ``vllm serve``, for long: is nothing lost, nothing wrong, and does nothing grow or drift?

    python benchmarks/soak.py --target T --methods griffin:HEAD --prompts FILE --minutes 30 --json OUT.json

First plain vLLM answers every question greedily, one request at a time, with the margin of each token. Then each
method's server gets, for ``--minutes``, short and long prompts (the long ones share a prefix, for the prefix
cache), stop strings, JSON schemas, streamed and whole answers, at the temperatures of ``--temperature`` (one is
drawn for each request), at loads that change between those of ``--concurrency``; one request in five is cut off
by its client. Requests carry no seed of their own: vLLM's CPU engine dies of one.

Status 1 unless, for every method,
- each request was answered or cut off by us, and nothing is running or waiting at the end;
- each greedy answer is plain vLLM's, or parts from it at a near-tie (see losslessness.py); cut-off ones as far
  as they came;
- no text goes on behind its stop string, and finished JSON answers fit their schema;
- the acceptance length of the last window is that of the first on the same questions. A window is five minutes,
  or a sixth of the run; the same sequence of requests begins anew with the last one;
- no process grew by more than ``--max-growth-mib`` after the first window. vLLM's CPU build keeps an oneDNN product
  for each weight and each number of tokens in a step, with or without a speculator. So steps have at most 128
  tokens here, longer prompts come in parts, and before the traffic one prompt of each length up to that, whose
  probabilities are asked for, brings every size of a step and of what is verified in it;
- the server ended with status 0 at SIGTERM and left no process behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import options, records, served
from benchmarks.engines import Answer
from benchmarks.losslessness import NEAR_TIE, summarised
from benchmarks.methods import PLAIN, Run, runs
from benchmarks.soak_checks import (
    acceptance_lengths,
    breaks_its_terms,
    compare,
    failed_criteria,
    server_side,
    with_stop,
)
from benchmarks.soak_traffic import STEP_TOKENS, Question, Traffic, client_of, questions, reference
from benchmarks.tables import print_table
from benchmarks.trajectory import Trajectory
from griffin_vllm.errors import GriffinError

COLUMNS = (
    "method",
    "num_speculative_tokens",
    "minutes",
    "sent",
    "finished",
    "aborted",
    "lost",
    "num_answers",
    "identical",
    "near_tie",
    "wrong",
    "acceptance_length_first",
    "acceptance_length_last",
)
MEMORY_COLUMNS = (
    "process",
    "resident_mib",
    "proportional_mib_after_warm_up",
    "proportional_mib_at_the_end",
    "slope_mib_per_hour",
    "growth_mib",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser(
        __doc__,
        without=("--turns",),
        dtype="float32",
        enforce_eager=True,
        max_tokens=96,
        temperature=[0.0, 0.0, 0.0, 1.0],
        concurrency=[1, 16, 4, 8, 2, 12],
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic, for each method")
    parser.add_argument(
        "--max-growth-mib", type=float, default=32.0, help="of a process after the first window"
    )
    parser.add_argument("--max-drift", type=float, default=0.02, help="of the acceptance length, as a share")
    args = parser.parse_args(argv)
    methods, sets = options.load_inputs(args)
    if 0 not in args.temperature:
        raise GriffinError.at("soak.py", "--temperature", args.temperature, "0 among them, to be compared")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.target)
    asked = questions(tokenizer, sets, args.max_tokens, args.max_model_len)
    record = records.Record("soak", args, sets)
    arguments = options.engine_arguments(args) | {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": STEP_TOKENS,
    }
    record.settings |= {"minutes": args.minutes, "near_tie": NEAR_TIE[args.dtype]}
    record.settings["engine"] = served.asked(arguments)
    trajectory = Trajectory("soak", args, sets)
    if "soak" not in trajectory.answers:
        with record.attempt(PLAIN), served.server(PLAIN, arguments) as server:
            trajectory.record("soak", asyncio.run(_references(server.url, args, asked)))
    expected = {answer.conversation: answer for answer in trajectory.answers.get("soak", ())}
    if not expected:
        return record.finish(COLUMNS)
    asked = [with_stop(one, expected[one.id], tokenizer) if one.kind == "stop" else one for one in asked]
    for run in runs(methods, args.num_speculative_tokens, args.dtype):
        with record.attempt(run):
            record.results.append(_soaked(run, arguments, asked, expected, tokenizer, args))
    status = record.finish(COLUMNS)
    for row in record.results:
        print_table(row["memory"], MEMORY_COLUMNS)
        for criterion in row["failed"]:
            print(f"failed: {row['method']}: {criterion}", file=sys.stderr)
    return 1 if any(row["failed"] for row in record.results) else status


def _soaked(
    run: Run,
    arguments: dict[str, Any],
    asked: Sequence[Question],
    expected: dict[str, Answer],
    tokenizer: Any,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The result row of one run, whose server is gone afterwards, with the criteria that it does not meet."""
    extra = {} if run == PLAIN else {"per_request_spec_decode_metrics": "summary"}
    with served.server(run, arguments | extra) as server:
        seconds = 60 * args.minutes
        window = min(300.0, seconds / 6)
        traffic = Traffic(
            server,
            args.target,
            asked,
            args.temperature,
            args.concurrency,
            seconds,
            window,
            args.max_tokens,
        )
        asyncio.run(traffic.run())
        row = run.fields() | _measured(traffic, expected, tokenizer, args)
        # of a server that is gone the client's counts stand, and this is a criterion that fails
        row |= dict.fromkeys(("left_behind", "prefix_cache_hit_share", "preemptions"))
        with contextlib.suppress(httpx.HTTPError):
            row |= asyncio.run(server_side(server.url))
    row["exit_status"], row["survivors"] = server.process.returncode, traffic.processes.survivors()
    return row | {"failed": failed_criteria(row, args)}


async def _references(url: str, args: Any, asked: Sequence[Question]) -> list[Answer]:
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("plain answers", total=len(asked))
        answers = []
        async with client_of(url) as client:
            for question in asked:
                answers.append(await reference(client, args.target, question, args.max_tokens))
                bar.advance(task)
    return answers


def _measured(traffic: Traffic, expected: dict[str, Answer], tokenizer: Any, args: Any) -> dict[str, Any]:
    """What the client saw, as fields of a result row."""
    outcomes = Counter(reply.outcome for reply in traffic.replies)
    greedy = [reply for reply in traffic.replies if reply.demand.temperature == 0 and reply.outcome != "lost"]
    verdicts = [
        (
            {"question": reply.demand.question.id, "outcome": reply.outcome},
            compare(reply, expected[reply.demand.question.id], tokenizer, NEAR_TIE[args.dtype]),
        )
        for reply in greedy
        # cut off before its first token, or sent as a whole
        if reply.outcome == "finished" or reply.tokens
    ]
    lengths = acceptance_lengths(
        traffic.replies_between(0, traffic.window),
        traffic.replies_between(traffic.seconds - traffic.window, traffic.seconds),
    )
    finished = [reply for reply in traffic.replies if reply.outcome == "finished"]
    return {
        "dataset": "mixed traffic",
        "concurrency": max(args.concurrency),
        "minutes": args.minutes,
        "num_prompts": len(traffic.asked),
        "sent": traffic.sent,
        "finished": outcomes["finished"],
        "aborted": outcomes["aborted"],
        # what never came back counts too
        "lost": traffic.sent - outcomes["finished"] - outcomes["aborted"],
        "by_kind": dict(Counter(reply.demand.question.kind for reply in finished)),
        "by_temperature": dict(Counter(f"{reply.demand.temperature:g}" for reply in finished)),
        "output_tokens": sum(len(reply.tokens) for reply in traffic.replies),
        **summarised(verdicts),
        "broken_terms": sum(breaks_its_terms(reply) for reply in finished),
        "acceptance_length_first": lengths and lengths[0],
        "acceptance_length_last": lengths and lengths[1],
        "memory": traffic.processes.summaries(traffic.window),
        "memory_samples": {
            f"{history.name} {pid}": history.samples for pid, history in traffic.processes.histories.items()
        },
        "errors": dict(Counter(reply.error for reply in traffic.replies if reply.error).most_common(5)),
    }


if __name__ == "__main__":
    options.execute(main)
