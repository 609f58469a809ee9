"""Where bfloat16 products are fast: training, feature extraction and serving all want to know."""

from __future__ import annotations

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16 as fast as in float32, or faster.

    An x86 CPU with AVX2 only emulates it, several times as slowly, so that what is bound by memory elsewhere, such as
    verifying a few drafts, is bound by arithmetic there.
    """
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
