"""The sizes of a head that is to be trained: the target's, those of the head it starts from, or as the settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from griffin_vllm.checkpoint import Head
from griffin_vllm.config import HeadConfig
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.config import TrainConfig


def head_config(config: TrainConfig, target: Any, longest_sample: int, start: Head | None) -> HeadConfig:
    """The head's sizes: those of ``start`` (``init_from``), or the target's unless the settings say otherwise.

    ``longest_sample``: tokens of the data's longest; ``start`` may have been trained with longer ones.

    Raises:
        GriffinError: the sizes contradict each other, or ``start`` is not a head for ``target``.
    """
    sizes = sizes_like(target) if start is None else start.config.model_dump()
    for name in ("intermediate_size", "num_key_value_heads"):
        wanted = getattr(config, name) or sizes[name]
        if start is not None and wanted != sizes[name]:
            raise GriffinError.at(
                "settings", name, wanted, f"null, or {sizes[name]} as {config.init_from} has it"
            )
        sizes[name] = wanted
    if start is None or not start.is_served_layout:
        # nobody has said otherwise: above temperature 0 they are accepted far more often (benchmarks/README.md)
        sizes["draft_sample_method"] = "probabilistic"
    limit = sizes.get("draft_context_limit")
    if limit and longest_sample > limit:
        # where the head from before stopped to pay is not where this one does
        sizes["draft_context_limit"] = None
    provenance = {
        "draft_vocab_size": config.draft_vocab or sizes["draft_vocab_size"],
        "target": config.target_name or str(config.target),
        "target_model_type": target.model_type,
        "num_speculative_tokens": config.num_speculative_tokens or sizes["num_speculative_tokens"],
        "trained_context_length": max(longest_sample, sizes.get("trained_context_length") or 0),
    }
    where = Path(config.init_from or config.target)
    try:
        head = HeadConfig(**sizes | provenance).checked("settings" if config.num_key_value_heads else where)
    except ValidationError as error:
        raise GriffinError.invalid(where, error.errors()[0]) from error
    head.check_target(where, target.model_type, target.hidden_size, target.vocab_size)
    return head


def sizes_like(target: Any) -> dict[str, Any]:
    """Fields of a ``HeadConfig`` with the sizes of a target (its Hugging Face config)."""
    heads = target.num_attention_heads
    return {
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": getattr(target, "head_dim", None) or target.hidden_size // heads,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": target.vocab_size,
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": target.rms_norm_eps,
        "rope_theta": rope_theta(target),
    }


def rope_theta(target: Any) -> float:
    """Rotary base of the target's full attention (Gemma 3 has another one for its sliding windows)."""
    parameters = target.rope_parameters or {}
    return parameters.get("full_attention", parameters).get("rope_theta", 10000.0)
