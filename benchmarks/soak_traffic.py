"""What a soak asks, and how: questions of every kind, an endless sequence of requests, and their replies."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import openai
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from benchmarks import engines, served
from benchmarks.engines import Answer
from benchmarks.memory import ProcessTree
from benchmarks.prompts import Conversation, PromptSet
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
    completion = await client.chat.completions.create(
        **question.request(),
        model=model,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
    )
    [choice] = completion.choices
    tokens = list(choice.model_extra["token_ids"])
    answer = Answer(question.id, 0, completion.usage.prompt_tokens, tokens)
    for position in choice.logprobs.content:
        first, second = position.top_logprobs
        answer.margins.append(first.logprob - second.logprob)
        answer.runners_up.append(int(second.token.removeprefix("token_id:")))
    return answer


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
        async with client_of(self.server.url) as client:
            for length in range(1, STEP_TOKENS + 1):
                # tokens that every vocabulary has, at once others than those of any prompt before: nothing is cached
                prompt = [1 + length // 50, *[1 + length % 50] * (length - 1)]
                # whose probabilities take as many rows of `lm_head`'s product as verifying so many tokens does
                await client.completions.create(
                    model=self.model, prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 0}
                )
            self.began = time.monotonic()
            sampling = asyncio.create_task(self._sample())
            under_way: set[asyncio.Task[None]] = set()
            number, last_window = 0, False
            columns = ("{task.description}", BarColumn(), "{task.fields[counts]}", TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task("soak", total=self.seconds, counts="")
                while (elapsed := time.monotonic() - self.began) < self.seconds and self._lost() < MAX_LOST:
                    bar.update(task, completed=elapsed, counts=self._counts())
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

    def _counts(self) -> str:
        outcomes = Counter(reply.outcome for reply in self.replies)
        return ", ".join(f"{outcomes[name]} {name}" for name in ("finished", "aborted", "lost"))


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
