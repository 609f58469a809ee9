"""A mend of vLLM's CPU backend: random rejection sampling reads temperature, top-k and top-p.

vLLM expands these from one value a request to one value a drafted token. Its CPU fallback
(``_expand_kernel_impl`` in ``vllm/utils/cpu_triton_utils.py``) writes into an int64 copy of the output and
drops the copy, so for float32 and int32 tensors the sampler reads uninitialised memory, whichever
speculator drafted. Fixed upstream by ``patches/0001-*.patch``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def mend() -> None:
    """Make vLLM's CPU fallback choose, at its first launch, between vLLM's code and ours.

    Nothing else calls that function, so other platforms never notice; and the first launch is the earliest
    moment at which the C++ kernels are loaded for certain. Safe to call twice; does nothing where a vLLM has
    no such function.
    """
    try:
        from vllm.utils import cpu_triton_utils
    except ImportError:
        return
    original = getattr(cpu_triton_utils, "_expand_kernel_impl", None)
    if original is None or hasattr(original, "mends"):
        return
    mended = _choosing_at_first_launch(original)
    cpu_triton_utils._expand_kernel_impl = mended
    # Up to 0.30 the launch syntax comes from a wrapper object that has taken hold of the function already;
    # later versions register the function itself once the plugins are loaded.
    wrapper = getattr(cpu_triton_utils, "expand_kernel", None)
    if wrapper is not None:
        wrapper.func = mended


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int | None = None,  # noqa: N803 - the Triton kernel's name
) -> None:
    """Write each request's value, or ``replace_to`` for ``replace_from``, once per token into ``output``.

    ``output`` (num_tokens) and ``input_val`` (num_reqs) share any dtype; ``cu_num_tokens`` (num_reqs) are
    inclusive running sums, as in ``expand_kernel`` of ``vllm/v1/sample/rejection_sampler.py``.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(input_val == replace_from, replace_to, input_val).to(output.dtype)
    expanded = values.repeat_interleave(counts)
    output[: expanded.shape[0]] = expanded


def is_defective(kernel: Callable[..., Any]) -> bool:
    """Whether ``kernel`` fails to expand three floats; takes microseconds."""
    output = torch.zeros(3)
    kernel(
        output, torch.tensor([0.5, 0.0]), torch.tensor([2, 3], dtype=torch.int32), 0, 1, MAX_NUM_TOKENS=128
    )
    return output.tolist() != [0.5, 0.5, 1.0]


def _choosing_at_first_launch(original: Callable[..., Any]) -> Callable[..., None]:
    @functools.cache
    def chosen() -> Callable[..., Any]:
        if not is_defective(original):
            return original
        logger.warning("Mending vLLM's random rejection sampling on CPU (expand_kernel drops its output)")
        return expand

    @functools.wraps(original)
    def launch(*args: Any, **kwargs: Any) -> None:
        chosen()(*args, **kwargs)

    launch.mends = original  # type: ignore[attr-defined]
    return launch
