"""The three losses of a draft step, and how they are computed without a full-vocabulary graph.

- v: SmoothL1 between regress and the target's next feature, mean over d
- p: cross entropy of ``lm_head(predict)`` against the target's distribution of the same token
- k: the same over the target's ten most likely tokens only
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_vllm.training.target import SoftTargets, cap_logits

TOP_TOKENS = 10  # of the k loss


@dataclass(frozen=True)
class Classes:
    """The tokens that the draft distribution is normalised over, as rows of ``lm_head``.

    All of the vocabulary, or a sample of it: with ``tail`` sampled rows standing for ``tail_size`` tokens
    their logits are raised by log(tail_size / tail), which makes the sum of exponentials unbiased. A rank counts
    each of them as tail_size / tail tokens.

    ``weight`` (C, d); ``bias`` (C,) float32 or None; ``position`` (V,) int64, a token's row in ``weight``
    (only the rows that :meth:`sample` was asked to keep are meaningful); ``softcap`` of the logits.
    """

    weight: Tensor
    bias: Tensor | None
    position: Tensor
    softcap: float | None

    @classmethod
    def all(cls, lm_head: Tensor, softcap: float | None = None) -> Classes:
        return cls(lm_head, None, torch.arange(len(lm_head), device=lm_head.device), softcap)

    @classmethod
    def sample(
        cls,
        lm_head: Tensor,
        keep: Tensor,
        tail: int,
        generator: torch.Generator,
        softcap: float | None = None,
    ) -> Classes:
        """``keep`` (V,) bool, and ``tail`` of the other tokens, drawn uniformly."""
        others = torch.nonzero(~keep).flatten()
        if len(others) <= tail:
            return cls.all(lm_head, softcap)
        drawn = others[torch.randperm(len(others), generator=generator)[:tail].to(others.device)]
        ids = torch.cat([torch.nonzero(keep).flatten(), drawn])
        bias = torch.zeros(len(ids), device=lm_head.device)
        bias[-tail:] = math.log(len(others) / tail)
        position = torch.zeros(len(lm_head), dtype=torch.int64, device=lm_head.device)
        position[ids] = torch.arange(len(ids), device=lm_head.device)
        return cls(lm_head[ids], bias, position, softcap)

    def logits(self, predict: Tensor) -> Tensor:
        """(N, C) float32, for ``predict`` (N, d)."""
        logits = cap_logits((predict.to(self.weight.dtype) @ self.weight.T).float(), self.softcap)
        return logits if self.bias is None else logits + self.bias

    def better(self, logits: Tensor, true: Tensor) -> Tensor:
        """How many tokens are more likely than one of ``logits`` (N, C) that is no sampled one and has the logit
        ``true`` (N, 1): (N,), an estimate where tokens are sampled."""
        if self.bias is None:
            return (logits > true).count_nonzero(-1)
        return (logits > true + self.bias).float() @ self.bias.exp()


@dataclass(frozen=True)
class TokenLosses:
    """``p`` and ``k``: masked means, detached; ``ok`` (N,) bool: the true token is among the top-k;
    ``gradient`` (N, d): of ``p_weight * p + k_weight * k`` with respect to predict."""

    p: Tensor
    k: Tensor
    ok: Tensor
    gradient: Tensor


def token_losses(
    predict: Tensor,
    classes: Classes,
    targets: SoftTargets,
    tokens: Tensor,
    learns: Tensor,
    count: Tensor,
    *,
    p_weight: float,
    k_weight: float,
    align_top_k: int,
    rows: int = 256,
) -> TokenLosses:
    """Cross entropies and their gradient, ``rows`` positions at a time.

    The gradient is taken chunk by chunk, so no more than ``rows`` x C logits are alive at once; hand it on
    with ``(predict * gradient).sum().backward()`` or its sum with other losses.

    Args:
        predict: (N, d), the positions of interest only.
        targets: (N, k) each, most likely first.
        tokens: (N,) the true token x_(t+2) of each position; negative where it cannot be drafted.
        learns: (N,) bool; the others are only asked for ``ok``.
        count: scalar, what the sums over ``learns`` are divided by.
    """
    gradient = torch.zeros_like(predict)
    p_sum, k_sum = predict.new_zeros((), dtype=torch.float32), predict.new_zeros((), dtype=torch.float32)
    ok = torch.zeros_like(learns)
    for start in range(0, len(predict), rows):
        part = slice(start, start + rows)
        leaf = predict[part].detach().requires_grad_()
        logits = classes.logits(leaf)
        with torch.no_grad():
            values = logits.detach()
            true = values.gather(1, classes.position[tokens[part]][:, None])
            ok[part] = (classes.better(values, true) < align_top_k) & (tokens[part] >= 0)
            ids = classes.position[targets.ids[part]]
            weights = targets.probabilities[part] * learns[part][:, None] / count
            normaliser = values.logsumexp(-1, keepdim=True)
            terms = weights * (normaliser - values.gather(1, ids))
            p_sum, k_sum = p_sum + terms.sum(), k_sum + terms[:, :TOP_TOKENS].sum()
            joint = p_weight * weights
            joint[:, :TOP_TOKENS] += k_weight * weights[:, :TOP_TOKENS]
            # The gradient with respect to the logits takes their place: they are training's largest tensor.
            through_logits = values.sub_(normaliser).exp_().mul_(joint.sum(-1, keepdim=True))
            through_logits.scatter_add_(1, ids, -joint)
        (gradient[part],) = torch.autograd.grad(logits, leaf, through_logits)
    return TokenLosses(p_sum, k_sum, ok, gradient)


def feature_loss(regress: Tensor, target: Tensor, learns: Tensor, count: Tensor) -> Tensor:
    """The v loss, a differentiable scalar: ``regress`` and ``target`` (B, T, d), ``learns`` (B, T) bool."""
    per_position = F.smooth_l1_loss(regress.float(), target.float(), reduction="none").mean(-1)
    return (per_position * learns).sum() / count
