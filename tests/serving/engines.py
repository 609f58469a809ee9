"""Real vLLM engines on tiny models, in the test's own process, where they start in seconds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from vllm import LLM


@contextmanager
def engine(**arguments: Any) -> Iterator[LLM]:
    """A float32 engine without compilation, gone again afterwards.

    vLLM collects garbage ten times while an engine starts and stops, each time among all that its imports have made.
    That is most of the time that a tiny engine takes, so here it happens once, at the end.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 26,
        "disable_log_stats": False,
    }
    with mock.patch.dict("os.environ", VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        gc.freeze()
        llm = LLM(**(defaults | arguments))
        try:
            yield llm
        finally:
            with mock.patch.object(gc, "unfreeze"):
                llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


def runner_of(llm: LLM) -> Any:
    """The V1 model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def spec_counters(llm: LLM) -> dict[str, int]:
    """vLLM's speculative counters so far: num_drafts, num_draft_tokens, num_accepted_tokens."""
    prefix = "vllm:spec_decode_"
    return {
        metric.name.removeprefix(prefix): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(prefix) and hasattr(metric, "value")
    }
