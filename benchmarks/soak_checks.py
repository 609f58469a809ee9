"""What a soak finds in its replies, asks its server, and calls a failure."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.engines import Answer
from benchmarks.losslessness import Verdict, judge
from benchmarks.soak_traffic import LONGEST_JSON_ANSWER, Question, Reply


def with_stop(question: Question, answer: Answer, tokenizer: Any) -> Question:
    """The question with a stop string from the middle of its greedy answer, where that has a word."""
    words = tokenizer.decode(answer.tokens, skip_special_tokens=True).split()
    return replace(question, stop=words[len(words) // 2]) if len(words) > 2 else question


def compare(reply: Reply, expected: Answer, tokenizer: Any, near_tie: float) -> Verdict:
    """A greedy reply against plain vLLM's answer, as far as the reply was to go."""
    answer = Answer(expected.conversation, 0, 0, tokens=reply.tokens)
    if reply.outcome == "aborted":
        return judge(answer, replace(expected, tokens=expected.tokens[: len(answer.tokens)]), near_tie)
    stop = reply.demand.question.stop
    if stop is None:
        return judge(answer, expected, near_tie)
    whole = tokenizer.decode(expected.tokens, skip_special_tokens=True)
    if reply.text == whole[: whole.index(stop)]:
        return Verdict("identical")
    verdict = judge(answer, expected, near_tie)
    return verdict if verdict.kind == "near_tie" else Verdict("wrong", verdict.position, verdict.margin)


def breaks_its_terms(reply: Reply) -> bool:
    """Whether a finished answer goes on behind its stop string, or does not fit its schema."""
    question = reply.demand.question
    if question.stop and question.stop in reply.text:
        return True
    if question.kind != "json" or reply.finish_reason != "stop":
        return False
    try:
        parsed = json.loads(reply.text)
    except ValueError:
        return True
    return not (
        isinstance(parsed, dict)
        and parsed.keys() == {"answer", "sure"}
        and isinstance(parsed["answer"], str)
        and len(parsed["answer"]) <= LONGEST_JSON_ANSWER
        and isinstance(parsed["sure"], bool)
    )


def acceptance_lengths(first: Sequence[Reply], last: Sequence[Reply]) -> tuple[float, float] | None:
    """Pooled acceptance lengths of two windows over the questions answered greedily in both, or None."""

    def drafted(replies: Sequence[Reply]) -> dict[str, Reply]:
        return {
            reply.demand.question.id: reply
            for reply in reversed(replies)
            if reply.outcome == "finished" and reply.demand.temperature == 0 and reply.steps
        }

    sides = drafted(first), drafted(last)
    both = sides[0].keys() & sides[1].keys()
    if not both:
        return None
    lengths = [
        1 + sum(side[name].accepted for name in both) / sum(side[name].steps for name in both)
        for side in sides
    ]
    return lengths[0], lengths[1]


async def server_side(url: str) -> dict[str, Any]:
    """What the server tells after the traffic, as fields of a result row."""
    left = await left_behind(url)
    values = await metrics(url)
    return {
        "left_behind": left,
        "prefix_cache_hit_share": values["vllm:prefix_cache_hits_total"]
        / max(values["vllm:prefix_cache_queries_total"], 1),
        "preemptions": int(values["vllm:num_preemptions_total"]),
    }


async def left_behind(url: str, seconds: float = 30.0) -> int:
    """Requests that the server still runs or keeps waiting; asks for up to ``seconds`` until there are none."""
    deadline = time.monotonic() + seconds
    while True:
        values = await metrics(url)
        left = int(values["vllm:num_requests_running"] + values["vllm:num_requests_waiting"])
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.5)


async def metrics(url: str) -> Counter[str]:
    """vLLM's counters and gauges, summed over their labels."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{url}/metrics", timeout=60)).text
    values: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] += sample.value  # type: ignore[assignment]
    return values


def failed_criteria(row: dict[str, Any], args: Any) -> list[str]:
    """The criteria that a result row does not meet, with what was found."""
    first, last = row["acceptance_length_first"], row["acceptance_length_last"]
    drift = last / first - 1 if first else None
    grown = [one for one in row["memory"] if one["growth_mib"] > args.max_growth_mib]
    criteria = {
        f"{row['lost']} of {row['sent']} requests were lost": row["lost"] == 0,
        "the server no longer answers": row["left_behind"] is not None,
        f"{row['left_behind']} requests are still under way at the end": not row["left_behind"],
        f"{row['wrong']} of {row['num_answers']} greedy answers are wrong": row["wrong"]
        == 0
        < row["num_answers"],
        f"{row['broken_terms']} answers go beyond their stop string or schema": row["broken_terms"] == 0,
        f"the acceptance length went from {first} to {last}": row["method"] == "none"
        or (drift is not None and abs(drift) <= args.max_drift),
        **{f"{one['process']} grew by {one['growth_mib']} MiB": False for one in grown},
        "no memory was measured": bool(row["memory"]),
        f"the server ended with status {row['exit_status']}": row["exit_status"] == 0,
        f"the server left {', '.join(row['survivors'])} behind": not row["survivors"],
    }
    return [criterion for criterion, holds in criteria.items() if not holds]
