"""How likely a chain of drafts must be for another one to pay: one run's chains replayed at every depth, with the costs
that ``tune.py`` measured.

Greedy decoding drafts the same chains at every depth (nearly so where some are looked up), so one run at the full
depth tells what any other would have yielded: of each round, how likely the first j drafts were held to be right
together, by the head or by how far a passage agrees (``lookup.py``), and how many were. Put together with what a round
of k drafts costs, that gives the speed of every pair of K and threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import linear_regression, median
from typing import TYPE_CHECKING, Any, NamedTuple

from griffin_vllm.serving.tuning import Point

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)
# Speculation must promise this much over plain decoding, or it is left off: the cost of being wrong is a
# slower server, the gain that is given up is small.
LEAST_SPEEDUP = 1.03
# Worth a second thing that can go wrong; less is within the error of the costs.
LEAST_GAIN = 1.01


class Chain(NamedTuple):
    """A round's drafts: the probability of the first j of them together, for each j (the head's own of those that it
    made, ``lookup.py``'s of the others), how many the target accepted, and how many of them the head made.

    ``lookup_ms``: how long a round takes that verifies looked-up drafts and looks up the next ones; None where it did
    something else.
    """

    likelihoods: Sequence[float]
    accepted: int
    by_head: int
    lookup_ms: float | None = None


class Depth(NamedTuple):
    """At most ``num_speculative_tokens`` drafts, fewer once a chain is no likelier than the threshold."""

    num_speculative_tokens: int
    draft_stop_probability: float


def choose_depth(chains: Sequence[Chain], points: Sequence[Point], static: int) -> Depth:
    """The fastest depth for one request at a time; ``static`` (0: plain decoding) without a threshold where none is
    worth it.

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
    looked_up = [chain.lookup_ms for chain in chains if chain.lookup_ms is not None]
    lookup_slope = max(0.0, median(looked_up) - first) / most if looked_up else 0.0

    def speed(depth: Depth) -> float:
        tokens, cost = 0, 0.0
        for chain in chains:
            drafts = drafts_made(chain, depth)
            by_head = min(drafts, chain.by_head)
            tokens += 1 + min(chain.accepted, drafts)
            cost += first + slope * by_head + lookup_slope * (drafts - by_head)
        return tokens / cost

    depths = [Depth(point.num_speculative_tokens, t) for point in drafting for t in THRESHOLDS]
    best, fixed = max(depths, key=speed), Depth(static, 0.0)
    if static:
        enough = LEAST_GAIN * speed(fixed)
    else:
        enough = LEAST_SPEEDUP / next(point.step_ms for point in points if not point.num_speculative_tokens)
    return best if speed(best) >= enough else fixed


def drafts_made(chain: Chain, depth: Depth) -> int:
    """The draft that makes a chain too unlikely has been made, and is verified, as in ``chains.py``."""
    shown = chain.likelihoods[: depth.num_speculative_tokens]
    threshold = depth.draft_stop_probability
    stops = (j for j, likelihood in enumerate(shown, 1) if threshold and likelihood <= threshold)
    return next(stops, len(shown))


def draft_to_the_end(engine: LLMEngine) -> None:
    """Have the head make all K drafts of every round, whatever its config says."""
    engine.collective_rpc(_draft_to_the_end)


def draft_as_served(engine: LLMEngine, stop_probability: float) -> None:
    """Have the head stop at ``stop_probability`` and look up as its config says, and note nothing any more."""
    engine.collective_rpc(_draft_as_served, args=(stop_probability,))


def record_chains(engine: LLMEngine) -> bool:
    """Note every chain from now on, looked up again where the head's config says so; False where this engine's drafts
    must all be of one length."""
    return bool(engine.collective_rpc(_start_recording)[0])


def chains(engine: LLMEngine, rounds: Iterator[tuple[float, list[int]]]) -> list[Chain]:
    """The chains of one answer, whose rounds ``tune_engine.decode`` goes through."""
    engine.collective_rpc(_recorded)
    taken = [(emitted, 1000 * seconds) for seconds, [emitted] in rounds]
    drafted = engine.collective_rpc(_recorded)[0]
    found = []
    # The prefill's step drafts for the first round, and a round drafts for the next; the last drafts are not verified.
    for (made, looked_up), (made_next, looked_up_next), (emitted, ms) in zip(
        drafted, [*drafted[1:], ([], [])], taken, strict=False
    ):
        by_lookup = looked_up and looked_up_next and not made and not made_next
        found.append(Chain([*made, *looked_up], emitted - 1, len(made), ms if by_lookup else None))
    return found


def _draft_to_the_end(worker: Any) -> None:
    """In the worker."""
    drafter = worker.model_runner.drafter
    drafter.stop_probability, drafter.lookup_min = 0.0, 0


def _draft_as_served(worker: Any, stop_probability: float) -> None:
    """In the worker."""
    drafter = worker.model_runner.drafter
    for noted in ("propose", "_greedy_sample"):
        vars(drafter).pop(noted, None)
    if drafter.shapes_may_vary:
        drafter.stop_probability = stop_probability
        drafter.lookup_min = drafter.draft_model_config.hf_config.prompt_lookup_min


def _start_recording(worker: Any) -> bool:
    """In the worker."""
    drafter = worker.model_runner.drafter
    if not drafter.shapes_may_vary:
        return False
    drafter.noted_chains = []
    # never reached, and enough for the likelihoods to be computed
    drafter.stop_probability = 1e-30
    drafter.lookup_min = drafter.draft_model_config.hf_config.prompt_lookup_min
    propose, sample = drafter.propose, drafter._greedy_sample
    made: list[float] = []

    def noted_propose(*args: Any, **kwargs: Any) -> Any:
        made.clear()
        drafts = propose(*args, **kwargs)
        # a part of a long prompt is followed by its next part, not by a round that verifies
        if not worker.model_runner.discard_request_mask.np[0]:
            passage, before = drafter.chains.passages[0], made[-1] if made else 1.0
            looked_up = [before * passage.likelihood(n) for n in range(1, len(drafts[0]) - len(made) + 1)]
            drafter.noted_chains.append((list(made), looked_up))
        return drafts

    def noted_sample(*args: Any) -> Any:
        # of the one request that is being answered
        chain = drafter.chains.likelihood
        _, probabilities = drafter.model.get_top_tokens_and_probabilities(*args)
        made.append(float((chain * probabilities).max()))
        return sample(*args)

    drafter.propose, drafter._greedy_sample = noted_propose, noted_sample
    return True


def _recorded(worker: Any) -> list[tuple[list[float], list[float]]]:
    """In the worker: since last asked, the likelihoods with the head's drafts and then with those looked up."""
    drafter = worker.model_runner.drafter
    found: list[tuple[list[float], list[float]]] = drafter.noted_chains
    drafter.noted_chains = []
    return found
