"""How many tokens to draft at each batch size on this machine, measured on one engine.

A round of B requests with at most K drafts each takes ``step(K, B)`` and yields ``B * tau(K)`` tokens. Both are
measured while the engine's number of drafts is changed, and the K with the highest ``tau(K) / step(K, B)`` is kept for
each B; 0 where no K beats plain decoding.

One request comes first, with all K drafts made by the head. Where drafting can stop within a round, ``tune_depth.py``
then looks for a larger K and the probability at which to stop, with prompt lookup if the head's config has it. What it
finds, and several requests, are measured as they will be served: stopping there, and looking up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice, product
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from rich.progress import track
from rich.table import Table

from griffin_vllm.checkpoint import Head, weights_digest
from griffin_vllm.describe import misfit
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.tune_depth import (
    LEAST_SPEEDUP,
    chains,
    choose_depth,
    draft_as_served,
    draft_to_the_end,
    record_chains,
)
from griffin_vllm.serving.tune_engine import Drafts, decode, rendered_prompts, running_engine
from griffin_vllm.serving.tuning import (
    Point,
    Schedule,
    Tuning,
    machine,
    precision,
    predicted_speed,
    vllm_version,
)

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

PASSES = 3
# By batch size and K the passes, and of each pass the rounds: seconds, and tokens emitted of each request.
Rounds = dict[tuple[int, int], list[list[tuple[float, list[int]]]]]
# A larger K is worth measuring while the ones before it are at least so fast, compared with the best.
GIVE_UP = 0.85
PROMPTS = (
    "Explain how a bicycle stays upright, in words that a child understands.",
    "Write a short email to a landlord about a broken heater.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Show the steps.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "List the advantages and disadvantages of working from home.",
    "Tell a story about a lighthouse keeper who finds a message in a bottle.",
    "Summarise the causes of the French Revolution in five sentences.",
    "What should I pack for a week of hiking in the mountains?",
)


def tune(
    target: str,
    head: Head,
    prompts: Sequence[str],
    *,
    max_k: int,
    batch_sizes: Sequence[int],
    tokens: int,
    engine_options: Sequence[str],
) -> Tuning:
    """Measure every K up to ``max_k`` at every batch size, ``tokens`` output tokens a request.

    ``engine_options`` are options of ``vllm serve`` for the engine.

    Raises:
        GriffinError: the head does not fit the target, an engine option is unknown, or this vLLM cannot
            change K while it runs, or takes its V2 model runner, or the target's tokenizer renders no prompts.
    """
    if reason := misfit(head, target):
        raise GriffinError(reason)
    rendered = rendered_prompts(target, prompts)
    # Near its end there would be fewer drafts: room for those under verification, and for max_k more.
    length = max(map(len, rendered)) + tokens + 2 * max_k + 1
    stop_probability = head.config.draft_stop_probability
    alone: list[Point] = []
    as_served: list[Point] = []
    k_alone = 0
    with running_engine(target, head, max_k, max(batch_sizes), length, engine_options) as engine:
        measured_in = precision(engine.vllm_config.model_config)
        drafts = Drafts(engine)
        drafts.set(max_k)
        list(decode(engine, rendered, 16))
        if 1 in batch_sizes:
            draft_to_the_end(engine)
            alone = measure(engine, drafts, rendered, [1], max_k, tokens)
            _, _, k_alone = choose(alone)[0]
            drafts.set(max_k)
            found = []
            if record_chains(engine):
                found = [
                    one for prompt in rendered for one in chains(engine, decode(engine, [prompt], tokens))
                ]
            depth = choose_depth(found, alone, k_alone)
            if depth.num_speculative_tokens:
                k_alone, stop_probability = depth
        draft_as_served(engine, stop_probability)
        if k_alone:
            # with all prompts: what is looked up differs from one to the other
            both = [(1, 0), (1, k_alone)]
            as_served = measure_each(engine, drafts, rendered, both, tokens, times=len(rendered))
            _, _, k_alone = choose(as_served)[0]
        several = sorted(set(batch_sizes) - {1})
        together = measure(engine, drafts, rendered, several, max_k, tokens, GIVE_UP) if several else []
    points = [*alone, *together]
    schedule = choose(points)
    if alone:
        schedule = alone_with(k_alone, schedule)
    return Tuning(
        machine=machine(),
        vllm=vllm_version(),
        target=Path(target).name if Path(target).exists() else target,
        weights=weights_digest(head.weights),
        precision=measured_in,
        points=points,
        alone_as_served=as_served,
        num_speculative_tokens=max(1, *(k for _, _, k in schedule)),
        schedule=schedule,
        draft_stop_probability=stop_probability,
    )


def measure(
    engine: LLMEngine,
    drafts: Drafts,
    prompts: Sequence[list[int]],
    batch_sizes: Sequence[int],
    max_k: int,
    tokens: int,
    give_up: float = 0.0,
) -> list[Point]:
    """Every K up to ``max_k`` at every batch size, as ``measure_each`` does it."""
    every = list(product(batch_sizes, range(max_k + 1)))
    return measure_each(engine, drafts, prompts, every, tokens, PASSES, give_up)


def measure_each(
    engine: LLMEngine,
    drafts: Drafts,
    prompts: Sequence[list[int]],
    wanted: Sequence[tuple[int, int]],
    tokens: int,
    times: int,
    give_up: float = 0.0,
) -> list[Point]:
    """Measure pairs of batch size and K ``times`` times each, with the drafter as it is; at a batch size no further K
    once one has fallen below ``give_up`` of the fastest.

    A chain's acceptance at a position does not depend on how many drafts follow: tau(K) is 1 + the sum of the first K
    shares of positions accepted, each over all rounds, of all batch sizes, that drafted so far.
    """
    rounds: Rounds = {}

    def measure_once(size: int, k: int) -> None:
        passes = rounds.setdefault((size, k), [])
        # other prompts in each pass, where there are more than the batch takes, and the same ones for each K
        start = size * len(passes)
        drafts.set(k)
        taken = list(decode(engine, islice(cycle(prompts), start, start + size), tokens))
        if not taken:
            raise GriffinError(
                f"griffin tune: the first of {size} requests had its {tokens} tokens before the last one's prompt was "
                "read; give more --tokens or shorter prompts"
            )
        passes.append(taken)

    fastest: dict[int, float] = {}
    given_up: set[int] = set()
    title = f"measuring {', '.join(map(str, sorted({size for size, _ in wanted})))} at once"
    for size, k in track(wanted, title):
        if size in given_up:
            continue
        measure_once(size, k)
        speed = _tokens_per_second(rounds[size, k])
        fastest[size] = max(fastest.get(size, 0.0), speed)
        if speed < give_up * fastest[size]:
            given_up.add(size)
    # back and there again, so that a slow spell of the machine does not fall on one K
    again = [one for turn in range(1, times) for one in (list(rounds)[::-1] if turn % 2 else rounds)]
    for size, k in track(again, f"{title}, again"):
        measure_once(size, k)
    shares = _acceptance_shares(rounds)
    return [
        Point(
            batch_size=size,
            num_speculative_tokens=k,
            # the mean of a pass, whose rounds may be of different depths, and its median over the passes
            step_ms=1000 * median(fmean(seconds for seconds, _ in taken) for taken in passes),
            acceptance_length=1 + sum(shares[:k]),
            tokens_per_second=_tokens_per_second(passes),
        )
        for (size, k), passes in rounds.items()
    ]


def _acceptance_shares(rounds: Rounds) -> list[float]:
    """Of each position, how often its draft was accepted."""
    shares = []
    for position in range(1, max(k for _, k in rounds) + 1):
        counts = [
            count
            for (_, k), passes in rounds.items()
            if k >= position
            for taken in passes
            for _, emitted in taken
            for count in emitted
        ]
        shares.append(sum(count > position for count in counts) / len(counts))
    return shares


def _tokens_per_second(passes: Sequence[Sequence[tuple[float, list[int]]]]) -> float:
    taken = [one for rounds in passes for one in rounds]
    return sum(sum(emitted) for _, emitted in taken) / sum(seconds for seconds, _ in taken)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        GriffinError: there is none, they are JSON, or the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GriffinError(f"{path}: cannot be read ({GriffinError.reason(error)})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise GriffinError(f"{path}: holds no prompts")
    if prompts[0].lstrip().startswith(('{"', "[{")):
        raise GriffinError.at(path, "first line", prompts[0], "the text of a prompt (one a line, not JSON)")
    return prompts


def choose(points: Sequence[Point]) -> Schedule:
    """The best K for each measured batch size, as ranges; a size in between gets the next larger one's."""
    schedule: Schedule = []
    for size in sorted({point.batch_size for point in points}):
        own = {
            point.num_speculative_tokens: predicted_speed(point)
            for point in points
            if point.batch_size == size
        }
        best = max(own, key=lambda k: own[k])
        k = best if own[best] >= LEAST_SPEEDUP * own[0] else 0
        first = schedule[-1][1] + 1 if schedule else 1
        if schedule and schedule[-1][2] == k:
            first = schedule.pop()[0]
        schedule.append((first, size, k))
    return schedule


def alone_with(k: int, schedule: Schedule) -> Schedule:
    """The schedule with ``k`` drafts for a request that is alone."""
    (_, last, former), *others = schedule
    if k == former:
        return list(schedule)
    return [(1, 1, k), *([(2, last, former)] if last > 1 else []), *others]


def explain(tuning: Tuning) -> Table:
    """The cost model against what was measured; one request's rounds with all K drafts of the head's, and then what was
    chosen of it, as it is served."""
    table = Table(
        "requests", "K", "ms a round", "tau", "tokens/s, model", "tokens/s, measured", "ratio to plain"
    )
    several = [point for point in tuning.points if point.batch_size > 1]
    alone = [point for point in tuning.points if point.batch_size == 1]
    for points, note in ((alone, ""), (tuning.alone_as_served, ", as served"), (several, "")):
        plain = {point.batch_size: point for point in points if point.num_speculative_tokens == 0}
        for point in points:
            size, k = point.batch_size, point.num_speculative_tokens
            chosen = any(first <= size <= last and k == best for first, last, best in tuning.schedule)
            table.add_row(
                f"{size}{note}",
                str(k),
                f"{point.step_ms:.1f}",
                f"{point.acceptance_length:.2f}",
                f"{predicted_speed(point):.1f}",
                f"{point.tokens_per_second:.1f}",
                f"{predicted_speed(point) / predicted_speed(plain[size]):.2f}",
                style="bold" if chosen and (points is not alone or not tuning.alone_as_served) else "",
            )
    return table
