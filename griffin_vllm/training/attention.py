"""Attention over the streams of multi-step training, in O(T^2 + nT) work and, with a fused kernel, O(nT) memory.

At draft step n (stream s = n - 1 is the newest) the query at position t sees stream 0 at every position
<= t - s and each later stream i at the one position t - s + i: real features for the accepted prefix, the
head's own for what it has drafted. That is one causal product over stream 0, shifted by s, and s
diagonals, joined in one softmax. A fused kernel gives the causal product and its log-sum-exp; handed the
joint output and log-sum-exp, the same kernel's backward pass gives the exact gradients of its part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_vllm.errors import GriffinError

Attention = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
AttentionName = Literal["auto", "torch", "xformers"]


@dataclass(frozen=True)
class CausalKernel:
    """A fused causal attention on (B, H, T, D) tensors.

    ``forward(q, k, v) -> output, log-sum-exp (B, H, T) float32``;
    ``backward(grad_output, q, k, v, output, log_sum_exp) -> grad_q, grad_k, grad_v``.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose_attention(name: AttentionName, device: torch.device) -> Attention:
    """The attention to train with on ``device``; ``auto`` takes the fastest that is installed.

    Raises:
        GriffinError: xformers is asked for and cannot be used.
    """
    if name == "xformers" or (name == "auto" and device.type == "cuda"):
        try:
            kernel = _xformers_kernel()
        except ImportError as error:
            if name == "xformers":
                raise GriffinError("attention: xformers is not installed (pip install xformers)") from error
        else:
            if device.type != "cuda":
                raise GriffinError.at("attention", "device", device.type, "'cuda' for xformers")
            return lambda q, keys, values: fused_stream_attention(kernel, q, keys, values)
    if device.type == "cpu":
        return lambda q, keys, values: fused_stream_attention(CPU_KERNEL, q, keys, values)
    return dense_stream_attention


def dense_stream_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The definition, for any device, in O(nT^2) memory: ``q`` and each of ``keys`` and ``values`` (B, H, T, D)."""
    mask = visible_positions(len(keys), q.shape[2], q.device)
    return F.scaled_dot_product_attention(q, torch.cat(list(keys), 2), torch.cat(list(values), 2), mask)


def visible_positions(streams: int, T: int, device: torch.device) -> Tensor:
    """(T, streams * T) bool: which positions of each stream the newest stream's queries see."""
    newest, t = streams - 1, torch.arange(T, device=device)
    visible = [t[None, :] <= t[:, None] - newest]
    visible += [t[None, :] == t[:, None] - newest + i for i in range(1, newest + 1)]
    return torch.cat(visible, dim=1)


def fused_stream_attention(
    kernel: CausalKernel, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """The same as :func:`dense_stream_attention` without its (T, nT) scores."""
    if len(keys) == 1:
        return F.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True)
    if q.shape[2] < len(keys):  # no query sees stream 0, and the CPU's kernel dies of none
        return dense_stream_attention(q, keys, values)
    return _StreamAttention.apply(kernel, q, *keys, *values)


class _StreamAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: CausalKernel, q: Tensor, *keys_values: Tensor) -> Tensor:
        n = len(keys_values) // 2
        keys, values = keys_values[:n], keys_values[n:]
        newest, T = n - 1, q.shape[2]
        prefix, prefix_lse = kernel.forward(
            q[:, :, newest:], keys[0][:, :, : T - newest], values[0][:, :, : T - newest]
        )
        lse = F.pad(prefix_lse, (newest, 0), value=float("-inf"))
        scores = [_diagonal(q, keys[i], newest - i) for i in range(1, n)]
        joint = torch.stack([lse, *scores]).logsumexp(0)
        output = F.pad(prefix.float(), (0, 0, newest, 0)) * (lse - joint).exp()[..., None]
        for i, score in enumerate(scores, start=1):
            output += (score - joint).exp()[..., None] * _delay(values[i], newest - i)
        output = output.to(q.dtype)
        ctx.kernel = kernel
        ctx.save_for_backward(q, joint, output, *scores, *keys_values)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        q, joint, output, *rest = ctx.saved_tensors
        n = (len(rest) + 1) // 3
        scores, keys, values = rest[: n - 1], rest[n - 1 : 2 * n - 1], rest[2 * n - 1 :]
        newest, T = n - 1, q.shape[2]
        grad = grad_outputs[0].contiguous()
        d_q0, d_k0, d_v0 = ctx.kernel.backward(
            grad[:, :, newest:].contiguous(),
            q[:, :, newest:].contiguous(),
            keys[0][:, :, : T - newest].contiguous(),
            values[0][:, :, : T - newest].contiguous(),
            output[:, :, newest:].contiguous(),
            joint[:, :, newest:].contiguous(),
        )
        d_q = F.pad(d_q0.float(), (0, 0, newest, 0))
        d_keys = [F.pad(d_k0, (0, 0, 0, newest))]
        d_values = [F.pad(d_v0, (0, 0, 0, newest))]
        scale = q.shape[-1] ** -0.5
        delta = (grad.float() * output.float()).sum(-1)
        for i, score in enumerate(scores, start=1):
            delay = newest - i
            weight = (score - joint).exp()
            d_score = weight * ((grad * _delay(values[i], delay)).float().sum(-1) - delta) * scale
            d_q += d_score[..., None] * _delay(keys[i], delay)
            d_keys.append(_advance((d_score[..., None] * q).to(q.dtype), delay))
            d_values.append(_advance((weight[..., None] * grad).to(q.dtype), delay))
        return None, d_q.to(q.dtype), *d_keys, *d_values


def _diagonal(q: Tensor, key: Tensor, delay: int) -> Tensor:
    """Scaled scores (B, H, T) float32 of the query at t with the key at t - ``delay``; -inf before it exists."""
    scores = (q[:, :, delay:] * key[:, :, : key.shape[2] - delay]).float().sum(-1) * q.shape[-1] ** -0.5
    return F.pad(scores, (delay, 0), value=float("-inf"))


def _delay(x: Tensor, steps: int) -> Tensor:
    """``x`` (B, H, T, D) moved ``steps`` positions to the right, zeros moving in."""
    return F.pad(x[:, :, : x.shape[2] - steps], (0, 0, steps, 0))


def _advance(x: Tensor, steps: int) -> Tensor:
    """``x`` (B, H, T, D) moved ``steps`` positions to the left, zeros moving in."""
    return F.pad(x[:, :, steps:], (0, 0, 0, steps))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, output, lse, 0.0, True
    )


CPU_KERNEL = CausalKernel(_cpu_forward, _cpu_backward)


def _xformers_kernel() -> CausalKernel:
    """xformers' memory-efficient attention; it wants (B, T, H, D) and a lower-triangular bias."""
    from xformers import ops

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = ops.memory_efficient_attention_forward_requires_grad(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=ops.LowerTriangularMask()
        )
        return output.transpose(1, 2), lse[:, :, : q.shape[2]].float()

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = ops.memory_efficient_attention_backward(
            grad.transpose(1, 2),
            output.transpose(1, 2),
            lse,
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_bias=ops.LowerTriangularMask(),
        )
        return tuple(x.transpose(1, 2) for x in grads)

    return CausalKernel(forward, backward)
