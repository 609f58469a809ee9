"""From what an operator asks for to what vLLM runs: validation, and the one internal config.

Inside vLLM a GRIFFIN head is served with method ``eagle``, because that is what scheduler, KV cache
manager and model runners ask for when a draft head consumes the target's hidden states
(``SpeculativeConfig.use_eagle``). What tells the head apart is its architecture.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import SpeculativeConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from griffin_vllm.bf16 import multiplies_bf16
from griffin_vllm.checkpoint import (
    CONFIG_FILE,
    PREFIX,
    Head,
    asks_for_griffin,
    bundled_heads,
    check_values,
    find_head,
    is_griffin_head,
    open_head,
)
from griffin_vllm.config import METHOD
from griffin_vllm.convert import cached_served_layout
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import exists_here
from griffin_vllm.serving.tuning import SCHEDULE, precision, read_tuning, tuning_file, untuned_schedule

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig

logger = init_logger(f"vllm.{__name__}")

# The rejection sampler's limit, MAX_SPEC_LEN in vllm/v1/sample/rejection_sampler.py; beyond it the
# engine dies at the first request.
MAX_SPECULATIVE_TOKENS = 128

STOP_PROBABILITY, PROMPT_LOOKUP = "draft_stop_probability", "prompt_lookup_min"
# What is not vLLM's (or not with method `eagle`) and goes into the head's config on its way to the workers.
HEAD_SETTINGS = (STOP_PROBABILITY, PROMPT_LOOKUP)
# Keys of vLLM's speculative config that mean something for a GRIFFIN head and are passed on as they are.
_PASSED_ON = {
    "attention_backend",
    "disable_eagle_block_drop",
    "disable_padded_drafter_batch",
    "draft_load_config",
    "draft_sample_method",
    "enforce_eager",
    "kv_cache_dtype",
    "max_model_len",
    SCHEDULE,
    "quantization",
    "rejection_sample_method",
    "synthetic_acceptance_length",
    "synthetic_acceptance_rates",
    "use_local_argmax_reduction",
}
# Keys that vLLM would take and then ignore or stumble over, with the reason. They may be given with
# vLLM's own default value, which asks for nothing.
_REFUSED = {
    "code_revision": "a head brings no code",
    "draft_model_config": "vLLM builds it itself",
    "draft_parallel_config": "vLLM builds it itself",
    "enable_adaptive_verification": "it belongs to the method 'dspark'",
    "moe_backend": "a GRIFFIN head has no experts",
    "parallel_drafting": "a GRIFFIN head drafts one token after the other",
    "target_model_config": "vLLM builds it itself",
    "target_parallel_config": "vLLM builds it itself",
    "tensor_parallel_size": "the head runs on the target's ranks",
    "use_heterogeneous_vocab": "a GRIFFIN head shares its target's vocabulary",
}
# What vLLM makes of a params.json (``transformers_utils/configs/mistral.py``), which it prefers to a config.json.
_MISTRALS_OWN = "transformer"
_MISTRAL_FAMILIES = {"MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral"}
_OTHER_METHODS = ("dspark_", "index_share_", "prompt_lookup_", "suffix_")


def resolve(
    speculative_config: Mapping[str, Any] | None,
    spec_method: str | None,
    spec_model: str | None,
    spec_tokens: int | None,
    target: ModelConfig,
    parallel: ParallelConfig,
) -> dict[str, Any] | None:
    """The keyword arguments for vLLM's ``SpeculativeConfig``, or None when GRIFFIN is not asked for.

    Among them may be ``HEAD_SETTINGS``, which belong into the head's config.

    The first four arguments are the fields of the same names of ``EngineArgs``; ``target`` and
    ``parallel`` are the target's configs.

    Raises:
        GriffinError: GRIFFIN is asked for in a way that cannot work, or with a head that does not fit.
    """
    given = {key.replace("-", "_"): value for key, value in (speculative_config or {}).items()}
    methods, models = (given.pop("method", None), spec_method), (given.pop("model", None), spec_model)
    if not any(map(asks_for_griffin, methods, models)):
        for model in models:
            _refuse_head_under_other_name(methods[0] or methods[1], model)
        return None
    method, model = _only_one("method", *methods), _only_one("model", *models)
    if method not in (None, METHOD):
        raise GriffinError(f"speculative_config: method is {method!r}, expected {METHOD!r} for {model!r}")
    if not isinstance(model, str):
        raise GriffinError.at("speculative_config", "model", model, f"a head: name, folder or {PREFIX}HEAD")

    _check_keys(given, parallel)
    head = open_head(find_head(_with_revision(model.removeprefix(PREFIX), given)))
    _check_fit(head, target, parallel)
    check_values(head)
    given = {key: value for key, value in given.items() if value is not None}
    k_said = bool({"num_speculative_tokens", SCHEDULE} & given.keys()) or spec_tokens is not None
    unsaid = _unsaid(given, spec_tokens, head, target, parallel)
    given = {**unsaid, **given}
    scheduled = [k for _, _, k in given.get(SCHEDULE, [])]
    k = _speculative_tokens(given.pop("num_speculative_tokens", None), spec_tokens, scheduled, head)
    _check_speculative_tokens(
        k, scheduled, target, "speculative_config" if k_said else _source_of_k(unsaid, head)
    )
    _warn_of_emulation(target)
    folder = cached_served_layout(head, Path(envs.VLLM_CACHE_ROOT) / "griffin")
    passed_on = {key: value for key, value in given.items() if key in _PASSED_ON}
    passed_on |= {key: given[key] for key in HEAD_SETTINGS if key in given}
    if not given.get("use_local_argmax_reduction"):
        passed_on.setdefault("draft_sample_method", head.config.draft_sample_method)
    if not head.config.drafts_all_tokens and not _samples_drafts(passed_on):
        # How vLLM's V2 runner is asked to let the model choose greedy drafts; it refuses that for sampled ones.
        passed_on.setdefault("use_local_argmax_reduction", True)
    return {"method": "eagle", "model": str(folder), "num_speculative_tokens": k, **passed_on}


def _unsaid(
    given: Mapping[str, Any],
    spec_tokens: int | None,
    head: Head,
    target: ModelConfig,
    parallel: ParallelConfig,
) -> dict[str, Any]:
    """How much to draft where the operator does not say it: as `griffin tune` has found for this head on this machine,
    else on a CPU less the more requests there are."""
    counts_said = bool({"num_speculative_tokens", SCHEDULE} & given.keys()) or spec_tokens is not None
    asked = counts_said or PROMPT_LOOKUP in given
    tuning = None if asked else read_tuning(head, precision(target))
    if tuning is not None:
        return {**tuning.speculative_config(), STOP_PROBABILITY: tuning.draft_stop_probability}
    path = tuning_file(head)
    if exists_here(str(path)):
        other = "it was measured with other weights, another machine, vLLM or precision"
        logger.info(
            "%s is not used: %s", path, "the number of drafts or the lookup is given" if asked else other
        )
    if counts_said or not current_platform.is_cpu():
        return {}
    if parallel.data_parallel_size > 1:
        logger.warning(
            "With data parallelism vLLM takes no schedule: %d drafts are made at every load, which costs more than it "
            "gives where a CPU serves several requests at a time; give fewer (--num-speculative-tokens)",
            head.config.num_speculative_tokens,
        )
        return {}
    schedule = untuned_schedule(head.config.num_speculative_tokens)
    logger.info(
        "GRIFFIN drafts less for several requests, as suits a CPU: %s is %s, and still more get as many as the last. "
        "`griffin tune` measures what is best; a number that is given (--num-speculative-tokens) holds at every load",
        SCHEDULE,
        [*map(list, schedule)],
    )
    return {SCHEDULE: schedule}


def _warn_of_emulation(target: ModelConfig) -> None:
    if (
        current_platform.is_cpu()
        and target.dtype == torch.bfloat16
        and not multiplies_bf16(torch.device("cpu"))
    ):
        logger.warning(
            "This CPU only emulates bfloat16 products, and verifying drafts takes many of them: speculation is likely "
            "to be slower than plain decoding, and float32 (--dtype float32) to be faster; `griffin tune` measures it"
        )


def _only_one(key: str, in_config: Any, flag: Any) -> Any:
    if in_config is not None and flag is not None:
        names = {"model": "--speculative-model (or --spec-model)", "method": "--spec-method"}
        raise GriffinError(
            f"{names[key]} is {flag!r} and the speculative config's {key} is {in_config!r}: give one of them"
        )
    return flag if in_config is None else in_config


def _refuse_head_under_other_name(method: str | None, model: Any) -> None:
    """Any other method would run a GRIFFIN head unchecked, or fail on it somewhere inside vLLM."""
    if isinstance(model, str) and is_griffin_head(Path(model)):
        asked = f"method {method!r}" if method else "no method"
        raise GriffinError(
            f"{model}: is a GRIFFIN head, given with {asked}; use {PREFIX}{model} or method {METHOD!r}"
        )


def _check_keys(given: Mapping[str, Any], parallel: ParallelConfig) -> None:
    defaults = {field.name: _default(field) for field in dataclasses.fields(SpeculativeConfig)}
    for key, value in given.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise GriffinError(f"speculative_config: {key} is not a key of this vLLM{hint}")
        if key == SCHEDULE and value is not None:
            _check_schedule(key, value)
        if value == defaults[key]:
            continue
        if key == "rejection_sample_method" or key.startswith("synthetic_"):
            _check_rejection_method(key, value)
        if key in _PASSED_ON or key in ("num_speculative_tokens", "revision"):
            continue
        if key == PROMPT_LOOKUP:
            if type(value) is not int or value < 0:
                raise GriffinError.at(
                    "speculative_config", key, value, "a number of tokens, or 0 to draft by the head alone"
                )
            continue
        if key == "draft_tensor_parallel_size":
            if value != parallel.tensor_parallel_size:
                raise GriffinError.at(
                    "speculative_config",
                    key,
                    value,
                    f"{parallel.tensor_parallel_size} (the target's) or none",
                )
            continue
        reason = _REFUSED.get(key)
        if reason is None and key.startswith(_OTHER_METHODS):
            reason = "it belongs to another method"
        raise GriffinError(
            f"speculative_config: {key} does not go with method {METHOD!r}: "
            f"{reason or 'griffin-vllm does not know this key'}"
        )


def _check_schedule(key: str, schedule: Any) -> None:
    expected = "a list of [smallest batch, largest batch, draft tokens]"
    entries = schedule if isinstance(schedule, list | tuple) else [None]
    if any(not isinstance(entry, list | tuple) or [*map(type, entry)] != [int] * 3 for entry in entries):
        raise GriffinError.at("speculative_config", key, schedule, expected)
    try:
        validate_and_normalize_dynamic_sd_schedule(list(schedule))
    except ValueError as error:
        reason = GriffinError.reason(error)
        raise GriffinError.at("speculative_config", key, schedule, f"{expected}: {reason}") from error


def _check_rejection_method(key: str, value: Any) -> None:
    if current_platform.is_cpu() or envs.VLLM_USE_V2_MODEL_RUNNER is False:
        raise GriffinError.at(
            "speculative_config",
            key,
            value,
            "rejection_sample_method 'standard' alone (others need vLLM's V2 model runner on a GPU)",
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    # pydantic's dataclasses wrap a default that has constraints in a FieldInfo
    return getattr(field.default, "default", field.default)


def _samples_drafts(given: Mapping[str, Any]) -> bool:
    return given.get("draft_sample_method") == "probabilistic"


def _with_revision(name: str, given: dict[str, Any]) -> str:
    revision = given.pop("revision", None)
    if revision is None:
        return name
    if "@" in name or name in bundled_heads() or exists_here(name):
        raise GriffinError.at("speculative_config", "revision", revision, f"none (the head is {name!r})")
    return f"{name}@{revision}"


def _check_fit(head: Head, target: ModelConfig, parallel: ParallelConfig) -> None:
    config, where = head.config, head.folder / CONFIG_FILE
    # A multimodal target's own model type is never one of the families, its text model's may be.
    config.check_target(where, _family(target), target.get_hidden_size(), target.get_vocab_size())
    quantization = getattr(target.hf_config, "quantization_config", None) or {}
    if not config.drafts_all_tokens and quantization.get("lm_head"):
        raise GriffinError.at(
            target.model,
            "quantization_config.lm_head",
            quantization["lm_head"],
            "false (a reduced draft vocabulary takes rows of lm_head)",
        )
    if target.runner_type != "generate":
        raise GriffinError.at(target.model, "runner", target.runner_type, "'generate'")
    if target.enable_prompt_embeds:
        # vLLM's drafters look up a prompt's tokens
        raise GriffinError.at("vLLM", "enable_prompt_embeds", True, "False with a GRIFFIN head")
    if parallel.pipeline_parallel_size > 1:
        raise GriffinError.at(
            "vLLM", "pipeline_parallel_size", parallel.pipeline_parallel_size, "1 with a GRIFFIN head"
        )
    ranks = parallel.tensor_parallel_size
    kv_heads = config.num_key_value_heads
    divides: tuple[tuple[str, int, bool], ...] = (
        ("num_attention_heads", config.num_attention_heads, config.num_attention_heads % ranks == 0),
        # fewer KV heads than ranks are replicated
        ("num_key_value_heads", kv_heads, kv_heads % ranks == 0 or ranks % kv_heads == 0),
        ("intermediate_size", config.intermediate_size, config.intermediate_size % ranks == 0),
    )
    for name, size, fits in divides:
        if not fits:
            raise GriffinError.at(where, name, size, f"a number that tensor_parallel_size={ranks} divides")


def _family(target: ModelConfig) -> str:
    """The target's model type as Hugging Face calls it."""
    hf_config = target.hf_config
    if hf_config.model_type == _MISTRALS_OWN:
        return _MISTRAL_FAMILIES.get(next(iter(hf_config.architectures or ()), ""), _MISTRALS_OWN)
    return str(hf_config.model_type)


def _source_of_k(unsaid: Mapping[str, Any], head: Head) -> Path:
    """The file that says K where the operator does not."""
    return tuning_file(head) if "num_speculative_tokens" in unsaid else head.folder / CONFIG_FILE


def _speculative_tokens(in_config: Any, flag: Any, scheduled: Sequence[int], head: Head) -> Any:
    """K: what is asked for, else the most that the schedule asks for, else what the head recommends."""
    recommended = head.config.num_speculative_tokens
    # `vllm serve HEAD` puts the head's own recommendation into the config; a flag overrides that.
    if in_config is not None and flag is not None and in_config != recommended:
        raise GriffinError(
            f"--num-speculative-tokens (or --spec-tokens) is {flag!r} and the speculative config's "
            f"num_speculative_tokens is {in_config!r}: give one of them"
        )
    in_config = None if scheduled and in_config == recommended else in_config
    recommended = max(1, *scheduled) if scheduled else recommended
    return next((value for value in (flag, in_config) if value is not None), recommended)


def _check_speculative_tokens(
    k: Any, scheduled: Sequence[int], target: ModelConfig, where: str | Path
) -> None:
    limit = min(MAX_SPECULATIVE_TOKENS, target.max_model_len - 1)
    if type(k) is not int or not 0 < k <= limit:
        raise GriffinError.at(where, "num_speculative_tokens", k, f"a whole number from 1 to {limit}")
    if scheduled and max(scheduled) > k:
        # vLLM would cut it without a word
        raise GriffinError.at(
            "speculative_config", SCHEDULE, max(scheduled), f"at most num_speculative_tokens, which is {k}"
        )
