"""Tiny models that several tests share. Heads and targets here are random: they test code, not quality."""

from __future__ import annotations

from pathlib import Path

import torch

from griffin_vllm.checkpoint import DRAFT_TO_TARGET, TARGET_TO_DRAFT, save_head, tensor_shapes
from griffin_vllm.config import HeadConfig

# The smallest sizes that vLLM's CPU attention takes (head_dim 32) and that two ranks can share.
TINY = HeadConfig(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=32,
    draft_vocab_size=32,
    max_position_embeddings=1024,
    num_speculative_tokens=3,
)


def random_head_tensors(config: HeadConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of a head with ``config`` (norm weights near one), float32; no embeddings."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name in (DRAFT_TO_TARGET, TARGET_TO_DRAFT):
            raise NotImplementedError("draft vocabularies have their own tests")
        noise = torch.randn(shape, generator=generator)
        if "layernorm" in name:
            tensors[name] = 1 + 0.1 * noise
        else:
            tensors[name] = noise * shape[-1] ** -0.5
    return tensors


def write_random_head(folder: Path, config: HeadConfig = TINY, seed: int = 0) -> Path:
    """A head folder in the served layout, float32."""
    save_head(folder, config.to_served(), random_head_tensors(config, seed), dtype=None)
    return folder
