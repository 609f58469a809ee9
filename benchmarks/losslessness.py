"""Greedy answers of every method against plain decoding: identical, near-tie or wrong, prompt by prompt.

    python benchmarks/losslessness.py --target T --methods griffin:HEAD --prompts FILE --json OUT.json

The reference is plain decoding, one request at a time. An answer is a *near-tie* when, at the first token
where the two differ, the target's two highest logits lie within ``--near-tie`` of each other and the method
chose the second: arithmetic in another order may then choose either. Anything else that differs is *wrong*,
and the exit status 1. In float32 the limit is 1e-4. In bfloat16 neighbouring logits are 0.125 apart once
they exceed 16, so the limit there is four such steps; ``largest_near_tie`` says what was reached.

The full sweep takes hours. With ``--resume`` the rows that ``OUT.json`` has already are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import engines, options, records
from benchmarks.engines import Answer
from benchmarks.methods import PLAIN, runs
from benchmarks.prompts import Conversation, PromptSet
from benchmarks.trajectory import Trajectory
from griffin_vllm.errors import GriffinError

NEAR_TIE = {"float32": 1e-4, "bfloat16": 0.5}
COLUMNS = (
    "dataset",
    "method",
    "head",
    "num_speculative_tokens",
    "concurrency",
    "num_answers",
    "identical",
    "near_tie",
    "wrong",
    "largest_near_tie",
    "acceptance_length",
)


class Verdict(NamedTuple):
    """``margin``: the target's top logit minus its second at ``position``, where the answers part."""

    kind: str
    position: int | None = None
    margin: float | None = None


def judge(answer: Answer, reference: Answer, near_tie: float) -> Verdict:
    pairs = zip(answer.tokens, reference.tokens, strict=False)
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if at == len(answer.tokens) == len(reference.tokens):
        return Verdict("identical")
    if at >= min(len(answer.tokens), len(reference.tokens)):
        # the same tokens, but one of the two did not stop where the other did
        return Verdict("wrong", at)
    second = answer.tokens[at] == reference.runners_up[at]
    kind = "near_tie" if second and reference.margins[at] <= near_tie else "wrong"
    return Verdict(kind, at, reference.margins[at])


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser(__doc__, dtype="float32", enforce_eager=True, concurrency=[1, 16])
    parser.add_argument("--near-tie", type=float, help="largest logit difference of a near-tie")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished OUT.json")
    args = parser.parse_args(argv)
    if args.temperature != [0.0]:
        raise GriffinError.at(
            "losslessness.py", "--temperature", args.temperature, "0: only greedy answers repeat"
        )
    near_tie = NEAR_TIE[args.dtype] if args.near_tie is None else args.near_tie
    methods, sets = options.load_inputs(args)
    record = records.Record("losslessness", args, sets)
    record.settings["near_tie"] = near_tie
    trajectory = Trajectory("losslessness", args, sets)
    wanted = [method for method in methods if method.name != "none"]
    planned = [PLAIN, *runs(wanted, args.num_speculative_tokens, args.dtype)]
    if args.resume:
        record.resume(planned)
    for run in planned:
        rows = [
            (prompts, concurrency, {**run.fields(), "dataset": prompts.name, "concurrency": concurrency})
            for prompts in sets
            for concurrency in args.concurrency
            # plain decoding one at a time is the reference itself
            if (run, concurrency) != (PLAIN, 1)
        ]
        missing = [row for row in rows if not record.has(row[2])]
        if not missing and (run != PLAIN or len(trajectory.answers) == len(sets)):
            continue
        with (
            record.attempt(run),
            engines.start(run, **options.engine_arguments(args)) as llm,
        ):
            record.note_engine(run, engines.resolved_settings(llm))
            if run == PLAIN:
                _record_references(llm, sets, args, trajectory)
            for prompts, concurrency, identity in missing:
                if prompts.name not in trajectory.answers:
                    raise GriffinError(
                        f"{prompts.name}: plain decoding failed, there is nothing to compare with"
                    )
                print(f"  {prompts.name}, {concurrency} at a time", file=sys.stderr, flush=True)
                conversations = _conversations(llm, prompts, args)
                answers = engines.answer(
                    llm,
                    conversations,
                    max_tokens=args.max_tokens,
                    concurrency=concurrency,
                    history=trajectory.history(prompts.name),
                )
                references = {(one.conversation, one.turn): one for one in trajectory.answers[prompts.name]}
                record.results.append(
                    {
                        **identity,
                        "temperature": 0.0,
                        "num_prompts": len(conversations),
                        **_compared(answers, references, near_tie),
                    }
                )
                record.save()
    status = record.finish(COLUMNS)
    wrong = sum(row["wrong"] for row in record.results)
    if wrong:
        print(f"{wrong} wrong answers", file=sys.stderr)
    return 1 if wrong else status


def _record_references(
    llm: Any, sets: Sequence[PromptSet], args: argparse.Namespace, trajectory: Trajectory
) -> None:
    """Answer what is not yet in ``trajectory``, one request at a time, with the margins of every token."""
    for prompts in sets:
        if prompts.name not in trajectory.answers:
            print(f"  {prompts.name}, reference", file=sys.stderr, flush=True)
            conversations = _conversations(llm, prompts, args)
            trajectory.record(
                prompts.name,
                engines.answer(llm, conversations, max_tokens=args.max_tokens, margins=True),
            )


def _conversations(llm: Any, prompts: PromptSet, args: argparse.Namespace) -> list[Conversation]:
    return engines.fitting(llm.get_tokenizer(), prompts.conversations, args.max_tokens, args.max_model_len)


def _compared(
    answers: Sequence[Answer], references: dict[tuple[str, int], Answer], near_tie: float
) -> dict[str, Any]:
    verdicts = [
        (
            {"conversation": answer.conversation, "turn": answer.turn + 1},
            judge(answer, references[answer.conversation, answer.turn], near_tie),
        )
        for answer in answers
    ]
    passes = [tokens for answer in answers for tokens in answer.passes]
    return {
        **summarised(verdicts),
        # above 1.0 it shows that drafts were verified at all
        "acceptance_length": sum(passes) / len(passes) if passes else None,
    }


def summarised(verdicts: Sequence[tuple[dict[str, Any], Verdict]]) -> dict[str, Any]:
    """Fields of a result row; the first of each pair tells in the record which answer it is of."""
    kinds = Counter(verdict.kind for _, verdict in verdicts)
    margins = [verdict.margin for _, verdict in verdicts if verdict.kind == "near_tie"]
    return {
        "num_answers": len(verdicts),
        **{kind: kinds[kind] for kind in ("identical", "near_tie", "wrong")},
        "largest_near_tie": max((margin for margin in margins if margin is not None), default=None),
        "differences": [
            which | verdict._asdict() for which, verdict in verdicts if verdict.kind != "identical"
        ],
    }


if __name__ == "__main__":
    options.execute(main)
