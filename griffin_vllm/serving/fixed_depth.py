"""Where every round must draft the same number of tokens, so that no chain stops early and no draft is looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")


def reasons(config: VllmConfig) -> list[str]:
    """What asks for it, in the operator's words; nothing on a CPU by default."""
    found = {
        # which drafts by itself, without GriffinProposer
        "vLLM's V2 model runner": config.use_v2_model_runner,
        "data parallelism": config.parallel_config.data_parallel_size > 1,
        "tensor parallelism": config.parallel_config.tensor_parallel_size > 1,
        "asynchronous scheduling": config.scheduler_config.async_scheduling,
        "CUDA graphs": config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE,
    }
    return [reason for reason, holds in found.items() if holds]


def warn(config: VllmConfig) -> None:
    """Warn where the head's K counts on early stops or lookup, which this set-up cannot do."""
    speculation = config.speculative_config
    head = speculation.draft_model_config.hf_config
    fixed_by = reasons(config)
    if config.use_v2_model_runner and head.draft_context_limit is not None:
        logger.warning(
            "This GRIFFIN head should draft nothing beyond %d tokens of context, which vLLM's V2 model runner does "
            "not know: long requests may be slower than without speculation",
            head.draft_context_limit,
        )
    if fixed_by and (head.draft_stop_probability or head.prompt_lookup_min):
        logger.warning(
            "This GRIFFIN head drafts %d tokens in every round here, without prompt lookup or an early stop "
            "(not possible with %s); fewer may be faster, see --num-speculative-tokens",
            speculation.num_speculative_tokens,
            ", ".join(fixed_by),
        )
