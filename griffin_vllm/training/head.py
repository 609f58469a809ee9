"""The heads' maths for training: the GRIFFIN head and the EAGLE head, under their published tensor names.

Shapes: B sequences of T positions; d the target's hidden size, I the head's intermediate size.
Position t takes the target's feature f_t (or the head's own estimate of it) and the embedding of token
x_(t+1), and gives *predict* (``lm_head`` on it is the draft distribution of x_(t+2)) and *regress* (an
estimate of f_(t+1), the feature of position t + 1 at the next draft step).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from griffin_vllm.config import HeadConfig
from griffin_vllm.training.attention import Attention


@dataclass
class Streams:
    """Keys and values (B, H, T, D) of every stream so far, stream 0 (the target's features) first."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class FusionMLP(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.input_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.up_proj = nn.Linear(2 * d, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, d, bias=False)

    def forward(self, normed: Tensor, embeddings: Tensor) -> Tensor:
        both = torch.cat([self.input_layernorm(normed), self.input_layernorm(embeddings)], -1)
        return self.down_proj(F.silu(self.up_proj(both)))


class TokenGuidedFusion(nn.Module):
    """Paper section 3.2: mix token and feature, then bring the token's embedding back in."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.fc = nn.Linear(2 * d, d, bias=True)
        self.post_attention_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.mlp = FusionMLP(config)

    def forward(self, embeddings: Tensor, features: Tensor) -> Tensor:
        mixed = self.fc(torch.cat([embeddings, features], -1))
        return mixed + self.mlp(self.post_attention_layernorm(mixed), embeddings)


class StreamAttention(nn.Module):
    """Self-attention whose query is the newest stream; rotary position of the pair at t is t."""

    def __init__(self, config: HeadConfig, attention: Attention) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.attention = attention
        d, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(d, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, d, bias=False)

    def forward(self, x: Tensor, streams: Streams) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = rotary(T, self.head_dim, self.theta, x.device)
        group = self.heads // self.kv_heads
        streams.keys.append(rotate(k, cos, sin).repeat_interleave(group, 1))
        streams.values.append(v.repeat_interleave(group, 1))
        out = self.attention(rotate(q, cos, sin), streams.keys, streams.values)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class GatedMLP(nn.Module):
    def __init__(self, config: HeadConfig, outputs: int) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, outputs * d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One decoder layer without an input norm; ``outputs`` vectors of size d share its residual."""

    def __init__(self, config: HeadConfig, attention: Attention, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.self_attn = StreamAttention(config, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, outputs)

    def forward(self, x: Tensor, streams: Streams) -> tuple[Tensor, ...]:
        a = x + self.self_attn(x, streams)
        m = self.mlp(self.post_attention_layernorm(a))
        return tuple(a + part for part in m.chunk(self.outputs, dim=-1))


class DraftHead(nn.Module):
    """What both heads share: fuse token and feature, then one decoder layer over the streams."""

    layers: nn.ModuleList

    @property
    def mixing(self) -> Tensor:
        """The weight (d, 2d) that first brings token and feature together."""
        raise NotImplementedError

    def fuse(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(B, T, d), the input of the decoder layer."""
        raise NotImplementedError

    def forward(self, embeddings: Tensor, features: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """One draft step.

        Args:
            embeddings: (B, T, d), of x_(t+1) at position t.
            features: (B, T, d), the newest stream.
            streams: keys and values of the earlier steps; this step's are appended.

        Returns:
            predict and regress, (B, T, d) each.
        """
        outputs = self.layers[0](self.fuse(embeddings, features), streams)
        return outputs[0], outputs[-1]

    @torch.no_grad()
    def reset_parameters(self, embedding_rms: float, feature_rms: float) -> None:
        """Start from a small, faithful copy of the feature, with a token half that is heard at once.

        A residual that starts large and random has to be unlearnt first: on SmolLM2 this start has after 500
        steps the acceptance length that a unit-scale random one has after 1000 (1.38 and 1.36; the logs are
        benchmarks/results/start-*). Embeddings and final features of one target can differ in scale by more
        than ten (SmolLM2: 0.136 against 1.83); the token half makes up for it.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        token, feature = self.mixing.chunk(2, dim=1)
        unit = self.mixing.shape[1] ** -0.5
        nn.init.normal_(token, std=0.25 * unit * feature_rms / embedding_rms)
        nn.init.normal_(feature, std=0.1 * unit)
        feature.diagonal().add_(0.3)


class GriffinHead(DraftHead):
    """Token-Guided Fusion and the dual head: predict and regress are different vectors."""

    def __init__(self, config: HeadConfig, attention: Attention) -> None:
        super().__init__()
        self.fc = TokenGuidedFusion(config)
        self.layers = nn.ModuleList([DecoderLayer(config, attention, outputs=2)])

    @property
    def mixing(self) -> Tensor:
        return self.fc.fc.weight

    def fuse(self, embeddings: Tensor, features: Tensor) -> Tensor:
        return self.fc(embeddings, features)


class EagleHead(DraftHead):
    """EAGLE's head, also HASS's: predict and regress are the same vector; ``fc`` has no bias in vLLM."""

    def __init__(self, config: HeadConfig, attention: Attention) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config, attention, outputs=1)])

    @property
    def mixing(self) -> Tensor:
        return self.fc.weight

    def fuse(self, embeddings: Tensor, features: Tensor) -> Tensor:
        return self.fc(torch.cat([embeddings, features], -1))


def next_stream(features: Tensor, regress: Tensor) -> Tensor:
    """The feature of each position at the next draft step: regress at t - 1; position 0 keeps its own."""
    return torch.cat([features[:, :1], regress[:, :-1]], dim=1)


def rotary(T: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim) float32 of positions 0 .. T - 1."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(T, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` (B, H, T, D), computed in float32."""
    left, right = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)
