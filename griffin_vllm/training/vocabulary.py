"""The draft vocabulary: the tokens that a target's answers use most.

A smaller ``lm_head`` makes every draft step cheaper; a token outside of it is never drafted, so a chain ends
there. The target verifies with all of its vocabulary, so answers do not change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from griffin_vllm.errors import GriffinError
from griffin_vllm.training.batches import Batch
from griffin_vllm.training.chat import ChatTarget
from griffin_vllm.training.data import MANIFEST, TokenDataset, prepare
from griffin_vllm.training.target import SharedWeights, SoftTargets

OUTSIDE = -1


@dataclass(frozen=True)
class DraftVocabulary:
    """Ids both ways: ``target_ids`` (N,) int64, ascending, by draft id; ``draft_ids`` (V,) int64 by target id,
    ``OUTSIDE`` for tokens that are never drafted."""

    target_ids: Tensor
    draft_ids: Tensor

    @classmethod
    def of(cls, target_ids: Tensor, vocab_size: int) -> DraftVocabulary:
        draft_ids = torch.full((vocab_size,), OUTSIDE, device=target_ids.device)
        draft_ids[target_ids] = torch.arange(len(target_ids), device=target_ids.device)
        return cls(target_ids, draft_ids)

    def restrict_weights(self, shared: SharedWeights) -> SharedWeights:
        """All embeddings, for the head reads every token, and the drafted rows of ``lm_head``, (N, d)."""
        return replace(shared, lm_head=shared.lm_head[self.target_ids])

    def restrict_batch(self, batch: Batch) -> Batch:
        """``batch`` with draft ids in ``soft`` and ``next_tokens`` (there ``OUTSIDE``, which no draft equals).

        Soft targets keep the probabilities of the tokens that can be drafted as they are. What they sum to is
        then the position's weight: where the target hardly wants a drafted token there is little to win.
        Renormalised targets train neither better nor worse (benchmarks/README.md).
        """
        ids = self.draft_ids[batch.soft.ids]
        inside = ids != OUTSIDE
        soft = SoftTargets(ids.where(inside, 0), batch.soft.probabilities.where(inside, 0.0))
        return replace(batch, soft=soft, next_tokens=self.draft_ids[batch.next_tokens])


def choose(data: TokenDataset, chat: ChatTarget, size: int) -> Tensor:
    """The ``size`` tokens that answers in ``data`` use most, ids (size,) int64, ascending.

    End-of-turn and special tokens are always among them. Of equally frequent tokens those with the smaller
    id are taken, which byte-pair vocabularies give to the more common ones.

    Raises:
        GriffinError: ``size`` is not below the target's vocabulary, or leaves no room for these tokens.
    """
    always = _always_drafted(chat, size)
    counts = data.answer_token_counts()
    counts[always] = counts.max() + 1
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def _always_drafted(chat: ChatTarget, size: int) -> list[int]:
    """The end-of-turn and special tokens of a target; GriffinError unless ``size`` draft tokens have room for them."""
    special = {*chat.eos_token_ids, *chat.tokenizer.all_special_ids}
    # A tokenizer may know tokens that its model has no row for.
    always = sorted(token for token in special if token < chat.vocab_size)
    if not len(always) < size < chat.vocab_size:
        raise GriffinError.at(
            "draft vocabulary",
            "size",
            size,
            f"more than {len(always)} (special tokens) and less than {chat.vocab_size} (the target's vocabulary)",
        )
    return always


def coverage(data: TokenDataset, target_ids: Tensor) -> float:
    """Share of the answer tokens of ``data`` that are among ``target_ids``."""
    counts = data.answer_token_counts()
    return float(counts[target_ids].sum() / counts.sum())


def choose_from_corpus(corpus: Sequence[str], target: str, size: int) -> tuple[Tensor, float]:
    """:func:`choose` for the answers in ``corpus``, with their coverage.

    ``corpus`` is one token dataset of ``target``, or anything that ``griffin data prepare`` reads.

    Raises:
        GriffinError: target or corpus cannot be read, or do not belong together.
    """
    chat = ChatTarget.load(target)
    _always_drafted(chat, size)  # before a long corpus is read
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(corpus[0])
        if len(corpus) > 1 or not (folder / MANIFEST).is_file():
            folder = Path(temporary) / "corpus"
            prepare(target, corpus, folder, validation_share=0.0)
        data = TokenDataset(folder, "train")
        data.check_target(chat.tokenizer, chat.vocab_size)
        target_ids = choose(data, chat, size)
        return target_ids, coverage(data, target_ids)
