"""Drafts that the text itself gives: what followed when its last tokens stood there before (prompt lookup).

One decoder layer copies badly: to go on with a passage takes finding it first. Where an answer repeats its
question, a list its pattern or a small target itself, the passage is there to be read, at no pass of any model.
vLLM's `ngram` method drafts from nothing else (``vllm/v1/spec_decode/ngram_proposer.py``).
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# A longer agreement says more about what follows, up to here.
LONGEST = 5


def continuation(tokens: np.ndarray, n: int, k: int) -> list[int]:
    """Up to ``k`` tokens that followed an earlier place of the last ``n`` (at least 1) of ``tokens``: of all places
    the latest of those that agree furthest back, ``LONGEST`` tokens at most.

    ``tokens`` is (T,) of any integer type; the result is empty where the last ``n`` stand there for the first
    time. The place may overlap with the end, as it does in a loop that is shorter than ``n``.
    """
    if len(tokens) <= n:
        return []
    starts = (sliding_window_view(tokens[:-1], n) == tokens[-n:]).all(axis=1).nonzero()[0]
    if not starts.size:
        return []
    for further in range(1, min(LONGEST, len(tokens) - 1) - n + 1):
        inside = starts[starts >= further]
        agreeing = inside[tokens[inside - further] == tokens[-n - further]]
        if not agreeing.size:
            break
        starts = agreeing
    follows = int(starts[-1]) + n
    following: list[int] = tokens[follows : follows + k].tolist()
    return following
