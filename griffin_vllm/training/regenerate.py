"""Prompts answered by the target itself, turn by turn, through OpenAI-compatible endpoints.

A draft head imitates its target, so the target's own answers train it better than anybody else's. The output
is JSON lines in ShareGPT form, one finished conversation a line, appended as they come: an interrupted run is
resumed by the same command.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import openai
from openai.types.chat import ChatCompletion
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from griffin_vllm.errors import GriffinError
from griffin_vllm.files import claim
from griffin_vllm.training.chat import distinct_share
from griffin_vllm.training.conversations import (
    Conversation,
    Skipped,
    check_source,
    names_to_exclude,
    read_source,
)


class _NoCompletion(Exception):  # noqa: N818 - one of the answers that an endpoint gives
    """A reply that is no chat completion, as a proxy's may be while the endpoint behind it starts anew."""


_UNAVAILABLE = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
_RETRIED = (*_UNAVAILABLE, _NoCompletion)
_EMPTY, _CUT = "empty answer", "no answer within --max-tokens"
_LONGEST_PAUSE = 30.0
# Of every line that is written here.
_BEGINNING = b'{"id": '
# So many conversations given up in a row mean that the endpoints are gone, not that a prompt is odd.
_FAILURES_TO_STOP = 8


@dataclass(frozen=True)
class Settings:
    """How the target answers. A conversation gets one of the ``temperatures``, chosen by a hash of its id."""

    model: str
    temperatures: Sequence[float] = (0.8,)
    max_tokens: int = 384
    max_turns: int = 2
    concurrency: int = 64
    attempts: int = 6
    first_pause: float = 1.0  # seconds before the second attempt; doubles from there
    timeout: float = 600.0  # seconds an answer may take


@dataclass
class Summary:
    written: int = 0
    done_before: int = 0
    answer_tokens: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class _Endpoint:
    client: openai.AsyncOpenAI
    gives_token_ids: bool = True
    in_flight: int = 0
    rests_until: float = 0.0


def regenerate(
    base_urls: Sequence[str],
    sources: Sequence[str],
    out: Path,
    settings: Settings,
    *,
    limit: int | None = None,
    exclude: Sequence[Path] = (),
    console: Console | None = None,
) -> Summary:
    """Answer the user turns of ``sources`` and append the conversations to ``out``.

    Conversations that ``out`` holds already are not asked again. Those that an endpoint refuses (too long,
    for instance) or answers with nothing are listed in a file beside ``out`` whose name ends in ``.skipped.jsonl``, and
    not asked again either. Those that got no text within ``max_tokens`` are.
    ``limit``: use only the first so many conversations. ``exclude``: files of conversations that must not be
    used, with all of their families.

    Raises:
        GriffinError: bad settings, no prompt, ``out`` is in use or damaged, or no endpoint answers. What was
            answered by then is kept.
    """
    _check(settings)
    if not out.name:
        raise GriffinError.at("griffin data regenerate", "--out", str(out), "the name of a file")
    refused = out.with_name(f"{out.name.removesuffix('.jsonl')}.skipped.jsonl")
    for source in (*sources, *map(str, exclude)):
        check_source(source)
        for path in (out, refused):
            if path.exists() and Path(source).exists() and path.samefile(source):
                raise GriffinError.at(
                    "griffin data regenerate", "--out", str(out), f"another file than {source}, which is read"
                )
    excluded = names_to_exclude(exclude)
    prompts: dict[str, Conversation] = {}
    skipped: Counter[str] = Counter()
    for source in sources:
        for found in read_source(source):
            if isinstance(found, Skipped):
                skipped[found.reason] += 1
            elif not excluded.isdisjoint(found.known_as):
                skipped["excluded"] += 1
            elif prompts.setdefault(found.id, found) is not found:
                skipped["the same id as another prompt"] += 1
    if not prompts:
        raise GriffinError(f"{', '.join(sources)}: no usable prompt")
    chosen = list(prompts.values())[:limit]
    try:
        with (
            _appending(out, "conversations", settings.model) as (file, done),
            _appending(refused, "reason", settings.model) as (refused_file, refused_before),
        ):
            done |= refused_before
            waiting = [prompt for prompt in chosen if prompt.id not in done]
            summary = Summary(done_before=len(chosen) - len(waiting), skipped=skipped)
            if waiting:
                run = _Run(settings, summary, file, refused_file)
                asyncio.run(run.all(base_urls, waiting, console or Console(stderr=True)))
    except OSError as error:
        raise GriffinError.unwritable(out, error) from error
    return summary


class _Run:
    def __init__(self, settings: Settings, summary: Summary, file: IO[bytes], refused: IO[bytes]):
        self.settings, self.summary, self.file, self.refused = settings, summary, file, refused
        self.endpoints: list[_Endpoint] = []
        self.failures_in_a_row = 0

    async def all(self, base_urls: Sequence[str], prompts: Sequence[Conversation], console: Console) -> None:
        key = os.environ.get("OPENAI_API_KEY", "none")
        for url in base_urls:
            try:
                client = openai.AsyncOpenAI(
                    base_url=url, api_key=key, max_retries=0, timeout=self.settings.timeout
                )
            except Exception as error:  # httpx's InvalidURL has no class in common with openai's errors
                raise GriffinError.at(
                    "griffin data regenerate", "--base-url", url, f"a URL ({GriffinError.reason(error)})"
                ) from error
            self.endpoints.append(_Endpoint(client))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        try:
            await self._try_out_all(console)
            with Progress(*columns, console=console, transient=True) as progress:
                task = progress.add_task("conversations", total=len(prompts), rate="")
                began = time.monotonic()
                queue = iter(prompts)

                async def work() -> None:
                    for prompt in queue:
                        await self._one(prompt)
                        rate = self.summary.answer_tokens / (time.monotonic() - began)
                        progress.update(task, advance=1, rate=f"{rate:.0f} tokens/s")

                workers = [asyncio.create_task(work()) for _ in range(self.settings.concurrency)]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for worker in workers:
                        worker.cancel()
        finally:
            for endpoint in self.endpoints:
                await endpoint.client.close()

    async def _try_out_all(self, console: Console) -> None:
        """Leave out endpoints that are not available now, as long as there are others."""
        errors = await asyncio.gather(*(self._try_out(endpoint) for endpoint in self.endpoints))
        unavailable = [error for error in errors if error is not None]
        if len(unavailable) == len(self.endpoints):
            raise unavailable[0]
        for error in unavailable:
            console.print(f"{error}; going on without it", highlight=False)
        pairs = zip(self.endpoints, errors, strict=True)
        self.endpoints = [endpoint for endpoint, error in pairs if error is None]

    async def _try_out(self, endpoint: _Endpoint) -> GriffinError | None:
        """Learn from one token whether ``endpoint`` answers, knows the model, and hands out token ids.

        Returns:
            The error of one that does not answer now.

        Raises:
            GriffinError: it never will.
        """
        url = endpoint.client.base_url
        messages = [{"role": "user", "content": "Hi"}]
        try:
            try:
                response = await self._ask(endpoint, messages, temperature=0.0, max_tokens=1)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                # Strict servers refuse fields that they do not know.
                endpoint.gives_token_ids = False
                response = await self._ask(endpoint, messages, temperature=0.0, max_tokens=1)
        except openai.NotFoundError as error:
            offered = await self._models(endpoint)
            raise GriffinError.at(str(url), "--model", self.settings.model, offered) from error
        except openai.APIError as error:
            failure = GriffinError(f"{url}: does not answer chat completions ({error.__cause__ or error})")
            if isinstance(error, _UNAVAILABLE):
                return failure
            raise failure from error
        except _NoCompletion as error:
            raise GriffinError(f"{url}: {error} (does it end in /v1?)") from error
        endpoint.gives_token_ids = endpoint.gives_token_ids and _token_ids(response.choices[0]) is not None
        return None

    async def _models(self, endpoint: _Endpoint) -> str:
        try:
            names = [model.id async for model in endpoint.client.models.list()]
        except openai.APIError:
            return "a model that is served there"
        return f"one of {names}"

    async def _one(self, prompt: Conversation) -> None:
        """Answer one conversation and append it; or list why it was not answered."""
        temperature = self._temperature(prompt)
        system = [{"from": "system", "value": t.content} for t in prompt.turns if t.role == "system"]
        messages = [{"role": "system", "content": t["value"]} for t in system]
        questions = [turn.content for turn in prompt.turns if turn.role == "user"]
        answered: list[dict[str, Any]] = list(system)
        reason = ""
        for question in questions[: self.settings.max_turns]:
            messages.append({"role": "user", "content": question})
            try:
                choice = await self._answer(messages, temperature)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                reason = f"refused by the endpoint: {error.message}"
                break
            except (openai.APIError, _NoCompletion) as error:
                self._failed(error)
                return
            content = choice.message.content
            if not content or not content.strip():
                # thinking that takes all of the tokens, say: with more of them there is an answer
                reason = _CUT if choice.finish_reason == "length" else _EMPTY
                break
            messages.append({"role": "assistant", "content": content})
            answer = {"from": "gpt", "value": content, "finish_reason": choice.finish_reason}
            token_ids = _token_ids(choice)
            if token_ids:
                answer |= {"token_ids": token_ids, "distinct_4grams": round(distinct_share(token_ids), 3)}
            answered += [{"from": "human", "value": question}, answer]
        self.failures_in_a_row = 0
        if len(answered) == len(system):
            self.summary.skipped[reason.split(":")[0]] += 1
            if reason != _CUT:
                _append(self.refused, {"id": prompt.id, "model": self.settings.model, "reason": reason})
            return
        record = {
            "id": prompt.id,
            "model": self.settings.model,
            "family": prompt.family,
            "conversations": answered,
            "temperature": temperature,
        }
        _append(self.file, record)
        self.summary.written += 1

    def _failed(self, error: Exception) -> None:
        self.summary.failed += 1
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= _FAILURES_TO_STOP:
            raise GriffinError(
                f"{self.failures_in_a_row} conversations in a row failed after {self.settings.attempts} "
                f"attempts each ({error}); {self.summary.written} were written, the same command resumes"
            ) from error

    async def _answer(self, messages: list[dict[str, str]], temperature: float) -> Any:
        """A choice from the least busy endpoint; tried again elsewhere, or later, when that one fails."""
        pause = self.settings.first_pause
        for attempt in range(self.settings.attempts):
            now = time.monotonic()
            endpoint = min(self.endpoints, key=lambda e: (max(e.rests_until - now, 0.0), e.in_flight))
            await asyncio.sleep(max(endpoint.rests_until - now, 0.0))
            endpoint.in_flight += 1
            try:
                response = await self._ask(endpoint, messages, temperature, self.settings.max_tokens)
            except _RETRIED:
                if attempt == self.settings.attempts - 1:
                    raise
                endpoint.rests_until = max(endpoint.rests_until, time.monotonic() + pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if response.usage:
                    self.summary.answer_tokens += response.usage.completion_tokens
                return response.choices[0]
            finally:
                endpoint.in_flight -= 1
        raise AssertionError("attempts is at least 1")

    async def _ask(
        self, endpoint: _Endpoint, messages: list[dict[str, str]], temperature: float, max_tokens: int
    ) -> ChatCompletion:
        try:
            response = await endpoint.client.chat.completions.create(
                model=self.settings.model,
                messages=messages,
                temperature=temperature,
                max_tokens=max_tokens,
                # vLLM's extension: vllm/entrypoints/openai/chat_completion/protocol.py
                extra_body={"return_token_ids": True} if endpoint.gives_token_ids else None,
            )
        except ValueError as error:  # a body that is not the JSON that its header promises
            raise _NoCompletion(f"is no OpenAI-compatible endpoint ({error})") from error
        if not isinstance(response, ChatCompletion) or not response.choices:
            raise _NoCompletion("is no OpenAI-compatible endpoint")
        return response

    def _temperature(self, prompt: Conversation) -> float:
        digest = hashlib.sha256(prompt.id.encode()).digest()
        return self.settings.temperatures[digest[0] % len(self.settings.temperatures)]


@contextmanager
def _appending(path: Path, field: str, model: str) -> Iterator[tuple[IO[bytes], set[str]]]:
    """``path`` opened for appending by this process alone, and the ids that it holds (``_ids_in``)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        claim(file, f"{path}: another run is writing to it")
        try:
            yield file, _ids_in(file, path, field, model)
        finally:
            # while the lock is held: a run that opens it next must find it, or make its own
            if file.seek(0, os.SEEK_END) == 0:
                path.unlink()


def _ids_in(file: IO[bytes], path: Path, field: str, model: str) -> set[str]:
    """The ids of the records in ``file``, which have ``field``.

    Records of another ``model`` are refused; older ones do not say theirs. A last line that breaks off was being
    written when an earlier run died; it is removed.
    """
    ids: set[str] = set()
    file.seek(0)
    end, line = 0, b"\n"
    for number, line in enumerate(file, start=1):
        try:
            record = json.loads(line)
            record[field]
            ids.add(record["id"])
        except (ValueError, KeyError, TypeError) as error:
            breaks_off = not line.endswith(b"\n") and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]
            if isinstance(error, ValueError) and breaks_off:
                file.truncate(end)
                return ids
            raise GriffinError(
                f"{path}: line {number} is not a record of an earlier run; give another --out"
            ) from error
        if record.get("model", model) != model:
            raise GriffinError.at(
                path, f"model of line {number}", record["model"], f"{model!r}, or give another --out"
            )
        end += len(line)
    if not line.endswith(b"\n"):
        file.write(b"\n")
    return ids


def _append(file: IO[bytes], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    file.flush()


def _token_ids(choice: Any) -> list[int] | None:
    found = (choice.model_extra or {}).get("token_ids")
    return list(found) if isinstance(found, list) else None


def _check(settings: Settings) -> None:
    where = "griffin data regenerate"
    for option, value in (
        ("--max-tokens", settings.max_tokens),
        ("--max-turns", settings.max_turns),
        ("--concurrency", settings.concurrency),
        ("--attempts", settings.attempts),
    ):
        if value < 1:
            raise GriffinError.at(where, option, value, "at least 1")
    for temperature in settings.temperatures:
        if not 0 <= temperature < math.inf:
            raise GriffinError.at(where, "--temperature", temperature, "at least 0")
