"""Mixed traffic on ``vllm serve``, for long: is nothing lost, nothing wrong, and does nothing grow or drift?

    python benchmarks/soak.py --target T --methods griffin:HEAD --prompts FILE --minutes 30 --json OUT.json

First plain vLLM answers every question greedily, one request at a time, with the margin of each token. Then each
method's server gets, for ``--minutes``, short and long prompts (the long ones share a prefix, for the prefix
cache), stop strings, JSON schemas, streamed and whole answers, at the temperatures of ``--temperature`` (one is
drawn for each request), at loads that change between those of ``--concurrency``; one request in five is cut off
by its client. Requests carry no seed of their own: vLLM's CPU engine dies of one.

Status 1 unless, for every method,
- each request was answered or cut off by us, and nothing is running or waiting at the end;
- each greedy answer is plain vLLM's, or parts from it at a near-tie (see losslessness.py); cut-off ones as far
  as they came;
- no text goes on behind its stop string, and finished JSON answers fit their schema;
- the acceptance length of the last window is that of the first on the same questions. A window is five minutes,
  or a sixth of the run; the same sequence of requests begins anew with the last one;
- no process grew by more than ``--max-growth-mib`` after the first window. vLLM's CPU build keeps an oneDNN product
  for each weight and each number of tokens in a step, with or without a speculator. So steps have at most 128
  tokens here, longer prompts come in parts, and before the traffic one prompt of each length up to that brings
  every size of a step;
- the server ended with status 0 at SIGTERM and left no process behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import engines, records, served
from benchmarks.engines import Answer
from benchmarks.losslessness import NEAR_TIE, Verdict, judge, summarised
from benchmarks.memory import ProcessTree
from benchmarks.methods import Method, Run, runs
from benchmarks.prompts import Conversation, PromptSet
from benchmarks.trajectory import Trajectory
from griffin_vllm.errors import GriffinError

KINDS = ("short", "long", "json", "stop")
LONGEST_JSON_ANSWER = 40
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "maxLength": LONGEST_JSON_ANSWER},
        "sure": {"type": "boolean"},
    },
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
LONG_PREFIX_TOKENS = 900
ABORTED_SHARE = 0.2
STREAMED_SHARE = 0.5
SECONDS_AT_A_LOAD = 15.0
# A request that takes longer is lost.
PATIENCE = 600.0
# Tokens of a step at most: room for 16 requests with 6 drafts each.
STEP_TOKENS = 128
# So many lost requests mean that the server is gone; there is no point in going on.
MAX_LOST = 50
COLUMNS = (
    "method",
    "num_speculative_tokens",
    "minutes",
    "sent",
    "finished",
    "aborted",
    "lost",
    "num_answers",
    "identical",
    "near_tie",
    "wrong",
    "acceptance_length_first",
    "acceptance_length_last",
)
MEMORY_COLUMNS = (
    "process",
    "resident_mib",
    "proportional_mib_after_warm_up",
    "proportional_mib_at_the_end",
    "slope_mib_per_hour",
    "growth_mib",
)


@dataclass(frozen=True)
class Question:
    """One thing to ask, always in the same words; ``stop`` is a word of the greedy answer."""

    id: str
    kind: str
    messages: tuple[dict[str, str], ...]
    stop: str | None = None

    def request(self) -> dict[str, Any]:
        """The question as arguments of a chat completion."""
        asked: dict[str, Any] = {"messages": list(self.messages)}
        if self.stop:
            asked["stop"] = [self.stop]
        if self.kind == "json":
            schema = {"name": "answer", "schema": SCHEMA}
            asked["response_format"] = {"type": "json_schema", "json_schema": schema}
        return asked


@dataclass(frozen=True)
class Demand:
    """How a question is asked: ``cut_after`` so many tokens (streamed) or tenths of a second, if at all."""

    question: Question
    temperature: float
    streamed: bool
    cut_after: int | None


@dataclass
class Reply:
    """What came back. ``outcome``: finished, aborted (by us) or lost; ``steps``: passes with a draft."""

    demand: Demand
    started: float
    outcome: str = "lost"
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    steps: int = 0
    accepted: int = 0
    error: str = ""


def questions(
    tokenizer: Any, sets: Sequence[PromptSet], max_tokens: int, max_model_len: int
) -> list[Question]:
    """First turns of the prompts, every kind in turn, as far as they fit the model's length.

    Raises:
        GriffinError: none fits.
    """
    conversations = [
        Conversation(f"{prompts.name}/{one.id}", one.turns[:1])
        for prompts in sets
        for one in prompts.conversations
    ]
    fitting = engines.fitting(tokenizer, conversations, max_tokens, max_model_len)
    prefix = _long_prefix(tokenizer, fitting, min(LONG_PREFIX_TOKENS, (max_model_len - max_tokens) // 2))
    asked = []
    for conversation, kind in zip(fitting, cycle(KINDS), strict=False):
        before = ({"role": "system", "content": prefix},) if kind == "long" else ()
        whole = Conversation(conversation.id, (prefix + conversation.turns[0],))
        if kind == "long" and not engines.fitting(tokenizer, [whole], max_tokens + 32, max_model_len):
            before, kind = (), "short"
        user = {"role": "user", "content": conversation.turns[0]}
        asked.append(Question(conversation.id, kind, (*before, user)))
    return asked


def _long_prefix(tokenizer: Any, conversations: Sequence[Conversation], tokens: int) -> str:
    """Real text of about so many tokens: the questions themselves, one after the other, repeated if need be."""
    lines: list[str] = []
    for conversation in cycle(conversations):
        text = "\n".join([*lines, conversation.turns[0]])
        if len(tokenizer(text)["input_ids"]) > tokens:
            break
        lines.append(conversation.turns[0])
    return "\n".join(lines)


def demand(number: int, asked: Sequence[Question], temperatures: Sequence[float], max_tokens: int) -> Demand:
    """Request ``number`` of the endless sequence; the same number is the same request."""
    draw = random.Random(number)
    cut = draw.randrange(max_tokens // 2) if draw.random() < ABORTED_SHARE else None
    streamed = draw.random() < STREAMED_SHARE
    return Demand(asked[number % len(asked)], draw.choice(temperatures), streamed, cut)


async def ask(client: openai.AsyncOpenAI, model: str, wanted: Demand, max_tokens: int) -> Reply:
    """Send one request, read its answer or cut it off; never raises."""
    reply = Reply(wanted, time.monotonic())
    request = wanted.question.request() | {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": wanted.temperature,
        "extra_body": {"return_token_ids": True},
    }
    try:
        if wanted.streamed:
            await _stream(client, request, reply)
        else:
            seconds = None if wanted.cut_after is None else wanted.cut_after / 10
            answer = await asyncio.wait_for(client.chat.completions.create(**request), seconds)
            _take(reply, answer.choices[0], answer.choices[0].message.content)
            _take_metrics(reply, answer)
        if reply.outcome != "aborted" and reply.finish_reason:
            reply.outcome = "finished"
    except (TimeoutError, asyncio.TimeoutError):
        reply.outcome = "aborted"
    except Exception as error:  # whatever came instead of an answer, the request is lost
        reply.error = f"{type(error).__name__}: {GriffinError.reason(error)}"
    return reply


async def _stream(client: openai.AsyncOpenAI, request: dict[str, Any], reply: Reply) -> None:
    usage = {"include_usage": True}
    async with await client.chat.completions.create(**request, stream=True, stream_options=usage) as chunks:
        async for chunk in chunks:
            for choice in chunk.choices:
                _take(reply, choice, choice.delta.content)
            _take_metrics(reply, chunk)
            cut_after = reply.demand.cut_after
            if cut_after is not None and len(reply.tokens) >= cut_after and not reply.finish_reason:
                reply.outcome = "aborted"
                return


def _take(reply: Reply, choice: Any, text: str | None) -> None:
    reply.tokens += (choice.model_extra or {}).get("token_ids") or []
    reply.text += text or ""
    reply.finish_reason = choice.finish_reason or reply.finish_reason


def _take_metrics(reply: Reply, message: Any) -> None:
    metrics = ((message.model_extra or {}).get("metrics") or {}).get("speculative_decoding")
    if metrics:
        reply.steps, reply.accepted = metrics["num_spec_steps"], metrics["num_accepted_draft_tokens"]


async def reference(client: openai.AsyncOpenAI, model: str, question: Question, max_tokens: int) -> Answer:
    """The greedy answer with the margin of every token."""
    answer = await client.chat.completions.create(
        **question.request(),
        model=model,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
    )
    [choice] = answer.choices
    found = Answer(question.id, 0, answer.usage.prompt_tokens, tokens=list(choice.model_extra["token_ids"]))
    for position in choice.logprobs.content:
        first, second = position.top_logprobs
        found.margins.append(first.logprob - second.logprob)
        found.runners_up.append(int(second.token.removeprefix("token_id:")))
    return found


def with_stop(question: Question, answer: Answer, tokenizer: Any) -> Question:
    """The question with a stop string from the middle of its greedy answer, where that has a word."""
    words = tokenizer.decode(answer.tokens, skip_special_tokens=True).split()
    return replace(question, stop=words[len(words) // 2]) if len(words) > 2 else question


def compare(reply: Reply, expected: Answer, tokenizer: Any, near_tie: float) -> Verdict:
    """A greedy reply against plain vLLM's answer, as far as the reply was to go."""
    found = Answer(expected.conversation, 0, 0, tokens=reply.tokens)
    if reply.outcome == "aborted":
        return judge(found, replace(expected, tokens=expected.tokens[: len(found.tokens)]), near_tie)
    stop = reply.demand.question.stop
    if stop is None:
        return judge(found, expected, near_tie)
    whole = tokenizer.decode(expected.tokens, skip_special_tokens=True)
    if reply.text == whole[: whole.index(stop)]:
        return Verdict("identical")
    verdict = judge(found, expected, near_tie)
    return verdict if verdict.kind == "near_tie" else Verdict("wrong", verdict.position, verdict.margin)


def breaks_its_terms(reply: Reply) -> bool:
    """Whether a finished answer goes on behind its stop string, or does not fit its schema."""
    question = reply.demand.question
    if question.stop and question.stop in reply.text:
        return True
    if question.kind != "json" or reply.finish_reason != "stop":
        return False
    try:
        found = json.loads(reply.text)
    except ValueError:
        return True
    return not (
        isinstance(found, dict)
        and found.keys() == {"answer", "sure"}
        and isinstance(found["answer"], str)
        and len(found["answer"]) <= LONGEST_JSON_ANSWER
        and isinstance(found["sure"], bool)
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


@dataclass
class Traffic:
    """One soak: sends demands at changing loads and keeps the replies and the memory of the server."""

    server: served.Server
    model: str
    asked: Sequence[Question]
    temperatures: Sequence[float]
    loads: Sequence[int]
    seconds: float
    window: float
    max_tokens: int
    sent: int = 0
    replies: list[Reply] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.processes = ProcessTree(self.server.process.pid)

    async def run(self) -> None:
        """Send for ``seconds`` after a warm-up, then wait for what is under way."""
        async with _client(self.server.url) as client:
            for length in range(1, STEP_TOKENS + 1):
                # tokens that every vocabulary has, at once others than those of any prompt before: nothing is cached
                prompt = [1 + length // 50, *[1 + length % 50] * (length - 1)]
                await client.completions.create(model=self.model, prompt=prompt, max_tokens=1)
            self.began = time.monotonic()
            sampling = asyncio.create_task(self._sample())
            under_way: set[asyncio.Task[None]] = set()
            number, last_window = 0, False
            with _progress(self.seconds) as progress:
                while (elapsed := time.monotonic() - self.began) < self.seconds and self._lost() < MAX_LOST:
                    progress(elapsed, self)
                    if elapsed >= self.seconds - self.window and not last_window:
                        number, last_window = 0, True
                    load = self.loads[int(elapsed / SECONDS_AT_A_LOAD) % len(self.loads)]
                    while len(under_way) < load:
                        wanted = demand(number, self.asked, self.temperatures, self.max_tokens)
                        under_way.add(asyncio.create_task(self._one(client, wanted)))
                        number, self.sent = number + 1, self.sent + 1
                    _, under_way = await asyncio.wait(
                        under_way, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                    )
                if under_way:
                    await asyncio.wait(under_way, timeout=PATIENCE)
            sampling.cancel()

    def replies_between(self, start: float, end: float) -> list[Reply]:
        return [reply for reply in self.replies if start <= reply.started - self.began < end]

    async def _one(self, client: openai.AsyncOpenAI, wanted: Demand) -> None:
        self.replies.append(await ask(client, self.model, wanted, self.max_tokens))

    async def _sample(self) -> None:
        while True:
            self.processes.sample(time.monotonic() - self.began)
            # some 200 samples in all, however long the run
            await asyncio.sleep(max(0.2, self.seconds / 200))

    def _lost(self) -> int:
        return sum(reply.outcome == "lost" for reply in self.replies)


def _client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


class _progress:  # noqa: N801 - a context manager
    """A bar over the run's seconds, with the counts so far."""

    def __init__(self, seconds: float) -> None:
        columns = (
            TextColumn("soak"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task("soak", total=seconds, counts="")

    def __enter__(self) -> _progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, elapsed: float, traffic: Traffic) -> None:
        outcomes = Counter(reply.outcome for reply in traffic.replies)
        counts = ", ".join(f"{outcomes[name]} {name}" for name in ("finished", "aborted", "lost"))
        self.bar.update(self.task, completed=elapsed, counts=counts)


async def left_behind(url: str, seconds: float = 30.0) -> int:
    """Requests that the server still runs or keeps waiting; asks for up to ``seconds`` until there are none."""
    deadline = time.monotonic() + seconds
    while True:
        found = await metrics(url)
        left = int(found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"])
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = records.parser(
        __doc__,
        without=("--turns",),
        dtype="float32",
        enforce_eager=True,
        max_tokens=96,
        temperature=[0.0, 0.0, 0.0, 1.0],
        concurrency=[1, 16, 4, 8, 2, 12],
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic, for each method")
    parser.add_argument(
        "--max-growth-mib", type=float, default=32.0, help="of a process after the first window"
    )
    parser.add_argument("--max-drift", type=float, default=0.02, help="of the acceptance length, as a share")
    args = parser.parse_args(argv)
    methods, sets = records.load_inputs(args)
    if 0 not in args.temperature:
        raise GriffinError.at("soak.py", "--temperature", args.temperature, "0 among them, to be compared")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.target)
    asked = questions(tokenizer, sets, args.max_tokens, args.max_model_len)
    record = records.Record("soak", args, sets)
    arguments = records.engine_arguments(args) | {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": STEP_TOKENS,
    }
    record.settings |= {"minutes": args.minutes, "near_tie": NEAR_TIE[args.dtype]}
    record.settings["engine"] = served.asked(arguments)
    trajectory = Trajectory(args, sets)
    plain = Run(Method("none"), 0)
    if "soak" not in trajectory.answers:
        with record.attempt(plain), served.server(plain, arguments) as server:
            trajectory.record("soak", asyncio.run(_references(server.url, args, asked)))
    expected = {answer.conversation: answer for answer in trajectory.answers.get("soak", ())}
    if not expected:
        return record.finish(COLUMNS)
    asked = [with_stop(one, expected[one.id], tokenizer) if one.kind == "stop" else one for one in asked]
    for run in runs(methods, args.num_speculative_tokens, args.dtype):
        with record.attempt(run):
            extra = {} if run == plain else {"per_request_spec_decode_metrics": "summary"}
            with served.server(run, arguments | extra) as server:
                seconds = 60 * args.minutes
                window = min(300.0, seconds / 6)
                traffic = Traffic(
                    server,
                    args.target,
                    asked,
                    args.temperature,
                    args.concurrency,
                    seconds,
                    window,
                    args.max_tokens,
                )
                asyncio.run(traffic.run())
                row = _measured(traffic, expected, tokenizer, args)
                # of a server that is gone the client's counts stand, and this is a criterion that fails
                row |= dict.fromkeys(("left_behind", "prefix_cache_hit_share", "preemptions"))
                with contextlib.suppress(httpx.HTTPError):
                    row |= asyncio.run(_server_side(server.url))
            row["exit_status"], row["survivors"] = server.process.returncode, traffic.processes.survivors()
            row = {**run.fields(), **row}
            record.results.append(row | {"failed": failed_criteria(row, args)})
    status = record.finish(COLUMNS)
    for row in record.results:
        records.print_table(row["memory"], MEMORY_COLUMNS)
        for criterion in row["failed"]:
            print(f"failed: {row['method']}: {criterion}", file=sys.stderr)
    return 1 if any(row["failed"] for row in record.results) else status


async def _references(url: str, args: Any, asked: Sequence[Question]) -> list[Answer]:
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("plain answers", total=len(asked))
        answers = []
        async with _client(url) as client:
            for question in asked:
                answers.append(await reference(client, args.target, question, args.max_tokens))
                bar.advance(task)
    return answers


def _measured(traffic: Traffic, expected: dict[str, Answer], tokenizer: Any, args: Any) -> dict[str, Any]:
    """What the client saw, as fields of a result row."""
    outcomes = Counter(reply.outcome for reply in traffic.replies)
    greedy = [reply for reply in traffic.replies if reply.demand.temperature == 0 and reply.outcome != "lost"]
    verdicts = [
        (
            {"question": reply.demand.question.id, "outcome": reply.outcome},
            compare(reply, expected[reply.demand.question.id], tokenizer, NEAR_TIE[args.dtype]),
        )
        for reply in greedy
        # cut off before its first token, or sent as a whole
        if reply.outcome == "finished" or reply.tokens
    ]
    lengths = acceptance_lengths(
        traffic.replies_between(0, traffic.window),
        traffic.replies_between(traffic.seconds - traffic.window, traffic.seconds),
    )
    finished = [reply for reply in traffic.replies if reply.outcome == "finished"]
    return {
        "dataset": "mixed traffic",
        "concurrency": max(args.concurrency),
        "minutes": args.minutes,
        "num_prompts": len(traffic.asked),
        "sent": traffic.sent,
        "finished": outcomes["finished"],
        "aborted": outcomes["aborted"],
        # what never came back counts too
        "lost": traffic.sent - outcomes["finished"] - outcomes["aborted"],
        "by_kind": dict(Counter(reply.demand.question.kind for reply in finished)),
        "by_temperature": dict(Counter(f"{reply.demand.temperature:g}" for reply in finished)),
        "output_tokens": sum(len(reply.tokens) for reply in traffic.replies),
        **summarised(verdicts),
        "broken_terms": sum(breaks_its_terms(reply) for reply in finished),
        "acceptance_length_first": lengths and lengths[0],
        "acceptance_length_last": lengths and lengths[1],
        "memory": traffic.processes.summaries(traffic.window),
        "memory_samples": {
            f"{history.name} {pid}": history.samples for pid, history in traffic.processes.histories.items()
        },
        "errors": dict(Counter(reply.error for reply in traffic.replies if reply.error).most_common(5)),
    }


async def _server_side(url: str) -> dict[str, Any]:
    left = await left_behind(url)
    found = await metrics(url)
    return {
        "left_behind": left,
        "prefix_cache_hit_share": found["vllm:prefix_cache_hits_total"]
        / max(found["vllm:prefix_cache_queries_total"], 1),
        "preemptions": int(found["vllm:num_preemptions_total"]),
    }


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


if __name__ == "__main__":
    records.execute(main)
