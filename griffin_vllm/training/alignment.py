"""The alignment mask: which positions each draft step of a batch still learns from (paper section 3.1).

``ok_n(t)`` says that the true token x_(t+2) is among step n's top-k under ``lm_head(predict_n(t))``. With
A_1 = ok_1 and A_n(t) = ok_n(t) * A_(n-1)(t-1), step n + 1 learns where ``loss_mask * A_n`` is on. That is
the reference's rule. The *causal* reading asks about the position where the step's input was drafted:
A_1(t) = ok_1(t-1) and A_n(t) = ok_n(t-1) * A_(n-1)(t-1). At the first position, where the reference wraps
around to the end of the sequence, nothing came before, so the mask is off there from step 3 on (causal:
from step 2 on).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AlignmentRule = Literal["off", "reference", "causal"]


class AlignmentMask:
    """Follows one batch through its ``steps`` draft steps. All masks are (B, T) bool."""

    def __init__(self, loss_mask: Tensor, rule: AlignmentRule, steps: int) -> None:
        self.loss_mask = loss_mask
        self.rule = rule
        self._aligned: Tensor | None = None
        # A position before the answer still decides about those that follow it at later steps.
        self._relevant = loss_mask
        for _ in range(steps - 1):
            self._relevant = self._relevant | F.pad(self._relevant[:, 1:], (0, 1))

    @property
    def learns(self) -> Tensor:
        """Where the current step learns."""
        return self.loss_mask if self._aligned is None else self.loss_mask & self._aligned

    @property
    def asks(self) -> Tensor:
        """Where :meth:`advance` needs to know ``ok`` of the current step; elsewhere it may be anything."""
        if self.rule == "off":
            return torch.zeros_like(self.loss_mask)
        if self._aligned is None:
            return self._relevant
        return self._relevant & (self._aligned if self.rule == "causal" else _delayed(self._aligned))

    def advance(self, ok: Tensor) -> None:
        """Go to the next step, given the current one's ``ok`` (B, T) bool."""
        if self.rule == "reference":
            self._aligned = ok if self._aligned is None else ok & _delayed(self._aligned)
        elif self.rule == "causal":
            self._aligned = _delayed(ok if self._aligned is None else ok & self._aligned)


def _delayed(mask: Tensor) -> Tensor:
    """``mask`` one position later; off at position 0."""
    return F.pad(mask[:, :-1], (1, 0))
