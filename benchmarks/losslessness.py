"""Greedy answers of every method against plain decoding: identical, near-tie or wrong, prompt by prompt.

    python benchmarks/losslessness.py --target T --methods griffin:HEAD --prompts FILE --json OUT.json

The reference is plain decoding, one request at a time. An answer is a *near-tie* when, at the first token
where the two differ, the target's two highest logits lie within ``--near-tie`` of each other and the method
chose the second: arithmetic in another order may then choose either. Anything else that differs is *wrong*,
and the exit status 1. In float32 the limit is 1e-4. In bfloat16 neighbouring logits are 0.125 apart once
they exceed 16, so the limit there is four such steps; ``largest_near_tie`` says what was reached.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import engines, records
from benchmarks.engines import Answer
from benchmarks.methods import Method, Run, runs
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
    parser = records.parser(__doc__, dtype="float32", enforce_eager=True, concurrency=[1, 16])
    parser.add_argument("--near-tie", type=float, help="largest logit difference of a near-tie")
    args = parser.parse_args(argv)
    if args.temperature != [0.0]:
        raise GriffinError.at(
            "losslessness.py", "--temperature", args.temperature, "0: only greedy answers repeat"
        )
    near_tie = NEAR_TIE[args.dtype] if args.near_tie is None else args.near_tie
    methods, sets = records.load_inputs(args)
    record = records.Record("losslessness", args, sets)
    record.settings["near_tie"] = near_tie
    arguments = records.engine_arguments(args)
    references: dict[str, dict[tuple[str, int], Answer]] = {}
    histories: dict[str, dict[str, list[list[int]]]] = {}
    plain = Run(Method("none"), 0)
    wanted = [method for method in methods if method.name != "none"]
    for run in [plain, *runs(wanted, args.num_speculative_tokens)]:
        with record.attempt(run), engines.start(run, **arguments) as llm:
            record.note_engine(run, engines.resolved_settings(llm))
            for prompts in sets:
                conversations = engines.fitting(
                    llm.get_tokenizer(), prompts.conversations, args.max_tokens, args.max_model_len
                )
                if run is plain:
                    alone = engines.answer(llm, conversations, max_tokens=args.max_tokens, margins=True)
                    references[prompts.name] = {(one.conversation, one.turn): one for one in alone}
                    history = histories[prompts.name] = {}
                    for one in alone:
                        history.setdefault(one.conversation, []).append(one.tokens)
                if prompts.name not in references:
                    raise GriffinError(
                        f"{prompts.name}: plain decoding failed, there is nothing to compare with"
                    )
                for concurrency in args.concurrency:
                    answers = engines.answer(
                        llm,
                        conversations,
                        max_tokens=args.max_tokens,
                        concurrency=concurrency,
                        history=histories[prompts.name],
                    )
                    row = {
                        **run.fields(),
                        "dataset": prompts.name,
                        "temperature": 0.0,
                        "concurrency": concurrency,
                        "num_prompts": len(conversations),
                        **_compared(answers, references[prompts.name], near_tie),
                    }
                    record.results.append(row)
    status = record.finish(COLUMNS)
    wrong = sum(row["wrong"] for row in record.results)
    if wrong:
        print(f"{wrong} wrong answers", file=sys.stderr)
    return 1 if wrong else status


def _compared(
    answers: Sequence[Answer], references: dict[tuple[str, int], Answer], near_tie: float
) -> dict[str, Any]:
    verdicts = [
        (answer, judge(answer, references[answer.conversation, answer.turn], near_tie)) for answer in answers
    ]
    kinds = Counter(verdict.kind for _, verdict in verdicts)
    passes = [tokens for answer in answers for tokens in answer.passes]
    margins = [verdict.margin for _, verdict in verdicts if verdict.kind == "near_tie"]
    return {
        "num_answers": len(answers),
        **{kind: kinds[kind] for kind in ("identical", "near_tie", "wrong")},
        "largest_near_tie": max((margin for margin in margins if margin is not None), default=None),
        # above 1.0 it shows that drafts were verified at all
        "acceptance_length": sum(passes) / len(passes) if passes else None,
        "differences": [
            {"conversation": answer.conversation, "turn": answer.turn + 1, **verdict._asdict()}
            for answer, verdict in verdicts
            if verdict.kind != "identical"
        ],
    }


if __name__ == "__main__":
    records.execute(main)
