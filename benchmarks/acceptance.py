"""Acceptance length (tau) and acceptance rate by position, turn, context length and repetitiveness.

    python benchmarks/acceptance.py --target T --methods none,griffin:HEAD --prompts FILE --json OUT.json

tau is the number of output tokens divided by the number of target passes, both of the decoding phase (the
prefill's pass and its one token count for neither), pooled over all requests. It is counted from what the
engine hands out: each step after a request's first is one target pass for it. Tokens behind EOS or
``--max-tokens`` are trimmed and do not count, as nobody receives them.

``position_acceptance[i]`` is the share of passes that yielded more than ``i + 1`` tokens, so
tau = 1 + sum(position_acceptance).

vLLM's own counters (``vllm_acceptance_length``, 1 + accepted / drafts) differ in two ways: they leave out
passes that had no draft (all of them count here; it matters for ngram and suffix), and they count accepted
tokens before a stop trims them.

At temperature 0 every method is scored on one target trajectory: the answers that the target alone gives
greedily in float32, recorded once in a file beside ``--json``. The engines run in float32 too, later turns
follow the recorded answers, and should an answer leave the recorded one at a near-tie, only the passes
before that are scored. ``identical_answers`` is the share that never left it. ``conversations`` holds each
one's scored tokens and passes, from which the report draws the intervals of ratios between methods.

With ``--oracle`` rows of the method ``oracle`` tell the acceptance length that the best possible greedy drafts
would have had on plain decoding's sampled answers (``oracle.py``): the bound for a head at a temperature.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import engines, options, records
from benchmarks.engines import Answer
from benchmarks.methods import Method, Run, runs, sampling
from benchmarks.oracle import Oracle
from benchmarks.prompts import PromptSet
from benchmarks.sources import CONTEXT_EDGES, REPETITION
from benchmarks.trajectory import Trajectory
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.chat import distinct_share
from griffin_vllm.training.data import LOOP_THRESHOLD

COLUMNS = (
    "dataset",
    "method",
    "head",
    "num_speculative_tokens",
    "temperature",
    "draft_sample_method",
    "num_prompts",
    "acceptance_length",
    "acceptance_length_loop_free",
    "position_acceptance",
    "identical_answers",
)


class Sampled(NamedTuple):
    """Answers of plain decoding at a temperature, repeat by repeat."""

    prompts: PromptSet
    temperature: float
    concurrency: int
    repeats: list[list[Answer]]


@dataclass
class Scored:
    """The passes of one answer that count, in order.

    Attributes:
        passes: tokens that each pass yielded.
        contexts: tokens in the context when the pass began.
    """

    conversation: str
    turn: int
    distinct_4grams: float
    passes: list[int]
    contexts: list[int]
    identical: bool | None


def acceptance_length(scored: Iterable[Scored]) -> float | None:
    """Tokens a pass, pooled; None where no pass counts."""
    passes = [tokens for one in scored for tokens in one.passes]
    return sum(passes) / len(passes) if passes else None


def position_acceptance(scored: Iterable[Scored], k: int) -> list[float]:
    passes = [tokens for one in scored for tokens in one.passes]
    return [sum(tokens > i for tokens in passes) / max(len(passes), 1) for i in range(1, k + 1)]


def score(answer: Answer, reference: Sequence[int] | None) -> Scored:
    """The passes of an answer up to where it leaves the ``reference``, if there is one."""
    common = len(answer.tokens)
    if reference is not None:
        pairs = zip(answer.tokens, reference, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    ends = list(accumulate(answer.emitted))
    passes = [tokens for tokens, end in zip(answer.passes, ends[1:], strict=True) if end <= common]
    return Scored(
        conversation=answer.conversation,
        turn=answer.turn,
        distinct_4grams=distinct_share(reference or answer.tokens),
        passes=passes,
        contexts=[answer.prompt_tokens + end for end in ends[: len(passes)]],
        identical=None if reference is None else answer.tokens == list(reference),
    )


def _by_conversation(scored: Iterable[Scored]) -> dict[str, list[int]]:
    """Tokens and passes of each conversation."""
    totals: dict[str, list[int]] = {}
    for one in scored:
        counts = totals.setdefault(one.conversation, [0, 0])
        counts[0] += sum(one.passes)
        counts[1] += len(one.passes)
    return totals


def summarise(scored: Sequence[Scored], k: int) -> dict[str, Any]:
    """The measured fields of a result row."""
    compared = [one.identical for one in scored if one.identical is not None]
    return {
        "acceptance_length": acceptance_length(scored),
        "acceptance_length_loop_free": acceptance_length(
            one for one in scored if one.distinct_4grams >= LOOP_THRESHOLD
        ),
        "position_acceptance": position_acceptance(scored, k),
        "acceptance_length_by_turn": _grouped(scored, lambda one: one.turn + 1),
        "acceptance_length_by_repetition": _grouped(
            scored, lambda one: next(name for below, name in REPETITION if one.distinct_4grams < below)
        ),
        "acceptance_length_by_context": _by_context(scored),
        "identical_answers": fmean(compared) if compared else None,
        "num_answers": len(scored),
        "num_passes": sum(len(one.passes) for one in scored),
        "num_tokens": sum(sum(one.passes) for one in scored),
        "conversations": _by_conversation(scored),
    }


def _grouped(scored: Sequence[Scored], key: Callable[[Scored], Hashable]) -> dict[str, float | None]:
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(str(key(one)), []).append(one)
    return {name: acceptance_length(group) for name, group in sorted(groups.items())}


def _by_context(scored: Sequence[Scored]) -> dict[str, float]:
    """Acceptance length of passes by the length of their context; ``"128"``: fewer than 128 tokens."""
    groups: dict[int, list[int]] = {}
    for one in scored:
        for context, tokens in zip(one.contexts, one.passes, strict=True):
            edge = next((edge for edge in CONTEXT_EDGES if context < edge), 1 << 20)
            groups.setdefault(edge, []).append(tokens)
    return {str(edge): sum(group) / len(group) for edge, group in sorted(groups.items())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser(__doc__, dtype="float32", enforce_eager=True, concurrency=[8])
    options.add_draft_sample_method(parser)
    parser.add_argument("--repeats", type=int, default=3, help="at a temperature; 0 needs one")
    parser.add_argument("--oracle", action="store_true", help="bound greedy drafts at a temperature")
    args = parser.parse_args(argv)
    if 0 in args.temperature and args.dtype != "float32":
        raise GriffinError.at("acceptance.py", "--dtype", args.dtype, "'float32' at temperature 0")
    methods, sets = options.load_inputs(args)
    if args.oracle and not (any(args.temperature) and Method("none") in methods):
        raise GriffinError("--oracle: replays what 'none' answers at a temperature above 0; name both")
    record = records.Record("acceptance", args, sets)
    arguments = options.engine_arguments(args)
    trajectory = Trajectory("acceptance", args, sets)
    planned = runs(methods, args.num_speculative_tokens, args.dtype)
    planned = sampling(planned, args.draft_sample_method, args.temperature)
    if 0 in args.temperature and len(trajectory.answers) < len(sets):
        # plain decoding comes first: it is what writes the trajectory
        plain = [run for run in planned if run.method.name == "none"]
        others = [run for run in planned if run.method.name != "none"]
        planned = [*(plain or [Run(Method("none"), 0, temperatures=(0.0,))]), *others]
    sampled: list[Sampled] = []
    for run in planned:
        with record.attempt(run), engines.start(run, **arguments) as llm:
            record.note_engine(run, engines.resolved_settings(llm))
            for prompts in sets:
                answers = _measure(llm, run, prompts, args, trajectory, record)
                sampled += answers if run.method.name == "none" else []
    if args.oracle:
        with record.attempt(Run(Method("oracle"), 0)):
            record.results += _oracle_rows(sampled, args)
    if not any(method.name == "none" for method in methods):
        record.results = [row for row in record.results if row["method"] != "none"]
    return record.finish(COLUMNS)


def _measure(
    llm: Any,
    run: Run,
    prompts: PromptSet,
    args: argparse.Namespace,
    trajectory: Trajectory,
    record: records.Record,
) -> list[Sampled]:
    sampled = []
    conversations = engines.fitting(
        llm.get_tokenizer(), prompts.conversations, args.max_tokens, args.max_model_len
    )
    for temperature in run.temperatures:
        greedy = temperature == 0
        recorded = prompts.name in trajectory.answers
        history = trajectory.history(prompts.name) if greedy and recorded else None
        if greedy and history is None and run.method.name != "none":
            raise GriffinError(
                f"{prompts.name}: plain decoding failed, so there is no trajectory to score on"
            )
        for concurrency in args.concurrency:
            before = engines.counters(llm)
            repeats = [
                engines.answer(
                    llm,
                    conversations,
                    max_tokens=args.max_tokens,
                    temperature=temperature,
                    concurrency=concurrency,
                    history=history,
                )
                for _ in range(1 if greedy else args.repeats)
            ]
            if greedy and history is None:
                trajectory.record(prompts.name, repeats[0])
                history = trajectory.history(prompts.name)
            scored = [
                [score(one, history[one.conversation][one.turn] if history else None) for one in answers]
                for answers in repeats
            ]
            row = {
                **run.fields(),
                "dataset": prompts.name,
                "temperature": temperature,
                "concurrency": concurrency,
                "num_prompts": len(conversations),
                **summarise([one for repeat in scored for one in repeat], run.num_speculative_tokens),
                **_vllm_counters(before, engines.counters(llm)),
            }
            if len(scored) > 1:
                row["acceptance_length_repeats"] = [acceptance_length(repeat) for repeat in scored]
            record.results.append(row)
            if not greedy:
                sampled.append(Sampled(prompts, temperature, concurrency, repeats))
    return sampled


def _oracle_rows(sampled: Sequence[Sampled], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    oracle = Oracle(args.target, args.dtype)
    for one in sampled:
        seen = [
            look
            for answers in one.repeats
            for look in oracle.look(one.prompts.conversations, answers, one.temperature)
        ]
        for run in runs([Method("oracle")], args.num_speculative_tokens, args.dtype):
            k = run.num_speculative_tokens
            yield {
                **run.fields(),
                "dataset": one.prompts.name,
                "temperature": one.temperature,
                "concurrency": one.concurrency,
                "num_prompts": len({look.answer.conversation for look in seen}),
                "mean_top_probability": fmean(p for look in seen for p in look.top_probabilities[1:]),
                **summarise([score(look.replayed(k), None) for look in seen], k),
            }


def _vllm_counters(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    gained = {name: after[name] - before.get(name, 0) for name in after}
    if not gained.get("num_drafts"):
        return {}
    return {"vllm_acceptance_length": 1 + gained["num_accepted_tokens"] / gained["num_drafts"]}


if __name__ == "__main__":
    options.execute(main)
