"""Every place where vLLM is touched, and nothing else.

vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins``). Two of the
touch points are registries that vLLM offers; the others wrap a function or a constructor and hand on
whatever is not GRIFFIN's. All of them are in ``TOUCH_POINTS``, with what they need of vLLM: looked up before
a point is touched (``touch_point.py``), and in the source of a vLLM that cannot run here by
``benchmarks/vllm_source.py``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from griffin_vllm.checkpoint import PREFIX, asks_for_griffin
from griffin_vllm.config import ARCHITECTURE, DRAFTING_SETTINGS, METHOD, HeadConfig
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving import touch_point
from griffin_vllm.serving.touch_point import DoesNotFitError, OnImport, TouchPoint

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# Later versions are probed like these and served if everything still fits, with a warning.
SUPPORTED_VLLM = SpecifierSet(">=0.28,<0.33", prereleases=True)
# Stands for a version that says nothing about its age.
NEWEST = Version("9999")
# Load formats of targets that are not stored as a head is, in one safetensors file.
_FORMATS_OF_OTHER_FILES = {
    "mistral",
    "npcache",
    "pt",
    "runai_streamer_sharded",
    "sharded_state",
    "tensorizer",
}


def register() -> None:
    """Hook GRIFFIN into vLLM. Never raises: a vLLM that does not use GRIFFIN must not notice."""
    import vllm

    if _parsed(vllm.__version__) not in SUPPORTED_VLLM and not _is_too_old(vllm.__version__):
        touch_point.log_once(
            f"griffin-vllm is made for vLLM {SUPPORTED_VLLM}, this is {vllm.__version__}; continuing anyway"
        )
    for point in _points():
        if point.on_import and point.module not in sys.modules:
            if not any(isinstance(finder, OnImport) and finder.point is point for finder in sys.meta_path):
                sys.meta_path.insert(0, OnImport(point))
        else:
            touch_point.touch(point)


def check_fits() -> None:
    """Raise GriffinError if this vLLM is too old or is not what a touch point expects.

    Asked when GRIFFIN is, before a process for a model starts. What only workers import is imported here too,
    in a second or so: a worker that does not find it could only log that, and would then draft as EAGLE does.
    """
    import vllm

    for point in _points():
        if point.on_import:
            touch_point.touch(point)
    misfits = list(touch_point.misfits.values())
    if _is_too_old(vllm.__version__):
        misfits.append("it is too old")
    for module, _, need in (entry.partition(":") for entry in (*OUR_IMPORTS, *RELIED_ON)):
        try:
            touch_point.expect(importlib.import_module(module), need)
        except (ImportError, AttributeError, DoesNotFitError) as error:
            misfits.append(f"{module} ({error})")
    if misfits:
        raise GriffinError(
            f"griffin-vllm (for vLLM {SUPPORTED_VLLM}) does not fit vLLM {vllm.__version__}: "
            + "; ".join(misfits)
        )


def _parsed(version: str) -> Version:
    """A build from source may call itself "dev", or "0.1.dev..." where the clone has no tags; it is taken for newer
    than any release."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return NEWEST
    return NEWEST if parsed.is_devrelease and parsed.release == (0, 1) else parsed


def _is_too_old(version: str) -> bool:
    """Whether ``version`` is below the supported range; one that is not in it otherwise is newer."""
    return any(
        specifier.operator == ">=" and not specifier.contains(_parsed(version), prereleases=True)
        for specifier in SUPPORTED_VLLM
    )


def _points() -> list[TouchPoint]:
    from vllm.platforms import current_platform

    return [point for point in TOUCH_POINTS if current_platform.is_cpu() or not point.cpu_only]


def _read_our_configs(algos: ModuleType) -> None:
    @algos.register_speculator(METHOD)
    def update_griffin(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
        pre_trained_config["architectures"] = [ARCHITECTURE]
        pre_trained_config["draft_vocab_size"] = (
            config_dict.get("draft_vocab_size") or pre_trained_config["vocab_size"]
        )
        for name in DRAFTING_SETTINGS:
            pre_trained_config[name] = config_dict.get(name, HeadConfig.model_fields[name].default)


def _know_our_model(models: ModuleType) -> None:
    # also where vLLM has a model of that name (patches/): our proposer asks more of it
    models.ModelRegistry.register_model(ARCHITECTURE, "griffin_vllm.serving.model:GriffinForCausalLM")


def _accept_griffin(arg_utils: ModuleType) -> None:
    touch_point.wrap_once(arg_utils.EngineArgs, "create_speculative_config", _create_speculative_config)


def _create_speculative_config(
    original: Any,
    self: EngineArgs,
    target_model_config: Any,
    target_parallel_config: Any,
    *args: Any,
    **kwargs: Any,
) -> SpeculativeConfig | None:
    try:
        from griffin_vllm.serving.speculative_config import HEAD_SETTINGS, resolve
    except ImportError:
        # this vLLM lacks something that nobody needs who does not ask for GRIFFIN
        given = self.speculative_config or {}
        asked_for = (self.spec_method or given.get("method"), self.spec_model or given.get("model"))
        if not asks_for_griffin(*asked_for):
            return original(self, target_model_config, target_parallel_config, *args, **kwargs)
        check_fits()
        raise

    resolved = resolve(
        self.speculative_config,
        self.spec_method,
        self.spec_model,
        self.spec_tokens,
        target_model_config,
        target_parallel_config,
    )
    if resolved is None:
        config = original(self, target_model_config, target_parallel_config, *args, **kwargs)
        _refuse_unchecked_head(config)
        return config
    check_fits()
    settings = {key: resolved.pop(key) for key in HEAD_SETTINGS if key in resolved}
    asked = copy.copy(self)
    asked.speculative_config = resolved
    asked.spec_method = asked.spec_model = asked.spec_tokens = None
    config = original(asked, target_model_config, target_parallel_config, *args, **kwargs)
    if config.draft_load_config is None and self.load_format in _FORMATS_OF_OTHER_FILES:
        from vllm.config import LoadConfig

        config.draft_load_config = LoadConfig()
    # the way by which the head's config reaches the workers
    config.draft_model_config.hf_config.update(settings)
    if resolved.get("max_model_len") is None:
        # A head drafts at any position; beyond its own number vLLM would have no request draft beside a longer one.
        config.draft_model_config.max_model_len = target_model_config.max_model_len
    return config


def _refuse_unchecked_head(config: SpeculativeConfig | None) -> None:
    """A head of the Hub may turn out to be a GRIFFIN head only when vLLM has read its config."""
    draft = getattr(config, "draft_model_config", None)
    if draft is not None and ARCHITECTURE in (draft.architectures or ()):
        raise GriffinError(
            f"{draft.model}: is a GRIFFIN head; give it as {PREFIX}{draft.model} or with method {METHOD!r}"
        )


def _tell_heads_apart(speculative: ModuleType) -> None:
    touch_point.wrap_once(speculative.SpeculativeConfig, "compute_hash", _compute_hash)


def _compute_hash(original: Any, self: SpeculativeConfig) -> str:
    draft = self.draft_model_config
    if draft is None or ARCHITECTURE not in draft.architectures:
        return str(original(self))
    return hashlib.sha256(f"{original(self)} {draft.compute_hash()}".encode()).hexdigest()


def _ask_for_a_target(arg_utils: ModuleType) -> None:
    touch_point.wrap_once(arg_utils.EngineArgs, "create_model_config", _create_model_config)


def _create_model_config(original: Any, self: EngineArgs, *args: Any, **kwargs: Any) -> ModelConfig:
    speculation = self.speculative_config
    if self.model is None and isinstance(speculation, dict) and speculation.get("method") == METHOD:
        raise GriffinError(
            f"{speculation['model']}: names no target, so it cannot be served alone; "
            f"serve the target with --speculative-model {PREFIX}{speculation['model']}"
        )
    return original(self, *args, **kwargs)


def _offer_flags(arg_utils: ModuleType) -> None:
    touch_point.wrap_once(arg_utils.EngineArgs, "add_cli_args", _add_cli_args)


def _add_cli_args(original: Any, parser: Any, *args: Any, **kwargs: Any) -> Any:
    parser = original(parser, *args, **kwargs)
    group = parser.add_argument_group(
        "GRIFFIN",
        "Draft heads: --speculative-model griffin:HEAD [--num-speculative-tokens K] (griffin-vllm), "
        "or --spec-model griffin:HEAD [--spec-tokens K].",
    )
    # The destinations of --spec-model and --spec-tokens: EngineArgs takes known fields only.
    flags: dict[str, dict[str, Any]] = {
        "--speculative-model": {
            "dest": "spec_model",
            "metavar": "MODEL",
            "help": "griffin:HEAD, where HEAD is a bundled name, a folder, or a Hub repository id "
            "(org/name or org/name@revision); anything else is taken as --spec-model takes it.",
        },
        "--num-speculative-tokens": {
            "dest": "spec_tokens",
            "type": int,
            "metavar": "K",
            "help": "Tokens to draft in each step; without it, what `griffin tune` found, else what the head "
            "recommends (on a CPU for a request that is alone, less for several).",
        },
    }
    for flag, options in flags.items():
        try:
            group.add_argument(flag, **options)
        except argparse.ArgumentError:
            touch_point.log_once(
                f"{flag} is not griffin-vllm's here; ask with --spec-model {PREFIX}HEAD --spec-tokens K"
            )
    return parser


def _draft_with_our_proposer(eagle: ModuleType) -> None:
    proposer = eagle.EagleProposer
    if "__new__" in vars(proposer):
        return

    def new(cls: type, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        draft = vllm_config.speculative_config.draft_model_config
        if cls is proposer and ARCHITECTURE in draft.architectures:
            from griffin_vllm.serving.proposer import GriffinProposer

            cls = GriffinProposer
        return object.__new__(cls)

    proposer.__new__ = staticmethod(new)


def _sample_plainly_without_drafts(module: ModuleType) -> None:
    touch_point.wrap_once(module.RejectionSampler, "forward", _sample)


def _sample(
    original: Any,
    self: Any,
    metadata: Any,
    draft_probs: Any,
    logits: Any,
    sampling_metadata: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if getattr(self, "serves_griffin", False):
        # A row of logits a request: what a thinking budget forces is in the row that vLLM calls the bonus one.
        if metadata.max_spec_len == 0:
            return self.sampler(logits, sampling_metadata, predict_bonus_token=True)
        if getattr(sampling_metadata, "logprob_token_ids", None):
            last = metadata.bonus_logits_indices
            first = last - last.new_tensor(metadata.num_draft_tokens)
            no_drafts: list[list[int]] = [[] for _ in metadata.num_draft_tokens]
            undrafted = dataclasses.replace(sampling_metadata, spec_token_ids=no_drafts)
            return self.sampler(logits[first], undrafted, predict_bonus_token=True)
    return original(self, metadata, draft_probs, logits, sampling_metadata, *args, **kwargs)


def _mend_cpu_sampling(_: ModuleType) -> None:
    from griffin_vllm.serving.cpu_sampling import mend

    mend()


def _mend_cpu_top_k(topk_topp_sampler: ModuleType) -> None:
    from griffin_vllm.serving.cpu_sampling import mend_top_k

    mend_top_k(topk_topp_sampler)


def _mend_cpu_launchers(cpu_model_runner: ModuleType) -> None:
    from griffin_vllm.serving.cpu_sampling import mend_launchers

    mend_launchers(cpu_model_runner)


TOUCH_POINTS = (
    TouchPoint(
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        "all ways of asking for a speculator meet here, before vLLM checks the method's name",
        _accept_griffin,
        (
            "EngineArgs.create_speculative_config(target_model_config, target_parallel_config)",
            "EngineArgs.speculative_config",
            "EngineArgs.spec_method",
            "EngineArgs.spec_model",
            "EngineArgs.spec_tokens",
            "EngineArgs.load_format",
        ),
    ),
    TouchPoint(
        "vllm.config.speculative",
        "SpeculativeConfig.compute_hash",
        "names compiled graphs; until 0.30 it leaves an EAGLE-like head out, so one head would get another's",
        _tell_heads_apart,
        ("SpeculativeConfig.compute_hash",),
    ),
    TouchPoint(
        "vllm.engine.arg_utils",
        "EngineArgs.create_model_config",
        "a head that is served alone must name its target",
        _ask_for_a_target,
        ("EngineArgs.create_model_config",),
    ),
    TouchPoint(
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        "--speculative-model and --num-speculative-tokens",
        _offer_flags,
        ("EngineArgs.add_cli_args(parser)", "EngineArgs.spec_model", "EngineArgs.spec_tokens"),
    ),
    TouchPoint(
        "vllm.transformers_utils.configs.speculators.algos",
        "register_speculator",
        "vLLM's registry of speculators-format configs: reads the served layout",
        _read_our_configs,
        ("register_speculator(name)",),
    ),
    TouchPoint(
        "vllm.model_executor.models",
        "ModelRegistry.register_model",
        "vLLM's registry of models: finds the draft head's class",
        _know_our_model,
        ("ModelRegistry.register_model",),
    ),
    TouchPoint(
        "vllm.v1.spec_decode.eagle",
        "EagleProposer.__new__",
        "the V1 model runner builds its proposer by name; a GRIFFIN head gets a GriffinProposer, which raises the "
        "runner's `effective_drafter_max_model_len`, so that it is asked near the maximum length, too",
        _draft_with_our_proposer,
        (
            "EagleProposer.__init__(vllm_config, device, runner)",
            "EagleProposer.load_model(target_model)",
            "EagleProposer.propose(num_speculative_tokens, common_attn_metadata, next_token_ids, target_token_ids, "
            "target_positions, target_hidden_states, token_indices_to_sample, sampling_metadata)",
            "EagleProposer._greedy_sample(hidden_states)",
            "EagleProposer.initialize_attn_backend(kv_cache_config)",
        ),
        on_import=True,
    ),
    TouchPoint(
        "vllm.v1.sample.rejection_sampler",
        "RejectionSampler.forward",
        "a step without drafts is sampled as plain vLLM does it; since 0.32 the V1 runner takes the long way. So is a "
        "step in which a request asks for `logprob_token_ids`, where the original gives none or fails: it accepts no "
        "drafts. The proposer marks the runner's sampler by `serves_griffin`",
        _sample_plainly_without_drafts,
        ("RejectionSampler.forward(metadata, draft_probs, logits, sampling_metadata)",),
        on_import=True,
    ),
    TouchPoint(
        "vllm.utils",
        "cpu_triton_utils._expand_kernel_impl",
        "random rejection sampling on CPU, see cpu_sampling.py",
        _mend_cpu_sampling,
        cpu_only=True,
    ),
    TouchPoint(
        "vllm.v1.sample.ops.topk_topp_sampler",
        "apply_top_k_only",
        "top-k sampling on CPU, see cpu_sampling.py",
        _mend_cpu_top_k,
        ("apply_top_k_only(logits, k)",),
        on_import=True,
        cpu_only=True,
    ),
    TouchPoint(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner._postprocess_triton",
        "speculation on CPU in vLLM 0.30, see cpu_sampling.py",
        _mend_cpu_launchers,
        ("CPUModelRunner",),
        on_import=True,
        cpu_only=True,
    ),
)

# Our modules that are imported only where GRIFFIN is asked for, with what vLLM or we ask them for: their imports from
# vLLM must work.
OUR_IMPORTS = (
    "griffin_vllm.serving.speculative_config:resolve",
    "griffin_vllm.serving.model:GriffinForCausalLM",
    "griffin_vllm.serving.proposer:GriffinProposer",
)
# What else is relied on beyond imports, as module:need.
RELIED_ON = (
    "vllm.config.vllm:VllmConfig.use_v2_model_runner",
    "vllm.config.speculative:SpeculativeConfig.draft_load_config",
    "vllm.v1.core.sched.scheduler:Scheduler.dynamic_sd_lookup",
    "vllm.v1.spec_decode.eagle:EagleProposer.vllm_config",
    "vllm.v1.spec_decode.eagle:EagleProposer.num_speculative_tokens",
    "vllm.v1.spec_decode.eagle:EagleProposer.draft_model_config",
    "vllm.v1.spec_decode.eagle:EagleProposer._last_draft_probs",
    "vllm.v1.spec_decode.eagle:EagleProposer._sample_draft_tokens",
    "vllm.v1.spec_decode.eagle:EagleProposer._sample_from_logits(logits, sampling_metadata)",
    "vllm.v1.attention.backend:CommonAttentionMetadata(num_reqs, max_seq_len, seq_lens_cpu_upper_bound, "
    "max_query_len, slot_mapping, query_start_loc_cpu)",
    "vllm.v1.worker.gpu_input_batch:InputBatch.token_ids_cpu",
    "vllm.v1.worker.gpu_input_batch:InputBatch.num_prompt_tokens",
    "vllm.v1.worker.gpu_input_batch:InputBatch.req_ids",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState(sampling_params)",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.discard_request_mask",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.effective_drafter_max_model_len",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.input_batch",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.max_model_len",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.rejection_sampler",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.requests",
    "vllm.v1.kv_cache_interface:KVCacheConfig(kv_cache_groups)",
    "vllm.v1.sample.rejection_sampler:RejectionSampler.sampler",
    "vllm.v1.sample.sampler:Sampler.forward(logits, sampling_metadata, predict_bonus_token)",
    "vllm.v1.sample.metadata:SamplingMetadata(spec_token_ids)",
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata(num_draft_tokens, bonus_logits_indices)",
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata.max_spec_len",
    "vllm.v1.attention.backend:AttentionBackend.forward_includes_kv_cache_update",
    "vllm.model_executor.layers.attention.attention:unified_kv_cache_update(key, value, layer_name)",
    "vllm.model_executor.layers.attention.attention:Attention.attn_backend",
    "vllm.model_executor.layers.attention.attention:Attention.layer_name",
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.quant_method",
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.shard_indices",
    "vllm.model_executor.layers.logits_processor:LogitsProcessor.get_top_tokens(lm_head, hidden_states)",
    "vllm.model_executor.models.llama:LlamaAttention.qkv_proj",
    "vllm.model_executor.models.llama:LlamaAttention.rotary_emb",
    "vllm.model_executor.models.llama:LlamaAttention.attn",
    "vllm.model_executor.models.llama:LlamaAttention.head_dim",
    "vllm.model_executor.models.llama:LlamaAttention.kv_size",
    "vllm.model_executor.models.llama:LlamaAttention.num_kv_heads",
    "vllm.model_executor.models.llama:LlamaAttention.q_size",
)
# The same for the V2 model runner, which loads the head by itself. Only looked up in sources: of the V2 runner
# nothing but its loader has run here, and a name that it lacks ends in an error of its own.
RELIED_ON_BY_V2 = (
    "vllm.v1.worker.gpu.spec_decode.eagle.utils:load_eagle_model(target_model, vllm_config)",
    "vllm.v1.worker.gpu.spec_decode.eagle.speculator:EagleSpeculator",
)
