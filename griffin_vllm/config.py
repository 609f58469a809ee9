"""What a draft head is: its sizes, and the two ``config.json`` layouts that describe it.

*Reference layout*: what the GRIFFIN authors publish, a plain ``llama`` or ``qwen2`` config with one
layer; nothing in it says GRIFFIN. *Served layout*: ours, a speculators-format config that vLLM reads
by itself and that also names the target, the recommended K and the trained context length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from griffin_vllm.errors import GriffinError
from griffin_vllm.files import read_json

METHOD = "griffin"
ARCHITECTURE = "GriffinForCausalLM"
# What of a served head's config the proposer asks for, beyond what vLLM itself reads.
DRAFTING_SETTINGS = ("draft_stop_probability", "prompt_lookup_min", "draft_context_limit")
# What can be trained; HASS trains an EAGLE head. Only GRIFFIN heads are served by this package.
HeadKind = Literal["griffin", "eagle"]
REFERENCE_MODEL_TYPES = ("llama", "qwen2")
# Targets (Hugging Face model types) of which training and serving hand a head the same three things:
# - e(x), the row of `embed_tokens` as it is stored. Gemma multiplies it by sqrt(d) on the way to its own first
#   layer; a head does not: its `fc` learns any scale and its norm ignores it, and the stored row is what
#   vLLM shares with a draft model.
# - f, the final normalised hidden state.
# - the logits of f or predict: the product with `lm_head` (tied or not; Gemma 2 has its embeddings only), then
#   the soft cap of Gemma 2. Families that also scale their logits (Granite, Cohere) are left out.
TARGET_FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3")


class HeadConfig(BaseModel):
    """Sizes and provenance of one draft head. Sizes always come from the head, never from its target.

    The field names of the sizes are those of a Hugging Face ``LlamaConfig``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt = Field(description="the target's vocabulary")
    draft_vocab_size: PositiveInt = Field(description="tokens the head can draft; vocab_size means all")
    max_position_embeddings: PositiveInt = 2048
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    qkv_bias: bool = False
    target: str | None = Field(
        default=None, description="folder or Hub id of the target that it was trained for"
    )
    target_model_type: str | None = Field(
        default=None, description="that target's model type, one of TARGET_FAMILIES; None: not known"
    )
    num_speculative_tokens: PositiveInt = Field(default=5, description="recommended K")
    draft_sample_method: Literal["greedy", "probabilistic"] = Field(
        default="greedy", description="recommended way of drafting at a temperature"
    )
    trained_context_length: PositiveInt | None = None
    draft_stop_probability: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="stop drafting when the drafts so far, the head's or looked up, are all right with less than "
        "this probability",
    )
    prompt_lookup_min: NonNegativeInt = Field(
        default=0,
        description="draft what followed in the text so far where its last tokens, as many as this, stood "
        "before; 0: the head makes all drafts",
    )
    draft_context_limit: PositiveInt | None = Field(
        default=None,
        description="tokens of context beyond which a request gets no drafts; None: it always gets them",
    )

    @property
    def drafts_all_tokens(self) -> bool:
        """Whether it has no draft vocabulary of its own."""
        return self.draft_vocab_size == self.vocab_size

    @classmethod
    def read(cls, path: Path) -> HeadConfig:
        """Read ``path`` (a ``config.json`` of either layout).

        Raises:
            GriffinError: the file is missing, is not JSON, or describes no GRIFFIN head.
        """
        raw = read_json(path)
        if "speculators_model_type" in raw:
            return cls._from_served(raw, path)
        return cls._from_reference(raw, path)

    def to_served(self) -> dict[str, Any]:
        """The served layout's JSON object (format of the ``speculators`` project, as vLLM's
        ``transformers_utils/configs/speculators/base.py`` reads it)."""
        return {
            "architectures": [ARCHITECTURE],
            "speculators_model_type": METHOD,
            "speculators_config": {
                "algorithm": METHOD,
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": self.num_speculative_tokens}
                ],
                "verifier": {"name_or_path": self.target, "architectures": []},
            },
            "transformer_layer_config": self.layer_config("llama"),
            "draft_vocab_size": self.draft_vocab_size,
            "target_model_type": self.target_model_type,
            "trained_context_length": self.trained_context_length,
            "draft_sample_method": self.draft_sample_method,
            **{name: getattr(self, name) for name in DRAFTING_SETTINGS},
            "torch_dtype": "bfloat16",
        }

    def layer_config(self, model_type: str) -> dict[str, Any]:
        """A one-layer Hugging Face config of ``model_type`` with this head's sizes."""
        return {
            "model_type": model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": 1,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "qkv_bias": self.qkv_bias,
            "tie_word_embeddings": False,
        }

    def check_target(self, where: Path, family: str, hidden_size: int, vocab_size: int) -> None:
        """Raise GriffinError unless this head (config at ``where``) fits a target of this model type and sizes."""
        check_family("target", family)
        if self.target_model_type not in (None, family):
            raise GriffinError.at(
                where, "target_model_type", self.target_model_type, f"{family!r} (the target's model_type)"
            )
        for name, found, expected in (
            ("hidden_size", self.hidden_size, hidden_size),
            ("vocab_size", self.vocab_size, vocab_size),
        ):
            if found != expected:
                raise GriffinError.at(where, name, found, f"{expected} (the target's)")

    @classmethod
    def _from_served(cls, raw: dict[str, Any], path: Path) -> HeadConfig:
        kind = raw["speculators_model_type"]
        if kind != METHOD:
            raise GriffinError.at(path, "speculators_model_type", kind, repr(METHOD))
        layer = raw.get("transformer_layer_config")
        if not isinstance(layer, dict):
            raise GriffinError.at(path, "transformer_layer_config", layer, "an object with the head's sizes")
        try:
            speculators = raw["speculators_config"]
            provenance = {
                "target": speculators["verifier"]["name_or_path"],
                "num_speculative_tokens": speculators["proposal_methods"][0]["speculative_tokens"],
                "target_model_type": raw.get("target_model_type"),
                "trained_context_length": raw.get("trained_context_length"),
                "draft_sample_method": raw.get("draft_sample_method", "greedy"),
                **{name: raw.get(name, cls.model_fields[name].default) for name in DRAFTING_SETTINGS},
            }
        except (KeyError, IndexError, TypeError) as error:
            raise GriffinError.at(
                path,
                "speculators_config",
                raw.get("speculators_config"),
                "an object with verifier.name_or_path and proposal_methods[0].speculative_tokens",
            ) from error
        draft_vocab_size = raw.get("draft_vocab_size")
        if draft_vocab_size is None:
            draft_vocab_size = layer.get("vocab_size")
        return cls._build(layer, path, draft_vocab_size=draft_vocab_size, **provenance)

    @classmethod
    def _from_reference(cls, raw: dict[str, Any], path: Path) -> HeadConfig:
        if "medusa_num_heads" in raw:
            raise GriffinError.at(
                path,
                "medusa_num_heads",
                raw["medusa_num_heads"],
                "a GRIFFIN head (vLLM's method is 'medusa')",
            )
        model_type = raw.get("model_type", "llama")
        if model_type not in REFERENCE_MODEL_TYPES:
            raise GriffinError.at(path, "model_type", model_type, f"one of {REFERENCE_MODEL_TYPES}")
        if raw.get("num_hidden_layers") != 1:
            raise GriffinError.at(
                path,
                "num_hidden_layers",
                raw.get("num_hidden_layers"),
                "1 (a GRIFFIN head is one decoder layer; is this a whole model?)",
            )
        return cls._build(raw, path, draft_vocab_size=raw.get("vocab_size"))

    @classmethod
    def _build(cls, layer: dict[str, Any], path: Path, **rest: Any) -> HeadConfig:
        if layer.get("hidden_act", "silu") != "silu":
            raise GriffinError.at(path, "hidden_act", layer["hidden_act"], "'silu'")
        heads = layer.get("num_attention_heads")
        fields: dict[str, Any] = {
            name: layer[name] for name in cls.model_fields if layer.get(name) is not None and name not in rest
        }
        fields.setdefault("num_key_value_heads", heads)
        fields["rope_theta"] = _rope_theta(layer, path)
        if "head_dim" not in fields and isinstance(heads, int) and heads > 0:
            hidden = layer.get("hidden_size")
            if isinstance(hidden, int):
                if hidden % heads:
                    raise GriffinError.at(
                        path, "hidden_size", hidden, f"a multiple of num_attention_heads={heads}"
                    )
                fields["head_dim"] = hidden // heads
        try:
            config = cls(**fields, **rest)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "missing":
                field = ".".join(map(str, first["loc"]))
                raise GriffinError(f"{path}: {field} is missing, expected one of the head's sizes") from error
            raise GriffinError.invalid(path, first) from error
        return config.checked(path)

    def checked(self, path: str | Path) -> HeadConfig:
        """This config, unless its sizes (from ``path``) contradict each other: then GriffinError."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise GriffinError.at(
                path,
                "num_key_value_heads",
                self.num_key_value_heads,
                f"a divisor of num_attention_heads={self.num_attention_heads}",
            )
        if self.head_dim % 2:
            raise GriffinError.at(path, "head_dim", self.head_dim, "an even number (rotary embedding)")
        if self.draft_vocab_size > self.vocab_size:
            raise GriffinError.at(
                path, "draft_vocab_size", self.draft_vocab_size, f"at most vocab_size={self.vocab_size}"
            )
        return self


def check_family(where: str | Path, family: str) -> None:
    """Raise GriffinError unless a target of model type ``family`` (its own, not its text model's) can have a head."""
    if family not in TARGET_FAMILIES:
        raise GriffinError.at(
            where, "model_type", family, f"a text model of one of the families {', '.join(TARGET_FAMILIES)}"
        )


def target_sizes(config: dict[str, Any], where: str | Path) -> tuple[str, int, int]:
    """Model type, hidden size and vocabulary size of a target, from its ``config.json``.

    Raises:
        GriffinError: one of them is missing; ``where`` names the target.
    """
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise GriffinError.at(where, "text_config", text, "an object")
    try:
        return config["model_type"], text["hidden_size"], text["vocab_size"]
    except KeyError as error:
        raise GriffinError(f"{where}: its config.json has no {error}, so it is not a model") from error


def _rope_theta(layer: dict[str, Any], path: Path) -> float:
    """Rotary base; 10000 where the config is silent, as in the reference.

    The reference's scaled variants ignore the base and no published head uses them, so they are refused.
    """
    scaling = layer.get("rope_scaling")
    parameters = layer.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        expected = "an object of the one layer's values (none by layer type)"
        raise GriffinError.at(path, "rope_parameters", parameters, expected)
    if isinstance(scaling, dict) and _rope_type(scaling) == "default":
        scaling = None
    if scaling is not None or _rope_type(parameters) != "default":
        found = scaling or _rope_type(parameters)
        raise GriffinError.at(path, "rope_scaling", found, "null (scaled rotary is not supported)")
    partial = parameters.get("partial_rotary_factor", layer.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise GriffinError.at(
            path, "partial_rotary_factor", partial, "1 (all of a head's dimensions are rotated)"
        )
    theta = parameters.get("rope_theta", layer.get("rope_theta"))
    return 10000.0 if theta is None else theta


def _rope_type(parameters: dict[str, Any]) -> Any:
    return parameters.get("rope_type", parameters.get("type", "default"))
