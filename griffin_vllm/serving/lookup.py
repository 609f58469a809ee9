"""Drafts that the text itself gives: what followed when its last tokens stood there before (prompt lookup).

One decoder layer copies badly: to go on with a passage takes finding it first. Where an answer repeats its
question, a list its pattern or a small target itself, the passage is there to be read, at no pass of any model.
vLLM's `ngram` method drafts from nothing else (``vllm/v1/spec_decode/ngram_proposer.py``).
"""

from __future__ import annotations

import numpy as np

# A longer agreement says more about what follows, up to here.
LONGEST = 5


def continuation(tokens: np.ndarray, n: int, k: int) -> list[int]:
    """``k`` tokens that may follow ``tokens``, since they followed where the last ``n`` (at least 1) stood before: of
    all such places the latest of those that agree furthest back, ``LONGEST`` tokens at most.

    ``tokens`` is (T,) of any integer type; the result is empty where the last ``n`` stand there for the first
    time. Where the text ends before ``k`` tokens followed, it goes on as a loop does, from that place again.
    """
    places = (tokens[:-1] == tokens[-1:]).nonzero()[0]
    for back in range(1, max(n, LONGEST)):
        inside = places[places >= back]
        agreeing = inside[tokens[inside - back] == tokens[-1 - back]] if inside.size else inside
        if not agreeing.size:
            if back < n:
                return []
            break
        places = agreeing
    if not places.size:
        return []
    following: list[int] = np.resize(tokens[places[-1] + 1 :], k).tolist()
    return following
