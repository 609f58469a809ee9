"""The draft steps of one batch: what token-alignable training does, as one module (and so DDP's unit)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from griffin_vllm.training.alignment import AlignmentMask, AlignmentRule
from griffin_vllm.training.batches import Batch
from griffin_vllm.training.head import DraftHead, Streams, next_stream
from griffin_vllm.training.losses import Classes, feature_loss, token_losses
from griffin_vllm.training.target import SharedWeights


@dataclass(frozen=True)
class StepWeights:
    """Weights of the losses v, p and k, and of draft step n: ``decay ** (n - 1)``."""

    v: float
    p: float
    k: float
    decay: float


EPSILON = 1e-5  # a step whose mask is empty has a loss of zero


class DraftSteps(nn.Module):
    """Runs the draft steps of a batch on a head and gives their joint loss.

    Streams handed from step to step are detached as in the reference, unless ``detach`` is off. Keys and
    values of a stream are computed once and serve all later steps: the sum of the steps' losses has the
    same gradient as the reference's separate backward passes.
    """

    def __init__(
        self,
        head: DraftHead,
        shared: SharedWeights,
        *,
        alignment: AlignmentRule,
        align_top_k: int,
        sampled_tokens: int | None,
        detach: bool,
        mean_over_processes: Callable[[Tensor], Tensor] = lambda count: count,
        any_of_processes: Callable[[Tensor], Tensor] = lambda flags: flags,
    ) -> None:
        """``mean_over_processes`` makes every process divide by the same count of learning positions, so that
        DDP's average over processes is the mean over the whole batch; ``any_of_processes`` (of a bool tensor)
        makes every process normalise over the tokens of the whole batch."""
        super().__init__()
        self.head = head
        self.shared = shared
        self.alignment: AlignmentRule = alignment
        self.align_top_k = align_top_k
        self.sampled_tokens = sampled_tokens
        self.detach = detach
        self.mean_over_processes = mean_over_processes
        self.any_of_processes = any_of_processes

    def forward(self, batch: Batch, steps: int, weights: StepWeights, seed: int) -> tuple[Tensor, Tensor]:
        """Run ``steps`` draft steps; ``seed`` draws the sampled vocabulary.

        Returns:
            A scalar whose gradient is that of the joint loss (its value means nothing), and the detached
            losses v, p and k of every step, (steps, 3) float32.
        """
        embeddings = nn.functional.embedding(batch.tokens, self.shared.embed_tokens).float()
        classes = self._classes(batch, seed)
        mask = AlignmentMask(batch.loss_mask, self.alignment, steps)
        streams, features = Streams(), batch.features
        surrogate, losses = batch.features.new_zeros(()), []
        for step in range(steps):
            predict, regress = self.head(embeddings, features, streams)
            last = step == steps - 1
            learns = mask.learns
            rows = learns if last else learns | mask.asks
            count = self.mean_over_processes(learns.sum().float()) + EPSILON
            tokens = token_losses(
                predict[rows],
                classes,
                batch.soft[rows],
                batch.next_tokens[rows],
                learns[rows],
                count,
                p_weight=weights.p,
                k_weight=weights.k,
                align_top_k=self.align_top_k,
            )
            v = feature_loss(regress, batch.feature_targets, learns, count)
            through_predict = (predict[rows].float() * tokens.gradient.float()).sum()
            surrogate = surrogate + weights.decay**step * (weights.v * v + through_predict)
            losses.append(torch.stack([v.detach(), tokens.p, tokens.k]))
            if not last:
                ok = torch.zeros_like(learns)
                ok[rows] = tokens.ok
                mask.advance(ok)
                features = next_stream(features, regress.detach() if self.detach else regress)
        return surrogate, torch.stack(losses)

    def _classes(self, batch: Batch, seed: int) -> Classes:
        if self.sampled_tokens is None:
            return Classes.all(self.shared.lm_head, self.shared.logit_softcap)
        keep = torch.zeros(len(self.shared.lm_head), dtype=torch.bool, device=batch.next_tokens.device)
        keep[batch.soft.ids[batch.loss_mask].flatten()] = True
        keep[batch.next_tokens[batch.next_tokens >= 0]] = True
        generator = torch.Generator().manual_seed(seed)
        return Classes.sample(
            self.shared.lm_head,
            self.any_of_processes(keep),
            self.sampled_tokens,
            generator,
            self.shared.logit_softcap,
        )
