"""How likely a chain of drafts must be for another one to pay, found without a clock.

Greedy decoding drafts the same chains at every depth, so one run at the full depth tells what any other would
have yielded: of each round, how likely the head held the first j drafts to be right together, and how many were.
Put together with what a round of k drafts costs, that gives the speed of every pair of K and threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import linear_regression, median
from typing import TYPE_CHECKING, Any, NamedTuple

from griffin_vllm.serving.tuning import Point

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)
# Worth a second thing that can go wrong; less is within the error of the costs.
WORTH_IT = 1.01


class Chain(NamedTuple):
    """A round's drafts: the head's probability of the first j of them together, for each j (none where they were
    looked up, ``lookup.py``), how many the target accepted, and how long the round took."""

    likelihoods: Sequence[float]
    accepted: int
    step_ms: float


class Depth(NamedTuple):
    """At most ``num_speculative_tokens`` drafts, fewer once a chain is less likely than the threshold."""

    num_speculative_tokens: int
    draft_stop_probability: float


def choose_depth(chains: Sequence[Chain], points: Sequence[Point], static: int) -> Depth:
    """The fastest depth for one request at a time; ``static`` without a threshold where none is worth it.

    ``points`` are those of one request at a time. A round's cost is taken as linear in its drafts, since the
    noise of single costs would decide otherwise; drafts that were looked up cost their verification only.
    """
    drafting = [point for point in points if point.num_speculative_tokens > 0]
    if len(drafting) < 2 or not chains:
        return Depth(static, 0.0)
    slope, first = linear_regression(
        [point.num_speculative_tokens for point in drafting], [point.step_ms for point in drafting]
    )

    most = max(point.num_speculative_tokens for point in drafting)
    looked_up = [chain.step_ms for chain in chains if not chain.likelihoods]
    lookup_slope = max(0.0, median(looked_up) - first) / most if looked_up else 0.0

    def speed(depth: Depth) -> float:
        made = [drafts_made(chain, depth) for chain in chains]
        tokens = sum(1 + min(chain.accepted, drafts) for chain, drafts in zip(chains, made, strict=True))
        slopes = [slope if chain.likelihoods else lookup_slope for chain in chains]
        return tokens / sum(first + each * drafts for each, drafts in zip(slopes, made, strict=True))

    depths = [Depth(point.num_speculative_tokens, t) for point in drafting for t in THRESHOLDS]
    best, plain = max(depths, key=speed), Depth(static, 0.0)
    return best if speed(best) >= WORTH_IT * speed(plain) else plain


def drafts_made(chain: Chain, depth: Depth) -> int:
    """The draft that makes a chain too unlikely has been made, and is verified, as in ``proposer.py``."""
    if not chain.likelihoods:
        return depth.num_speculative_tokens
    shown = chain.likelihoods[: depth.num_speculative_tokens]
    stops = (j for j, likelihood in enumerate(shown, 1) if likelihood < depth.draft_stop_probability)
    return next(stops, len(shown))


def record_chains(engine: LLMEngine) -> bool:
    """Note every chain's likelihood from now on; False where this engine's drafts must all be of one length."""
    return bool(engine.collective_rpc(_start_recording)[0])


def chains(engine: LLMEngine, rounds: Iterator[tuple[float, list[int]]]) -> list[Chain]:
    """The chains of one answer, whose rounds ``tune.decode`` goes through."""
    engine.collective_rpc(_recorded)
    counted = [(emitted, 1000 * seconds) for seconds, [emitted] in rounds]
    # the prefill's step drafts for the first round, and the last one's drafts are not verified
    drafted = engine.collective_rpc(_recorded)[0]
    return [Chain(one, count - 1, ms) for one, (count, ms) in zip(drafted, counted, strict=False)]


def _start_recording(worker: Any) -> bool:
    """In the worker."""
    drafter = worker.model_runner.drafter
    if not drafter.shapes_may_vary:
        return False
    drafter.chains = []
    # never reached, and enough for the likelihoods to be computed
    drafter.stop_probability = 1e-30
    propose, sample = drafter.propose, drafter._greedy_sample

    def noted_propose(*args: Any, **kwargs: Any) -> Any:
        drafter.chains.append([])
        return propose(*args, **kwargs)

    def noted_sample(*args: Any) -> Any:
        tokens = sample(*args)
        drafter.chains[-1].append(float(drafter._likelihood.max()))
        return tokens

    drafter.propose, drafter._greedy_sample = noted_propose, noted_sample
    return True


def _recorded(worker: Any) -> list[list[float]]:
    """In the worker: the chains since last asked."""
    drafter = worker.model_runner.drafter
    found: list[list[float]] = drafter.chains
    drafter.chains = []
    return found
