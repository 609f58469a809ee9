"""The trainer's settings: documentation, validation, YAML file and command line in one place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from griffin_vllm.config import HeadConfig, HeadKind
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.alignment import AlignmentRule
from griffin_vllm.training.attention import AttentionName

Method = Literal["griffin", "hass", "eagle"]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
PRESETS = Path(__file__).parent / "presets"

METHODS: dict[Method, tuple[HeadKind, AlignmentRule]] = {
    "griffin": ("griffin", "reference"),
    "hass": ("eagle", "off"),
    "eagle": ("eagle", "off"),
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Stage(Section):
    """One stage of training; each continues from the weights of the one before."""

    draft_steps: PositiveInt = Field(description="draft steps trained at once")
    epochs: PositiveFloat = Field(default=1.0, description="passes over the data; fractions are allowed")
    k_weight: NonNegativeFloat = Field(
        default=None,
        validate_default=True,
        description="weight of the top-10 cross entropy in this stage; null: 0 with one draft step, else 0.5",
    )
    learning_rate: PositiveFloat | None = Field(
        default=None,
        description="the stage's own peak, with a warm-up and a schedule over its own steps; null: the run's",
    )

    @field_validator("k_weight", mode="before")
    @classmethod
    def _none_with_one_draft_step(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        return 0.0 if info.data.get("draft_steps") == 1 else 0.5


def default_stages(method: Any) -> tuple[Stage, ...]:
    """Stages of one, two and three draft steps; EAGLE has the first alone."""
    return tuple(Stage(draft_steps=n) for n in range(1, 2 if method == "eagle" else 4))


class TrainConfig(Section):
    """Settings of ``griffin train``. Every field can be given in the YAML file or as ``--field value``
    (``--stages.0.epochs 2`` for nested ones)."""

    target: Path = Field(description="folder or Hub id of the target model")
    target_name: str | None = Field(
        default=None,
        description="Hub id or folder that the finished head names as its target; by default `target`",
    )
    data: Path = Field(description="data set written by `griffin data prepare`")
    output: Path = Field(description="folder for checkpoints, logs and the finished head")
    features: Path | None = Field(
        None, description="folder for cached target features; without it the target runs in the loop"
    )
    init_from: str | None = Field(
        None, description="continue from a head of the kind that is trained: bundled name, folder or Hub id"
    )

    method: Method = Field(
        "griffin", description="griffin, hass (EAGLE head, multi-step) or eagle (one step)"
    )
    head: HeadKind | None = Field(None, description="head to train; by default the method's own")
    alignment: AlignmentRule | None = Field(
        None, description="alignment mask: off, reference or causal; by default the method's own"
    )
    align_top_k: PositiveInt = Field(3, description="a draft is aligned when the true token is in its top k")
    stages: tuple[Stage, ...] = Field(
        default=None,
        validate_default=True,
        min_length=1,
        description="trained one after the other; method eagle has the first of the default ones",
    )
    detach: bool = Field(True, description="cut the gradient between draft steps, as the reference does")
    v_weight: NonNegativeFloat = Field(1.0, description="weight of the feature regression loss")
    p_weight: NonNegativeFloat = Field(0.1, description="weight of the full cross entropy")
    step_decay: PositiveFloat = Field(1.0, description="weight of draft step n is step_decay ** (n - 1)")
    noise: NonNegativeFloat = Field(
        0.2, description="width of the uniform noise on input features at T = 512"
    )

    intermediate_size: PositiveInt | None = Field(None, description="by default the target's")
    num_key_value_heads: PositiveInt | None = Field(None, description="by default the target's")
    draft_vocab: PositiveInt | None = Field(
        None,
        description="draft only so many tokens, those that the answers in the data use most; null: what "
        "`init_from` drafts, or the whole vocabulary",
    )

    batch_tokens: PositiveInt = Field(
        2048, description="positions of one optimiser step, all processes together"
    )
    gradient_accumulation: PositiveInt = Field(1, description="micro-batches an optimiser step")
    learning_rate: PositiveFloat = Field(3e-4, description="peak learning rate of AdamW")
    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.95), description="AdamW's decay rates of its two averages"
    )
    weight_decay: NonNegativeFloat = Field(0.01, description="AdamW's decay of the weights")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of all steps spent warming up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the rate goes on behind the warm-up: down to zero, or not at all"
    )
    clip_norm: PositiveFloat | None = Field(1.0, description="clip the gradient's norm")
    clip_value: PositiveFloat | None = Field(
        None, description="clip each gradient entry (the reference: 0.5)"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="of matrix products; weights are float32. auto: bf16 unless the device only emulates it",
    )
    attention: AttentionName = Field(
        "auto", description="auto, torch or xformers (CUDA only, where torch takes more memory)"
    )
    soft_target_tokens: PositiveInt | None = Field(
        32, description="the target's most likely tokens that make a soft target; null: the whole vocabulary"
    )
    sampled_tokens: PositiveInt | None = Field(
        None,
        description="normalise the draft distribution over the batch's own tokens and this many sampled ones; "
        "null: the whole vocabulary",
    )
    loops: Literal["keep", "drop"] = Field(
        "keep", description="what to do with answers that repeat themselves"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, order, noise and sampled tokens")

    num_speculative_tokens: PositiveInt | None = Field(
        None, description="K for validation and for the served head; null: that of `init_from`, or 5"
    )
    validation_samples: PositiveInt = Field(
        64, description="validation samples for the simulated acceptance, of an answer or more"
    )
    validate_every: PositiveInt = Field(500, description="optimiser steps between validations")
    checkpoint_minutes: PositiveFloat = Field(5.0, description="minutes between checkpoints")

    @field_validator("target", "data", "output", "features")
    @classmethod
    def _at_home(cls, value: Path | None) -> Path | None:
        # no shell does it in a YAML file, nor behind `--output=`
        return value and Path(os.path.expanduser(value))

    @field_validator("alignment", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        # YAML reads a bare `off` as false
        return "off" if value is False else value

    @field_validator("stages", mode="before")
    @classmethod
    def _stages_of_the_method(cls, value: Any, info: ValidationInfo) -> Any:
        return default_stages(info.data.get("method")) if value is None else value

    @property
    def head_kind(self) -> HeadKind:
        return self.head or METHODS[self.method][0]

    @property
    def alignment_rule(self) -> AlignmentRule:
        return self.alignment or METHODS[self.method][1]

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file and apply command-line ``overrides`` (``--a.b value`` or ``--a.b=value``).

        ``preset``, in the file or among the overrides, names a file of ``presets/`` whose values the file builds on.

        Raises:
            GriffinError: unreadable, not YAML (with the line), an unknown option (with the nearest name),
                or a value of the wrong kind.
        """
        values = read_yaml(path)
        given = parse_overrides(overrides)
        preset = dict(given).get("preset", values.pop("preset", None))
        if preset is not None:
            values = {**read_preset(str(preset)), **values}
        for key, value in given:
            if key == "preset":
                continue
            if key.startswith("stages."):
                stages = default_stages(dict(given).get("method", values.get("method")))
                values.setdefault("stages", [stage.model_dump(exclude_unset=True) for stage in stages])
            set_nested(values, key, value)
        return cls.check(values, path)

    @classmethod
    def check(cls, values: dict[str, Any], path: Path) -> TrainConfig:
        """The settings in ``values``; GriffinError names what is wrong with them and ``path``, where they stand."""
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            # a misspelt option before the one that is missing for it
            unknown = ("extra_forbidden", "invalid_key")
            first = min(error.errors(), key=lambda one: one["type"] not in unknown)
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "missing":
                raise GriffinError(f"{path}: {name} is missing") from error
            if first["type"] in unknown:
                known = cls.model_fields if len(first["loc"]) == 1 else Stage.model_fields
                near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise GriffinError(f"{path}: unknown option {name!r}{hint}") from error
            raise GriffinError.invalid(path, first) from error
        if config.method == "eagle" and any(stage.draft_steps > 1 for stage in config.stages):
            raise GriffinError.at(
                path, "stages", "more than one draft step", "one (method eagle; hass has more)"
            )
        if config.draft_vocab is not None and config.head_kind == "eagle":
            raise GriffinError.at(
                path,
                "draft_vocab",
                config.draft_vocab,
                "null (vLLM's eagle method drafts the whole vocabulary)",
            )
        if config.num_speculative_tokens is None and config.init_from is None:
            recommended = HeadConfig.model_fields["num_speculative_tokens"].default
            return config.model_copy(update={"num_speculative_tokens": recommended})
        return config


def read_preset(name: str) -> dict[str, Any]:
    """The settings that a preset has; GriffinError if there is none of that name."""
    known = presets()
    if name not in known:
        raise GriffinError.at("preset", "name", name, f"one of {sorted(known)}")
    return read_yaml(known[name])


def presets() -> dict[str, Path]:
    """Files of the presets by name."""
    return {path.stem: path for path in PRESETS.glob("*.yaml")}


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings in a YAML file; GriffinError if it cannot be read or holds something else."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise GriffinError(f"{path}: cannot be read ({GriffinError.reason(error)})") from error
    except UnicodeDecodeError as error:
        raise GriffinError(f"{path}: is not UTF-8 text ({error})") from error
    if not isinstance(values, dict):
        raise GriffinError.at(path, "top level", type(values).__name__, "settings, one `name: value` a line")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """The value in ``text``; what is wrong with it is said of ``where``, with the line."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or GriffinError.reason(error)
        raise GriffinError(f"{where}: {line}is not valid YAML ({reason})") from error
    except (ValueError, RecursionError) as error:  # a number that is none; nested without end
        raise GriffinError(f"{where}: is not valid YAML ({GriffinError.reason(error)})") from error


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """``--name value`` and ``--name=value`` pairs, values read as YAML; dashes in names are underscores.

    Raises:
        GriffinError: something that is no option, has no value, or is not YAML.
    """
    pairs, rest = [], list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise GriffinError(f"{option!r} is not an option; write --name value")
        name, equals, value = option[2:].partition("=")
        if not equals:
            if not rest:
                raise GriffinError(f"--{name} has no value")
            value = rest.pop(0)
        pairs.append((name.replace("-", "_"), parse_yaml(value, f"--{name}")))
    return pairs


def set_nested(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``stages.0.epochs`` and the like in place; GriffinError if ``values`` has no such place."""
    *parents, last = key.split(".")
    place: Any = values
    try:
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise GriffinError(f"--{key}: is not among the settings") from error


def describe_settings() -> list[tuple[str, str, str]]:
    """Name, default and meaning of every setting, for the command line's help."""
    rows = [("--preset", "none", f"known settings that the file builds on: {', '.join(sorted(presets()))}")]
    for name, info in TrainConfig.model_fields.items():
        rows.append(_described(f"--{name}", info))
        if name == "stages":
            rows += [_described(f"--stages.N.{part}", of) for part, of in Stage.model_fields.items()]
    return rows


def shown_stages(stages: Sequence[Stage]) -> str:
    return "; ".join(f"{stage.draft_steps} draft step(s), {stage.epochs:g} epoch(s)" for stage in stages)


def _described(option: str, info: FieldInfo) -> tuple[str, str, str]:
    default = info.default
    if info.is_required():
        default = "(required)"
    elif option == "--stages":
        default = shown_stages(default_stages("griffin"))
    return option, str(default), info.description or ""
