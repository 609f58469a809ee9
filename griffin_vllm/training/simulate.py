"""Acceptance of greedy draft chains, simulated offline on answers that the target has given.

A drafted token counts only while every earlier one of its chain was right, and then its context is the
answer itself. So one teacher-forced pass of K draft steps holds every chain at every position, and walking
it as a decoder would (draft K, keep the run that was right, add the target's own token, go on) gives the
acceptance length exactly, runs counted and no marginals multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from griffin_vllm.training.batches import Batch
from griffin_vllm.training.head import DraftHead, Streams, next_stream
from griffin_vllm.training.target import SharedWeights


@dataclass
class Acceptance:
    """Counts over all chains of all answers. ``top1[n]``: how many drafts of step n + 1 were right, of those at all
    ``positions``, whether or not the chain had gone wrong before."""

    rounds: int = 0
    tokens: int = 0
    top1: list[int] = field(default_factory=list)
    positions: int = 0

    @property
    def acceptance_length(self) -> float:
        """tau: tokens a target pass, the target's own included."""
        return self.tokens / max(self.rounds, 1)

    @property
    def accuracy(self) -> list[float]:
        """Top-1 accuracy of each draft step."""
        return [right / max(self.positions, 1) for right in self.top1]


@torch.no_grad()
def simulate(head: DraftHead, shared: SharedWeights, batches: Iterable[Batch], K: int) -> Acceptance:
    """Chains of ``K`` greedy drafts over the answers (``loss_mask``) of ``batches``."""
    total = Acceptance(top1=[0] * K)
    for batch in batches:
        right = draft_hits(head, shared, batch, K)
        total.positions += int(batch.loss_mask.sum())
        for step in range(K):
            total.top1[step] += int(right[step][batch.loss_mask].sum())
        for row in range(len(batch.tokens)):
            _walk(right[:, row].tolist(), batch.loss_mask[row].tolist(), total)
    return total


def draft_hits(head: DraftHead, shared: SharedWeights, batch: Batch, K: int) -> Tensor:
    """(K, B, T) bool: draft step n at position t has x_(t+2) right, given the answer before it."""
    embeddings = nn.functional.embedding(batch.tokens, shared.embed_tokens).float()
    streams, features = Streams(), batch.features
    hits = torch.zeros(K, *batch.tokens.shape, dtype=torch.bool, device=batch.tokens.device)
    for step in range(K):
        predict, regress = head(embeddings, features, streams)
        logits = predict[batch.loss_mask].to(shared.lm_head.dtype) @ shared.lm_head.T
        hits[step][batch.loss_mask] = logits.argmax(-1) == batch.next_tokens[batch.loss_mask]
        features = next_stream(features, regress)
    return hits


def _walk(right: list[list[bool]], answer: list[bool], total: Acceptance) -> None:
    """Decode one row: ``right[n][t]``, ``answer[t]`` says that x_(t+2) belongs to an answer."""
    K, T, t = len(right), len(answer), 0
    while t < T:
        # An answer's first token comes with the prompt's own pass; drafting starts after it.
        if not answer[t] or t == 0 or not answer[t - 1]:
            t += 1
            continue
        accepted = 0
        while accepted < K and t + accepted < T and answer[t + accepted]:
            if not right[accepted][t + accepted]:
                break
            accepted += 1
        # The target's own token follows the accepted ones, if the answer is that long.
        emitted = sum(answer[t : t + accepted + 1])
        total.rounds += 1
        total.tokens += emitted
        t += accepted + 1
