"""Training with a draft vocabulary: what it learns from, what counts as right, and what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from griffin_vllm.checkpoint import draft_vocabulary, open_head
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.chat import ChatTarget
from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.head import GriffinHead, Streams
from griffin_vllm.training.loop import Trainer
from griffin_vllm.training.losses import Classes, token_losses
from griffin_vllm.training.simulate import draft_hits
from griffin_vllm.training.steps import DraftSteps, StepWeights
from griffin_vllm.training.vocabulary import DraftVocabulary, choose, coverage
from tests.training.test_steps import make_head, random_batch
from tests.training.tiny import settings

V = 50
DRAFTED = torch.arange(0, V, 3)
VOCABULARY = DraftVocabulary.of(DRAFTED, V)


def only_drafted(logits: Tensor) -> Tensor:
    outside = torch.ones(V, dtype=torch.bool)
    outside[DRAFTED] = False
    return logits.masked_fill(outside, float("-inf"))


def test_losses_are_the_cross_entropy_over_the_drafted_tokens_by_the_targets_own_probabilities() -> None:
    batch, shared = random_batch()
    small, weights = VOCABULARY.restrict_batch(batch), VOCABULARY.restrict_weights(shared)
    predict = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(3))
    learns = batch.loss_mask
    found = token_losses(
        predict[learns],
        Classes.all(weights.lm_head),
        small.soft[learns],
        small.next_tokens[learns],
        learns[learns],
        learns.sum(),
        p_weight=1.0,
        k_weight=0.0,
        align_top_k=3,
    )
    leaf = predict[learns].requires_grad_()
    log_q = only_drafted(leaf @ shared.lm_head.T).log_softmax(-1)[:, DRAFTED]
    p = torch.zeros(len(leaf), V).scatter(1, batch.soft.ids[learns], batch.soft.probabilities[learns])
    expected = -(p[:, DRAFTED] * log_q).sum() / learns.sum()
    torch.testing.assert_close(found.p, expected.detach())
    torch.testing.assert_close(found.gradient, torch.autograd.grad(expected, leaf)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampled_tokens", [None, 5])
def test_a_true_token_that_cannot_be_drafted_is_never_aligned(sampled_tokens: int | None) -> None:
    batch, shared = random_batch()
    steps = DraftSteps(
        make_head(GriffinHead),
        VOCABULARY.restrict_weights(shared),
        alignment="reference",
        align_top_k=V,  # every token that can be drafted is in the top V
        sampled_tokens=sampled_tokens,
        detach=True,
    )
    weights = StepWeights(v=1.0, p=1.0, k=0.0, decay=1.0)
    outside = ~torch.isin(batch.next_tokens, DRAFTED)
    assert outside[batch.loss_mask].any()
    _, losses = steps(VOCABULARY.restrict_batch(batch), 2, weights, seed=0)
    lost = replace(batch, loss_mask=batch.loss_mask & ~outside)
    _, without = steps(VOCABULARY.restrict_batch(lost), 2, weights, seed=0)
    torch.testing.assert_close(losses[1, 0], without[1, 0])  # step 2 learns from the same positions
    assert losses[0, 0] != without[0, 0]


def test_a_simulated_draft_is_the_best_of_the_drafted_tokens() -> None:
    batch, shared = random_batch()
    head = make_head(GriffinHead)
    predict, _ = head(shared.embed_tokens[batch.tokens], batch.features, Streams())
    best = only_drafted(predict @ shared.lm_head.T).argmax(-1)
    batch = replace(batch, next_tokens=torch.where(torch.rand(best.shape) < 0.5, best, batch.next_tokens))
    hits = draft_hits(head, VOCABULARY.restrict_weights(shared), VOCABULARY.restrict_batch(batch), K=1)
    assert torch.equal(hits[0], (best == batch.next_tokens) & batch.loss_mask)


def test_the_most_frequent_answer_tokens_and_the_special_ones_are_chosen(target: Path, data: Path) -> None:
    dataset, chat = TokenDataset(data, "train"), ChatTarget.load(str(target))
    counts = torch.zeros(chat.vocab_size, dtype=torch.int64)
    for i in range(len(dataset)):
        tokens, mask = dataset[i]
        counts += tokens[mask].bincount(minlength=chat.vocab_size)
    assert torch.equal(dataset.answer_token_counts(), counts)
    chosen = choose(dataset, chat, 20)
    special = set(chat.tokenizer.all_special_ids)
    assert special <= set(chosen.tolist())
    assert torch.equal(chosen, chosen.sort().values)
    left_out = counts[[i for i in range(chat.vocab_size) if i not in chosen]]
    taken = counts[[i for i in chosen.tolist() if i not in special]]
    assert taken.min() >= left_out.max()
    assert coverage(dataset, chosen) == pytest.approx(float(counts[chosen].sum() / counts.sum()))


def test_a_run_leaves_a_head_of_its_vocabulary_and_the_next_run_keeps_it(
    target: Path, data: Path, tmp_path: Path
) -> None:
    folder = Trainer(settings(target, data, tmp_path / "first", draft_vocab=40)).run()
    head = open_head(folder)
    chosen = choose(TokenDataset(data, "train"), ChatTarget.load(str(target)), 40)
    stored = draft_vocabulary(head)
    assert head.config.draft_vocab_size == 40
    assert stored is not None
    assert torch.equal(stored, chosen)
    assert "draft vocabulary | 40 of" in (folder / "README.md").read_text()
    again = Trainer(settings(target, data, tmp_path / "second", init_from=str(folder))).run()
    kept = draft_vocabulary(open_head(again))
    assert kept is not None
    assert torch.equal(kept, chosen)


def test_a_draft_vocabulary_for_vllms_eagle_method_is_refused(
    target: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(GriffinError, match="draft_vocab is 40, expected null"):
        settings(target, data, tmp_path / "run", method="hass", draft_vocab=40)
