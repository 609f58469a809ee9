"""The training head, its losses and its masks give what the GRIFFIN authors' implementation gives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from griffin_vllm.config import HeadConfig
from griffin_vllm.training.alignment import AlignmentMask
from griffin_vllm.training.attention import Attention, choose_attention, dense_stream_attention
from griffin_vllm.training.head import GriffinHead, Streams, next_stream
from griffin_vllm.training.losses import Classes, feature_loss, token_losses
from griffin_vllm.training.steps import EPSILON
from griffin_vllm.training.target import soft_targets

VECTORS = Path(
    os.environ.get("GRIFFIN_REFERENCE_VECTORS")
    or Path(__file__).parents[2].parent / "shared/data/reference-vectors"
)
FILES = sorted(VECTORS.glob("*.safetensors"))
TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(not FILES, reason=f"no reference vectors in {VECTORS}")
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file: Path, tmp_path: Path) -> tuple[HeadConfig, dict[str, Tensor], int]:
    with safe_open(file, "pt") as stored:
        (tmp_path / "config.json").write_text(stored.metadata()["config"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    steps = sum(name.endswith(".predict") and name.startswith("train.") for name in tensors)
    assert json.loads((tmp_path / "config.json").read_text())
    return HeadConfig.read(tmp_path / "config.json"), tensors, steps


@each_file
@pytest.mark.parametrize(
    "attention",
    [dense_stream_attention, choose_attention("auto", torch.device("cpu"))],
    ids=["dense", "fused"],
)
def test_training_head_gives_the_reference_vectors(file: Path, tmp_path: Path, attention: Attention) -> None:
    config, tensors, steps = read(file, tmp_path)
    head = GriffinHead(config, attention)
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    embeddings = weights.pop("embed_tokens.weight")[tensors["input.input_ids"]]
    weights.pop("lm_head")
    head.load_state_dict(weights)

    streams, features = Streams(), tensors["input.hidden_states"]
    for step in range(steps):
        predict, regress = head(embeddings, features, streams)
        torch.testing.assert_close(predict, tensors[f"train.step{step}.predict"], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(regress, tensors[f"train.step{step}.regress"], atol=TOLERANCE, rtol=0)
        features = next_stream(features, regress)


@each_file
def test_losses_and_masks_give_the_reference_vectors(file: Path, tmp_path: Path) -> None:
    config, tensors, steps = read(file, tmp_path)
    features, tokens, lm_head = (
        tensors["input.hidden_states"],
        tensors["input.input_ids"],
        tensors["weights.lm_head"],
    )
    feature_targets = torch.cat([features[:, 1:], torch.zeros_like(features[:, :1])], 1)
    soft = soft_targets(feature_targets.flatten(0, 1), lm_head, k=config.vocab_size)
    # The reference wraps around: the last position's next token is the first one.
    next_tokens = tokens.roll(-1, dims=1)
    mask = AlignmentMask(tensors["input.loss_mask"].bool(), "reference", steps)
    for step in range(steps):
        expected = tensors[f"loss.step{step}.mask"].bool()
        assert torch.equal(mask.learns[:, step:-1], expected[:, step:-1])
        count = expected.sum() + EPSILON
        found = token_losses(
            tensors[f"train.step{step}.predict"].flatten(0, 1),
            Classes.all(lm_head),
            soft,
            next_tokens.flatten(),
            expected.flatten(),
            count,
            p_weight=0.1,
            k_weight=0.5,
            align_top_k=3,
        )
        v = feature_loss(tensors[f"train.step{step}.regress"], feature_targets, expected, count)
        torch.testing.assert_close(found.p[None], tensors[f"loss.step{step}.ploss"], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(
            found.k[None], tensors[f"loss.step{step}.topk_loss"], atol=TOLERANCE, rtol=0
        )
        torch.testing.assert_close(v[None], tensors[f"loss.step{step}.vloss"], atol=TOLERANCE, rtol=0)
        mask.advance(found.ok.view_as(tokens))
