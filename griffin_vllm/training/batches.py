"""From samples to the tensors that the draft steps work on.

A sample is tokens x_0 .. x_(L-1) with the target's features f_0 .. f_(L-1). Its T = L - 1 positions pair
f_t with x_(t+1). The loss counts the positions whose *predicted* token x_(t+2) the target generated (the
reference asks the role of x_t instead), and never the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.sources import Source
from griffin_vllm.training.target import SoftTargets


@dataclass(frozen=True)
class Batch:
    """B sequences, right-padded to T positions.

    ``features`` and ``feature_targets`` (B, T, d): f_t and f_(t+1); ``tokens`` and ``next_tokens`` (B, T)
    int64: x_(t+1) and x_(t+2); ``soft`` (B, T, k): the target's distribution of x_(t+2); ``loss_mask``
    (B, T) bool.
    """

    features: Tensor
    feature_targets: Tensor
    tokens: Tensor
    next_tokens: Tensor
    soft: SoftTargets
    loss_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.features.to(device),
            self.feature_targets.to(device),
            self.tokens.to(device),
            self.next_tokens.to(device),
            SoftTargets(self.soft.ids.to(device), self.soft.probabilities.to(device)),
            self.loss_mask.to(device),
        )

    def without_loss(self) -> Batch:
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))


def make_batch(
    dataset: TokenDataset,
    source: Source,
    samples: Sequence[int],
    noise: float,
    seed: int,
    positions: int = 0,
) -> Batch:
    """Assemble ``samples``, padded to the longest or to ``positions``.

    A process that pads its part of a batch as the whole batch is padded has the same tokens in it: padding
    is token 0, which a sampled vocabulary then keeps.

    ``noise`` is the reference's 0.2: uniform noise of that width times 512 / T on the input features. A
    sample's noise depends on ``seed`` and the sample only, so it is the same in every batch layout.
    """
    pairs = [dataset[sample] for sample in samples]
    inputs, feature_targets, ids, probabilities = [], [], [], []
    for sample, (features, soft) in zip(
        samples, source.features(samples, [tokens for tokens, _ in pairs]), strict=True
    ):
        clean = features[:-1]
        if noise:
            generator = torch.Generator().manual_seed(hash((seed, sample)))
            width = noise * 512 / len(clean)
            uniform = torch.rand(clean.shape, generator=generator) - 0.5
            inputs.append(clean.float() + width * uniform.to(clean.device))
        else:
            inputs.append(clean.float())
        feature_targets.append(features[1:].float())
        ids.append(soft.ids[1:])
        probabilities.append(soft.probabilities[1:])
    loss_masks = [torch.cat([mask[2:], mask.new_zeros(1)]) for _, mask in pairs]
    pad = partial(_padded, positions=max(positions, *map(len, inputs)))
    return Batch(
        pad(inputs),
        pad(feature_targets),
        pad([tokens[1:] for tokens, _ in pairs]),
        pad([torch.cat([tokens[2:], tokens[-1:]]) for tokens, _ in pairs]),
        SoftTargets(pad(ids), pad(probabilities)),
        pad(loss_masks),
    )


def _padded(rows: Sequence[Tensor], positions: int) -> Tensor:
    """``rows`` (T_i, ...) as one tensor (B, ``positions``, ...), zeros behind each."""
    out = rows[0].new_zeros(len(rows), positions, *rows[0].shape[1:])
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
