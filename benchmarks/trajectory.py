"""The target's own greedy answers, recorded once beside a benchmark's record and used by every method."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import records
from benchmarks.engines import Answer
from benchmarks.methods import shown
from benchmarks.prompts import PromptSet
from griffin_vllm.files import write_whole
from griffin_vllm.training.features import target_digest


class Trajectory:
    """Answers of plain decoding by data set, cached in ``OUT.trajectory.json``.

    A cache of another benchmark (not each asks for margins), another target, other prompts, limits, versions or another
    dtype is left unused.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace, sets: Sequence[PromptSet]) -> None:
        self.path = args.json.with_suffix(".trajectory.json")
        self.key = {
            "benchmark": benchmark,
            "target": shown(args.target),
            "target_weights": target_digest(Path(args.target)),
            "dtype": args.dtype,
            "max_tokens": args.max_tokens,
            "max_model_len": args.max_model_len,
            "versions": records.versions(),
            "prompts": {prompts.name: records.prompt_digest(prompts) for prompts in sets},
        }
        self.answers: dict[str, list[Answer]] = {}
        if self.path.exists():
            cached = json.loads(self.path.read_text(encoding="utf-8"))
            if cached["key"] == self.key:
                self.answers = {
                    dataset: [Answer(**answer) for answer in answers]
                    for dataset, answers in cached["answers"].items()
                }

    def record(self, dataset: str, answers: Sequence[Answer]) -> None:
        self.answers[dataset] = list(answers)
        whole = {
            "key": self.key,
            "answers": {name: [asdict(one) for one in found] for name, found in self.answers.items()},
        }
        write_whole(self.path, json.dumps(whole) + "\n")

    def history(self, dataset: str) -> dict[str, list[list[int]]]:
        """Token ids of the answers, turn by turn, by conversation."""
        history: dict[str, list[list[int]]] = {}
        for answer in self.answers[dataset]:
            history.setdefault(answer.conversation, []).append(answer.tokens)
        return history
