"""The engine that `griffin tune` measures on, and what it is asked: one batch of greedy answers after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import AutoTokenizer

from griffin_vllm.checkpoint import Head
from griffin_vllm.config import METHOD
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.tuning import SCHEDULE

if TYPE_CHECKING:
    from vllm import EngineArgs
    from vllm.config import ModelConfig
    from vllm.v1.engine.llm_engine import LLMEngine

# Tokens of a block of the KV cache, at most: vLLM's choice on CPU.
LARGEST_BLOCK = 128


def rendered_prompts(target: str, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each of ``prompts`` as a first turn for ``target``.

    Raises:
        GriffinError: its tokenizer or chat template fails.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
        return [render(tokenizer, [prompt]) for prompt in prompts]
    except Exception as error:  # tokenizers and templates fail in ways of their own
        raise GriffinError(
            f"{target}: its tokenizer cannot render the prompts to measure with ({GriffinError.reason(error)})"
        ) from error


@contextmanager
def running_engine(
    target: str, head: Head, max_k: int, max_batch: int, length: int, options: Sequence[str]
) -> Iterator[LLMEngine]:
    """An engine for ``max_batch`` requests of ``length`` tokens that drafts up to ``max_k``; gone again afterwards.

    Raises:
        GriffinError: vLLM refuses one of ``options``, takes its V2 model runner, or does not start.
    """
    # the scheduler, whose number of drafts is changed, must be in this process
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        arguments = _engine_arguments(target, head, max_k, max_batch, length, options)
        uses_v2 = arguments.create_engine_config().use_v2_model_runner
    except GriffinError:
        raise
    except ValueError as error:
        raise GriffinError(f"griffin tune: {GriffinError.reason(error)}") from error
    if uses_v2:
        raise GriffinError(
            "griffin tune: measures what the V1 model runner does, and this vLLM takes its V2 runner here; set "
            "VLLM_USE_V2_MODEL_RUNNER=0, also to serve"
        )
    try:
        engine = LLMEngine.from_engine_args(arguments)
    except Exception as error:  # no room for the KV cache, a worker that fails: of many kinds
        raise GriffinError(
            f"griffin tune: the engine does not start ({GriffinError.reason(error)})"
        ) from error
    try:
        yield engine
    finally:
        engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _engine_arguments(
    target: str, head: Head, max_k: int, max_batch: int, length: int, options: Sequence[str]
) -> EngineArgs:
    """Of an engine for ``max_batch`` requests of ``length`` tokens; ValueError if vLLM refuses one of ``options``."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str) -> NoReturn:
        raise GriffinError(f"griffin tune: {message} (what it does not know itself goes to vLLM)")

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="griffin tune"))
    parser.error = refuse
    arguments = EngineArgs.from_cli_args(
        parser.parse_args(["--model", target, "--max-model-len", str(length), *options])
    )
    if arguments.speculative_config or arguments.spec_model:
        raise GriffinError(
            "griffin tune: its head is the second argument, and it tries the numbers of drafts by itself; leave out "
            "--speculative-config and --speculative-model"
        )
    if current_platform.is_cpu() and arguments.distributed_executor_backend is None:
        # As behind `vllm serve`: a worker of its own, whose threads are bound to all cores but the scheduler's.
        # In this process the model would have every core, and two cores verify at half the price of one.
        arguments.distributed_executor_backend = "mp"
    model_config = arguments.create_model_config()
    if model_config.max_model_len < length:
        raise GriffinError.at(
            "griffin tune",
            "--max-model-len",
            model_config.max_model_len,
            f"{length} or more for these prompts",
        )
    if arguments.kv_cache_memory_bytes is None and arguments.num_gpu_blocks_override is None:
        # vLLM's own choice can be nearly all of a small machine's memory, and it does not start with less
        tokens = max(max_batch * length, arguments.max_model_len or 0) + (2 * max_batch + 1) * LARGEST_BLOCK
        arguments.kv_cache_memory_bytes = tokens * _cache_bytes(model_config, head)
    arguments.max_num_seqs = max_batch
    arguments.enable_prefix_caching = False
    arguments.speculative_config = {
        "method": METHOD,
        "model": str(head.folder),
        "num_speculative_tokens": max_k,
        SCHEDULE: [(1, max_batch, max_k)],
    }
    return arguments


def _cache_bytes(target: ModelConfig, head: Head) -> int:
    """Bytes of keys and values that one token takes in the layers of the target and of the head."""
    sizes = head.config
    row = max(
        target.get_total_num_kv_heads() * target.get_head_size(), sizes.num_key_value_heads * sizes.head_dim
    )
    return 2 * target.dtype.itemsize * row * (target.hf_text_config.num_hidden_layers + 1)


class Drafts:
    """The number of drafts of a running engine (``vllm/v1/core/sched/scheduler.py``)."""

    def __init__(self, engine: LLMEngine) -> None:
        core: Any = engine.engine_core
        self.lookup: list[int] = getattr(core.engine_core.scheduler, "dynamic_sd_lookup", None) or []
        if not self.lookup:
            raise GriffinError("griffin tune: this vLLM cannot change the number of drafts while it runs")

    def set(self, k: int) -> None:
        self.lookup[1:] = [k] * (len(self.lookup) - 1)


def decode(engine: LLMEngine, prompts: Iterable[list[int]], tokens: int) -> Iterator[tuple[float, list[int]]]:
    """Answer ``prompts`` (token ids) at once, greedily; seconds of each round in which all of them are decoding,
    and the tokens that each request got in it. Yields right after the round."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    waiting = set()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        waiting.add(str(number))
    finished = False
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if not waiting and not finished and any(counts):
            yield seconds, [count for count in counts if count]
        waiting -= {output.request_id for output, count in zip(outputs, counts, strict=True) if count}
        finished = finished or any(output.finished for output in outputs)


def render(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Prompt that ends with the last of ``texts`` (of user and assistant in turn), in the model's chat
    template; plain text for a model that has none."""
    if not tokenizer.chat_template:
        return list(tokenizer("".join(texts))["input_ids"])
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
