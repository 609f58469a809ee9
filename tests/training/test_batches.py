"""What a batch is made of: which feature, token, distribution and mask stands at a position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin_vllm.training.batches import Batch, make_batch
from griffin_vllm.training.target import SoftTargets

WIDTH = 3
# Tokens, and of each whether the target generated it.
SAMPLES: Any = [
    (torch.tensor([10, 11, 12, 13, 14]), torch.tensor([False, False, True, True, True])),
    (torch.tensor([20, 21, 22]), torch.tensor([False, True, True])),
]


class Countable:
    """Of sample i at position t the feature 100 i + t, and the token 1000 i + t as the likeliest next one."""

    def features(self, samples: Sequence[int], tokens: Sequence[Tensor]) -> list[tuple[Tensor, SoftTargets]]:
        found = []
        for sample, ids in zip(samples, tokens, strict=True):
            at = torch.arange(len(ids))
            soft = SoftTargets((1000 * sample + at)[:, None], torch.full((len(ids), 1), 0.5))
            found.append(((100.0 * sample + at)[:, None].expand(-1, WIDTH), soft))
        return found


def batch(noise: float = 0.0, samples: Sequence[int] = (0, 1), seed: int = 0) -> Batch:
    return make_batch(SAMPLES, Countable(), samples, noise, seed)


def test_a_position_pairs_a_feature_with_the_token_after_it_and_asks_for_the_one_after_that() -> None:
    one = batch()
    assert one.features[..., 0].tolist() == [[0, 1, 2, 3], [100, 101, 0, 0]]
    assert one.feature_targets[..., 0].tolist() == [[1, 2, 3, 4], [101, 102, 0, 0]]
    assert one.tokens.tolist() == [[11, 12, 13, 14], [21, 22, 0, 0]]
    assert one.next_tokens[:, :1].tolist() == [[12], [22]]
    assert one.next_tokens[0, :3].tolist() == [12, 13, 14]
    assert one.soft.ids[..., 0].tolist() == [[1, 2, 3, 4], [1001, 1002, 0, 0]]


def test_a_position_counts_where_the_target_generated_the_predicted_token() -> None:
    assert batch().loss_mask.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_noise_is_on_the_input_features_only_and_wider_in_shorter_samples() -> None:
    clean, noisy = batch(), batch(noise=0.2)
    assert torch.equal(noisy.feature_targets, clean.feature_targets)
    for row, length in enumerate((4, 2)):
        off = (noisy.features - clean.features)[row].abs()
        half = 0.2 * 512 / length / 2
        assert half / 4 < off[:length].max() <= half
        assert not off[length:].any()


@pytest.mark.parametrize("samples", [(1,), (1, 0)])
def test_a_samples_noise_is_the_same_in_every_batch(samples: Sequence[int]) -> None:
    alone, together = batch(0.2, samples), batch(0.2)
    torch.testing.assert_close(alone.features[0, :2], together.features[1, :2])
    assert not torch.equal(batch(0.2, seed=1).features, together.features)
