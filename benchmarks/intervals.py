"""The interval of a ratio between two methods, from a paired bootstrap over conversations."""

from __future__ import annotations

from typing import Any

import numpy as np

DRAWS = 4000


def paired_ratio(data: np.ndarray, draws: int = DRAWS) -> tuple[float, tuple[float, float]]:
    """Ratio of two pooled quotients and its 95 % interval.

    Whole conversations are drawn, the same ones for both sides. With more than one repeat each draw is
    multiplied by a factor with the spread that the ratio had between repeats (Student's t). Draws of none but
    conversations without tokens say nothing and are left out.

    Args:
        data: (side, numerator or denominator, repeats, conversations).
    """

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[0, 0] / sums[0, 1]) / (sums[1, 0] / sums[1, 1])

    repeats, conversations = data.shape[2:]
    random = np.random.default_rng(0)
    times_drawn = random.multinomial(conversations, np.full(conversations, 1 / conversations), draws)
    sums = data.sum(axis=2) @ times_drawn.T
    drawn = np.log(ratio(sums[:, :, (sums > 0).all(axis=(0, 1))]))
    if repeats > 1:
        spread = np.log(ratio(data.sum(axis=3))).std(ddof=1) / np.sqrt(repeats)
        drawn += spread * random.standard_t(repeats - 1, len(drawn))
    low, high = np.exp(np.percentile(drawn, [2.5, 97.5]))
    return float(ratio(data.sum(axis=(2, 3)))), (float(low), float(high))


def ratio_interval(
    ours: dict[str, list[int]], theirs: dict[str, list[int]]
) -> tuple[float, tuple[float, float]]:
    """Ratio of two acceptance lengths and its 95 % interval; each side (tokens, passes) by conversation, as
    in a row's ``conversations``."""
    names = sorted(ours.keys() & theirs.keys())
    sides = [np.array([side[name] for name in names]).T[:, None] for side in (ours, theirs)]
    return paired_ratio(np.array(sides))


def speedup(
    samples: dict[str, Any], plain: dict[str, Any], draws: int = DRAWS, *, loop_free: bool = False
) -> tuple[float, tuple[float, float]] | None:
    """Ratio of pooled decoding speeds and its 95 % interval, from two rows' ``samples`` of the same conversations, or
    of those that do not loop in ``plain``; None without a repeat that both have, or without such conversations."""
    both = sorted(set(samples["repeats"]) & set(plain["repeats"]))
    chosen = [i for i, loops in enumerate(plain["loops"]) if not loops] if loop_free else slice(None)
    if not both or chosen == []:
        return None
    sides = [
        [[side[field][side["repeats"].index(repeat)] for repeat in both] for field in ("tokens", "seconds")]
        for side in (samples, plain)
    ]
    return paired_ratio(np.array(sides)[..., chosen], draws)
