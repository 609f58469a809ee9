"""What the best possible greedy drafts would be worth on answers that the target sampled.

Verification accepts a greedy draft exactly when the token that the target samples is the draft. So rounds with
perfect drafts can be replayed on recorded answers without drafting: at every position the best draft is the
target's most likely token, and a pass yields the run of tokens that are it, at most K, and one more. That is the
bound for ``draft_sample_method`` greedy; sampled drafts have none but K + 1, from a head that has the target's
distribution itself. ``mean_top_probability`` is the acceptance of a single best draft, free of the luck of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines import Answer, render_turns
from benchmarks.prompts import Conversation


class Seen(NamedTuple):
    """A sampled answer, and of each of its tokens whether it was the target's most likely one there, and the
    probability of that one."""

    answer: Answer
    likeliest: list[bool]
    top_probabilities: list[float]

    def replayed(self, k: int) -> Answer:
        """The answer in the passes that ``k`` perfect greedy drafts a pass would have taken."""
        passes: list[int] = []
        while (done := 1 + sum(passes)) < len(self.likeliest):
            run = len(list(takewhile(bool, self.likeliest[done : done + k])))
            passes.append(min(run + 1, len(self.likeliest) - done))
        return replace(self.answer, emitted=[1, *passes])


class Oracle:
    """The target in transformers: vLLM hands out no probabilities of a whole answer."""

    def __init__(self, target: str, dtype: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, trust_remote_code=False).eval()

    @torch.inference_mode()
    def look(
        self, conversations: Sequence[Conversation], answers: Sequence[Answer], temperature: float
    ) -> list[Seen]:
        """``answers`` in the order of ``engines.answer``, each turn after its own conversation's earlier ones."""
        turns = {conversation.id: conversation.turns for conversation in conversations}
        said: dict[str, list[str]] = {}
        seen = []
        for answer in answers:
            before = said.setdefault(answer.conversation, [])
            prompt = render_turns(self.tokenizer, turns[answer.conversation][: answer.turn + 1], before)
            before.append(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
            context = torch.tensor([[*prompt, *answer.tokens[:-1]]])
            logits: Any = self.model(context, logits_to_keep=len(answer.tokens)).logits[0]
            top = (logits.float() / temperature).softmax(-1).max(-1)
            likeliest = top.indices == torch.tensor(answer.tokens)
            seen.append(Seen(answer, likeliest.tolist(), top.values.tolist()))
        return seen
