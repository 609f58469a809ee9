"""The parts of token-alignable training: attention over streams, losses, masks, simulated chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from griffin_vllm.config import HeadConfig
from griffin_vllm.training.alignment import AlignmentMask, AlignmentRule
from griffin_vllm.training.attention import (
    CPU_KERNEL,
    choose_attention,
    dense_stream_attention,
    fused_stream_attention,
)
from griffin_vllm.training.batches import Batch
from griffin_vllm.training.head import DraftHead, EagleHead, GriffinHead, Streams, next_stream
from griffin_vllm.training.losses import Classes, token_losses
from griffin_vllm.training.simulate import simulate
from griffin_vllm.training.steps import DraftSteps, StepWeights
from griffin_vllm.training.target import SharedWeights, SoftTargets, soft_targets

CONFIG = HeadConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=50,
    draft_vocab_size=50,
)
# Of 50 tokens: so many of a random head's are among them that the later steps have something to learn.
TOP_K = 40
CPU = torch.device("cpu")


def random_batch(rows: int = 2, T: int = 14, seed: int = 0) -> tuple[Batch, SharedWeights]:
    generator = torch.Generator().manual_seed(seed)
    embed_tokens = torch.randn(50, 32, generator=generator)
    lm_head = torch.randn(50, 32, generator=generator)
    features = torch.randn(rows, T + 1, 32, generator=generator)
    tokens = torch.randint(0, 50, (rows, T + 1), generator=generator)
    loss_mask = torch.zeros(rows, T, dtype=torch.bool)
    loss_mask[:, 2:-9] = loss_mask[:, -7:-1] = True  # two answers
    soft = soft_targets(features[:, 1:].flatten(0, 1), lm_head, 50)
    soft = SoftTargets(soft.ids.view(rows, T, 50), soft.probabilities.view(rows, T, 50))
    batch = Batch(features[:, :-1], features[:, 1:], tokens[:, :-1], tokens[:, 1:], soft, loss_mask)
    return batch, SharedWeights(embed_tokens, lm_head)


def make_head(kind: type[DraftHead], dtype: torch.dtype = torch.float32) -> DraftHead:
    torch.manual_seed(1)
    return kind(CONFIG, choose_attention("auto", CPU)).to(dtype)


@pytest.mark.parametrize(("streams", "T"), [(1, 17), (2, 17), (4, 17), (4, 4), (4, 3), (5, 1)])
def test_fused_attention_and_its_gradients_equal_the_dense_definition(streams: int, T: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, T, 32, requires_grad=True) for _ in range(1 + 2 * streams)]
    q, keys, values = inputs[0], inputs[1 : 1 + streams], inputs[1 + streams :]
    dense = dense_stream_attention(q, keys, values)
    fused = fused_stream_attention(CPU_KERNEL, q, keys, values)
    torch.testing.assert_close(fused, dense, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(dense)
    for found, expected in zip(
        torch.autograd.grad(fused, inputs, grad), torch.autograd.grad(dense, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers' kernels need CUDA")
@pytest.mark.parametrize("streams", [1, 3])
def test_xformers_attention_equals_the_dense_definition_on_cuda(streams: int) -> None:
    pytest.importorskip("xformers")
    device = torch.device("cuda")
    inputs = [
        torch.randn(2, 4, 128, 64, device=device, dtype=torch.float16, requires_grad=True)
        for _ in range(1 + 2 * streams)
    ]
    q, keys, values = inputs[0], inputs[1 : 1 + streams], inputs[1 + streams :]
    dense = dense_stream_attention(q, keys, values)
    fused = choose_attention("xformers", device)(q, keys, values)
    grad = torch.randn_like(dense)
    torch.testing.assert_close(fused, dense, atol=1e-2, rtol=1e-2)
    for found, expected in zip(
        torch.autograd.grad(fused, inputs, grad), torch.autograd.grad(dense, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", [GriffinHead, EagleHead])
def test_step_n_sees_what_a_decoder_sees_at_draft_n(kind: type[DraftHead]) -> None:
    """A chain drafted one token at a time, with real features before it, equals the streams' positions."""
    batch, shared = random_batch(rows=1)
    head = make_head(kind).eval()
    embeddings = shared.embed_tokens[batch.tokens]
    streams, features, steps = Streams(), batch.features, []
    for _ in range(4):
        predict, regress = head(embeddings, features, streams)
        steps.append(predict)
        features = next_stream(features, regress)
    start = 7
    prefix = batch.features[:, : start + 1]
    for n in range(4):
        predict, regress = head(embeddings[:, : start + n + 1], prefix, Streams())
        torch.testing.assert_close(predict[:, -1], steps[n][:, start + n], atol=1e-5, rtol=1e-5)
        prefix = torch.cat([prefix, regress[:, -1:]], 1)


@pytest.mark.parametrize(("rule", "detach"), [("reference", True), ("causal", True), ("reference", False)])
def test_gradient_of_the_steps_equals_separate_backward_passes_with_full_logits(
    rule: AlignmentRule, detach: bool
) -> None:
    batch, shared = random_batch()
    head = make_head(GriffinHead)
    steps = DraftSteps(head, shared, alignment=rule, align_top_k=TOP_K, sampled_tokens=None, detach=detach)
    weights = StepWeights(v=1.0, p=0.1, k=0.5, decay=0.8)
    surrogate, _ = steps(batch, 3, weights, seed=0)
    surrogate.backward()
    found = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()

    embeddings, mask = shared.embed_tokens[batch.tokens], AlignmentMask(batch.loss_mask, rule, 3)
    inputs, total = [batch.features], torch.zeros(())
    for step in range(3):
        streams = Streams()
        for features in inputs:
            predict, regress = head(embeddings, features, streams)
        log_q = (predict @ shared.lm_head.T).log_softmax(-1)
        cross = -(batch.soft.probabilities * log_q.gather(-1, batch.soft.ids))
        learns = mask.learns
        assert learns.any()
        count = learns.sum() + 1e-5
        p = (cross.sum(-1) * learns).sum() / count
        k = (cross[..., :10].sum(-1) * learns).sum() / count
        v = torch.nn.functional.smooth_l1_loss(regress, batch.feature_targets, reduction="none").mean(-1)
        total = total + 0.8**step * ((v * learns).sum() / count + 0.1 * p + 0.5 * k)
        top = log_q.topk(TOP_K).indices
        # where the steps do not ask for it, it is anything
        anything = torch.rand(learns.shape, generator=torch.Generator().manual_seed(step)) < 0.5
        mask.advance(torch.where(learns | mask.asks, (top == batch.next_tokens[..., None]).any(-1), anything))
        following = next_stream(inputs[-1], regress)
        inputs.append(following.detach() if detach else following)
    total.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("rule", ["reference", "causal"])
def test_alignment_mask_never_depends_on_a_position_that_it_does_not_ask_for(rule: AlignmentRule) -> None:
    batch, _ = random_batch(T=20)
    generator = torch.Generator().manual_seed(0)
    masks = [AlignmentMask(batch.loss_mask, rule, 4) for _ in range(2)]
    ignored = 0
    for _ in range(3):
        one, other = torch.rand(2, *batch.loss_mask.shape, generator=generator) < 0.7
        rows = masks[0].learns | masks[0].asks
        ignored += int((~rows & (one != other)).sum())
        masks[0].advance(one)
        masks[1].advance(torch.where(rows, one, other))
        assert masks[0].learns.any()
        assert torch.equal(masks[0].learns, masks[1].learns)
        assert torch.equal(masks[0].asks, masks[1].asks)
    assert ignored


def test_last_draft_step_asks_lm_head_for_no_position_but_those_that_it_learns_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, shared = random_batch()
    asked: list[tuple[int, int]] = []

    def counted(predict: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        learns = arguments[3]
        asked.append((len(predict), int(learns.sum())))
        return token_losses(predict, *arguments, **options)

    monkeypatch.setattr("griffin_vllm.training.steps.token_losses", counted)
    head = make_head(GriffinHead)
    steps = DraftSteps(
        head, shared, alignment="reference", align_top_k=TOP_K, sampled_tokens=None, detach=True
    )
    steps(batch, 3, StepWeights(v=1.0, p=0.1, k=0.5, decay=1.0), seed=0)
    assert [rows > learns for rows, learns in asked] == [True, True, False]


def test_sampled_vocabulary_estimates_the_full_cross_entropy() -> None:
    torch.manual_seed(0)
    lm_head, predict = torch.randn(2000, 16) * 0.3, torch.randn(64, 16)
    features = torch.randn(64, 16)
    targets, tokens = soft_targets(features, lm_head, 8), torch.randint(0, 2000, (64,))
    learns, count = torch.ones(64, dtype=torch.bool), torch.tensor(64.0)

    def p(classes: Classes) -> float:
        return float(
            token_losses(
                predict, classes, targets, tokens, learns, count, p_weight=1.0, k_weight=0.0, align_top_k=3
            ).p
        )

    keep = torch.zeros(2000, dtype=torch.bool)
    keep[torch.cat([targets.ids.flatten(), tokens])] = True
    sampled = [
        p(Classes.sample(lm_head, keep, 300, torch.Generator().manual_seed(seed))) for seed in range(20)
    ]
    assert abs(sum(sampled) / 20 - p(Classes.all(lm_head))) < 0.01


@pytest.mark.parametrize(("ahead", "aligned"), [(1.0, True), (-0.1, False)])
def test_a_sampled_token_counts_for_all_that_it_stands_for_when_a_draft_is_aligned(
    ahead: float, aligned: bool
) -> None:
    """Its raised logit, 2.3 here, is not what the true token has to beat."""
    lm_head = torch.ones(101, 1)
    lm_head[0] += ahead
    keep = torch.arange(101) == 0
    classes = Classes.sample(lm_head, keep, 10, torch.Generator().manual_seed(0))
    targets, one = SoftTargets(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)), torch.ones(1, 1)
    found = token_losses(
        one,
        classes,
        targets,
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1, dtype=torch.bool),
        torch.tensor(1.0),
        p_weight=0.1,
        k_weight=0.5,
        align_top_k=15,
    )
    assert found.ok.tolist() == [aligned]


def test_chunks_of_rows_give_the_same_losses_and_gradient() -> None:
    batch, shared = random_batch()
    predict = torch.randn(28, 32)
    soft = SoftTargets(batch.soft.ids.flatten(0, 1), batch.soft.probabilities.flatten(0, 1))
    arguments = (soft, batch.next_tokens.flatten(), batch.loss_mask.flatten(), batch.loss_mask.sum())
    whole, parts = (
        token_losses(
            predict,
            Classes.all(shared.lm_head),
            *arguments,
            p_weight=1.0,
            k_weight=0.5,
            align_top_k=3,
            rows=rows,
        )
        for rows in (28, 5)
    )
    torch.testing.assert_close(parts.gradient, whole.gradient)
    torch.testing.assert_close(parts.p, whole.p)
    torch.testing.assert_close(parts.k, whole.k)
    assert torch.equal(parts.ok, whole.ok)


def mask_rows(rule: str, oks: list[list[int]]) -> list[list[int]]:
    mask = AlignmentMask(torch.ones(1, len(oks[0]), dtype=torch.bool), rule, len(oks) + 1)  # type: ignore[arg-type]
    rows = []
    for ok in oks:
        mask.advance(torch.tensor([ok], dtype=torch.bool))
        rows.append(mask.learns[0].int().tolist())
    return rows


def test_reference_mask_drops_a_position_whose_token_was_lost_or_whose_predecessor_was_dropped() -> None:
    assert mask_rows("reference", [[1, 0, 1, 1, 1], [1, 1, 1, 0, 1]]) == [[1, 0, 1, 1, 1], [0, 1, 0, 0, 1]]


def test_causal_mask_drops_a_position_whose_input_was_drafted_wrong() -> None:
    assert mask_rows("causal", [[1, 0, 1, 1, 1], [1, 1, 1, 0, 1]]) == [[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]


def test_without_alignment_every_step_learns_from_the_whole_answer() -> None:
    assert mask_rows("off", [[0, 0, 0], [0, 0, 0]]) == [[1, 1, 1], [1, 1, 1]]


def brute_force_rounds(head: DraftHead, shared: SharedWeights, batch: Batch, K: int) -> tuple[int, int]:
    """Rounds and tokens of decoding row 0's answers one draft token at a time, as a server would."""
    embeddings = shared.embed_tokens[batch.tokens[:1]]
    mask = [False, *batch.loss_mask[0].tolist(), False]
    starts = [t for t in range(len(mask) - 2) if mask[t + 1] and not mask[t]]
    ends = [t for t in range(len(mask) - 2) if mask[t + 1] and not mask[t + 2]]
    rounds = tokens = 0
    for start, end in zip(starts, ends, strict=True):
        t = start + 1
        while t <= end:
            prefix, accepted = batch.features[:1, : t + 1], 0
            while accepted < K and t + accepted <= end:
                predict, regress = head(embeddings[:, : t + accepted + 1], prefix, Streams())
                if (predict[0, -1] @ shared.lm_head.T).argmax() != batch.next_tokens[0, t + accepted]:
                    break
                prefix = torch.cat([prefix, regress[:, -1:]], 1)
                accepted += 1
            rounds, tokens = rounds + 1, tokens + min(accepted + 1, end - t + 1)
            t += accepted + 1
    return rounds, tokens


@pytest.mark.parametrize("seed", range(4))
def test_simulated_acceptance_equals_decoding_token_by_token(seed: int) -> None:
    batch, shared = random_batch(rows=1, T=24, seed=seed)
    head = make_head(GriffinHead).eval()
    # An answer that the head gets right about two times out of three.
    with torch.no_grad():
        embeddings = shared.embed_tokens[batch.tokens]
        predict, _ = head(embeddings, batch.features, Streams())
        hits = torch.rand(1, 24, generator=torch.Generator().manual_seed(seed)) < 0.65
        best = (predict @ shared.lm_head.T).argmax(-1)
        next_tokens = torch.where(hits, best, batch.next_tokens)
        batch = Batch(
            batch.features, batch.feature_targets, batch.tokens, next_tokens, batch.soft, batch.loss_mask
        )
        found = simulate(head, shared, [batch], K=3)
        assert (found.rounds, found.tokens) == brute_force_rounds(head, shared, batch, K=3)
