"""Mends of vLLM's CPU backend, each of which looks for its defect before it does anything.

The one that every version up to 0.33 needs: random rejection sampling reads temperature, top-k and top-p from
uninitialised memory, whichever speculator drafted. vLLM expands these from one value a request to one value a
drafted token. Its CPU fallback (``_expand_kernel_impl`` in ``vllm/utils/cpu_triton_utils.py``) writes into an
int64 copy of a float32 or int32 output and drops the copy. Fixed upstream by ``patches/0001-*.patch``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

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
    MAX_NUM_TOKENS: int | None = None,
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


def mend_top_k(topk_topp_sampler: Any) -> None:
    """Let ``apply_top_k_only`` of ``vllm/v1/sample/ops/topk_topp_sampler.py`` take no rows.

    A speculating vLLM 0.32 verifies in every step, also in those without a draft (a prompt's first), and
    then a request with top-k and without top-p kills the engine. Only the CPU takes this path.
    """
    original = topk_topp_sampler.apply_top_k_only
    if not current_platform.is_cpu() or hasattr(original, "mends") or not _fails_on_no_rows(original):
        return

    @functools.wraps(original)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return original(logits, k) if len(logits) else logits

    apply_top_k_only.mends = original  # type: ignore[attr-defined]
    topk_topp_sampler.apply_top_k_only = apply_top_k_only
    logger.warning("Mending vLLM's top-k sampling on CPU (it fails on steps without a draft)")


def _fails_on_no_rows(apply_top_k_only: Callable[..., Any]) -> bool:
    try:
        apply_top_k_only(torch.empty(0, 2), torch.empty(0, dtype=torch.int32))
    except RuntimeError:
        return True
    return False


def mend_launchers(cpu_model_runner: Any) -> None:
    """Let vLLM 0.30 launch the CPU's kernels where it speculates.

    Its ``_postprocess_triton`` (``vllm/v1/worker/cpu_model_runner.py``) replaces Triton kernels by name, but
    five of them are launched by objects that took hold of the Triton ones before, so EAGLE-like drafting and
    rejection sampling end in a TypeError. Other versions either have no such objects or replace their kernels.
    """
    runner = cpu_model_runner.CPUModelRunner
    original = getattr(runner, "_postprocess_triton", None)
    if original is None or hasattr(original, "mends"):
        return

    @functools.wraps(original)
    def postprocess(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from vllm.v1.sample import rejection_sampler
        from vllm.v1.spec_decode import utils

        for module in (rejection_sampler, utils):
            for launcher in list(vars(module).values()):
                kernel: Any = getattr(launcher, "__dict__", {}).get("kernel")
                replacement = getattr(module, getattr(kernel, "__name__", ""), None)
                if isinstance(replacement, cpu_model_runner.cpu_tl._FuncWrapper):
                    launcher.kernel = _Positional(kernel, replacement.func)
                    logger.warning("Mending vLLM's launch of %s on CPU", kernel.__name__)

    postprocess.mends = original  # type: ignore[attr-defined]
    runner._postprocess_triton = postprocess


class _Positional:
    """Stands in for a Triton kernel; hands its named arguments to ``implementation`` in the kernel's order."""

    def __init__(self, kernel: Callable[..., Any], implementation: Callable[..., Any]) -> None:
        self.arg_names = tuple(inspect.signature(kernel).parameters)
        self.implementation = implementation

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, **arguments: Any) -> None:
        self.implementation(*(arguments[name] for name in self.arg_names if name in arguments))
