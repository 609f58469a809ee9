"""The interval of a ratio between two methods, from a paired bootstrap over conversations."""

from __future__ import annotations

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
