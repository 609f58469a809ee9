"""Real vLLM engines under equal settings, and the one loop that drives and times them.

Everything that the benchmarks report is derived from what the engine hands out step by step: how many
tokens a request got, and when. vLLM's own counters of speculation are not needed for it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.methods import Run
from benchmarks.prompts import Conversation
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.tune_engine import render

if TYPE_CHECKING:
    from vllm import LLM


@dataclass
class Answer:
    """One finished request.

    Attributes:
        prompt_tokens: length of the prompt in tokens, template and earlier turns included.
        emitted: tokens that each engine step yielded for this request. The first step ends the prefill
            and yields one; each later one is a target pass of the decoding phase.
        times: seconds from the request's submission to the end of each of these steps.
        margins: where asked for, the target's top logit minus its second at every token.
        runners_up: with ``margins``, the token of that second logit.
    """

    conversation: str
    turn: int
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    runners_up: list[int] = field(default_factory=list)

    @property
    def passes(self) -> list[int]:
        """Tokens of each target pass of the decoding phase."""
        return self.emitted[1:]

    @property
    def decode_tokens(self) -> int:
        return sum(self.passes)

    @property
    def decode_seconds(self) -> float:
        return self.times[-1] - self.times[0]


# Answers of a recorded trajectory, by conversation: the context of later turns.
History = Mapping[str, Sequence[Sequence[int]]]


@contextmanager
def start(run: Run, **arguments: Any) -> Iterator[LLM]:
    """An engine with ``arguments`` (vLLM's ``EngineArgs``) and the run's speculator; gone afterwards."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # lets call_worker send a function to the engine, which is a child process of this one
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        **arguments,
        speculative_config=run.speculative_config,
        # a prompt is asked more than once; its second prefill must cost what the first did
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def resolved_settings(llm: LLM) -> dict[str, Any]:
    """What vLLM made of the engine arguments: everything that could favour one engine over another."""
    config = llm.llm_engine.vllm_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantization": config.model_config.quantization,
        "max_model_len": config.model_config.max_model_len,
        "compilation": config.compilation_config.mode.name
        if not config.model_config.enforce_eager
        else "eager",
        "block_size": config.cache_config.block_size,
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "kv_cache_memory_bytes": config.cache_config.kv_cache_memory_bytes,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        **call_worker(llm, thread_settings),
    }


def thread_settings(worker: Any) -> dict[str, Any]:
    """In the worker: the threads that the model runs on, the cores of its main thread, and the binding that vLLM
    chose, which reaches the OpenMP library in environment variables."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "thread_binding": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "KMP_", "GOMP_"))
        },
    }


def fitting(
    tokenizer: Any, conversations: Sequence[Conversation], max_tokens: int, max_model_len: int
) -> list[Conversation]:
    """The conversations that fit the model's length even when every answer has ``max_tokens``.

    Raises:
        GriffinError: there is none.
    """

    def longest(conversation: Conversation) -> int:
        turns = len(conversation.turns)
        return len(render_turns(tokenizer, conversation.turns, [""] * (turns - 1))) + turns * max_tokens

    fit = [conversation for conversation in conversations if longest(conversation) <= max_model_len]
    if not fit:
        raise GriffinError(
            f"none of {len(conversations)} conversations fits --max-model-len {max_model_len} with answers of "
            f"{max_tokens} tokens; --turns takes fewer turns"
        )
    return fit


def answer(
    llm: LLM,
    conversations: Sequence[Conversation],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    concurrency: int = 1,
    history: History | None = None,
    margins: bool = False,
) -> list[Answer]:
    """Hold the conversations, at most ``concurrency`` at a time, in the order given.

    Answers end at EOS or after ``max_tokens``. A later turn follows the engine's own answers, or those of
    ``history`` (token ids) where it is given. Returned in the order of conversations and turns.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    tokenizer = llm.get_tokenizer()
    engine = llm.llm_engine
    parameters = SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        logprobs=2 if margins else None,
        output_kind=RequestOutputKind.DELTA,
    )
    waiting = deque(conversations)
    running: dict[str, tuple[Conversation, Answer, float]] = {}
    said: dict[str, list[Sequence[int]]] = {conversation.id: [] for conversation in conversations}
    finished: list[Answer] = []
    numbers = itertools.count()

    def submit(conversation: Conversation) -> None:
        before = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said[conversation.id]]
        turn = len(before)
        prompt = render_turns(tokenizer, conversation.turns[: turn + 1], before)
        number = str(next(numbers))
        running[number] = (conversation, Answer(conversation.id, turn, len(prompt)), time.perf_counter())
        engine.add_request(number, {"prompt_token_ids": prompt}, parameters)

    while waiting or running:
        while waiting and len(running) < concurrency:
            submit(waiting.popleft())
        for output in engine.step():
            now = time.perf_counter()
            number = output.request_id
            conversation, answer, submitted = running[number]
            new = output.outputs[0]
            if new.token_ids:
                answer.tokens += new.token_ids
                answer.emitted.append(len(new.token_ids))
                answer.times.append(now - submitted)
            if margins:
                _add_margins(answer, new.logprobs or [])
            if output.finished:
                del running[number]
                finished.append(answer)
                turn = answer.turn
                said[conversation.id].append(history[conversation.id][turn] if history else answer.tokens)
                if turn + 1 < len(conversation.turns):
                    submit(conversation)
    order = {conversation.id: i for i, conversation in enumerate(conversations)}
    return sorted(finished, key=lambda answer: (order[answer.conversation], answer.turn))


def render_turns(tokenizer: Any, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """Prompt of the last turn."""
    return render(tokenizer, _interleave(turns, answers))


def _interleave(turns: Sequence[str], answers: Sequence[str]) -> list[str]:
    pairs = itertools.zip_longest(turns, answers)
    return [text for pair in pairs for text in pair if text is not None]


def _add_margins(answer: Answer, logprobs: Sequence[Mapping[int, Any]]) -> None:
    for position in logprobs:
        first, second = sorted(position.items(), key=lambda item: -item[1].logprob)[:2]
        answer.margins.append(first[1].logprob - second[1].logprob)
        answer.runners_up.append(second[0])


def counters(llm: LLM) -> dict[str, int]:
    """vLLM's own counters of speculation since the engine started."""
    prefix = "vllm:spec_decode_"
    return {
        metric.name.removeprefix(prefix): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(prefix) and hasattr(metric, "value")
    }


def call_worker(llm: LLM, function: Callable[[Any], Any]) -> Any:
    """Run ``function(worker)`` where the model is."""
    return llm.collective_rpc(function)[0]


def time_the_model(worker: Any) -> None:
    """In the worker: from now on take the time of every forward pass and every logits product."""
    runner = worker.model_runner
    runner.seconds_in_model = ([], [])

    def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    runner._model_forward = timed(runner._model_forward, runner.seconds_in_model[0])
    runner.model.compute_logits = timed(runner.model.compute_logits, runner.seconds_in_model[1])


def model_seconds(worker: Any) -> tuple[list[float], list[float]]:
    """In the worker: seconds of each forward pass and each logits product since last asked."""
    taken = worker.model_runner.seconds_in_model
    copies = list(taken[0]), list(taken[1])
    for seconds in taken:
        seconds.clear()
    return copies
