"""What `griffin tune` writes and the plugin reads: the number of drafts that pays, by batch size.

A tuning holds for the head, machine, vLLM and precision that it was measured with.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from griffin_vllm.checkpoint import TUNING_FILE, Head, weights_digest
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import check_write_whole, write_whole

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Names the file instead, where the head's folder cannot be written, say.
TUNING_VARIABLE = "GRIFFIN_TUNING"

# The key of vLLM's speculative config, and its value: [smallest batch, largest batch, draft tokens] each.
SCHEDULE = "num_speculative_tokens_per_batch_size"
Schedule = list[tuple[int, int, int]]


class Point(BaseModel):
    """One measurement: milliseconds of a round, tokens a request and round (over all batch sizes measured in the same
    way), tokens a second of the batch as they were counted."""

    batch_size: PositiveInt
    num_speculative_tokens: NonNegativeInt
    step_ms: PositiveFloat
    acceptance_length: PositiveFloat
    tokens_per_second: PositiveFloat


class Tuning(BaseModel):
    """What ``tuning.json`` holds. ``schedule`` is vLLM's ``num_speculative_tokens_per_batch_size``;
    ``draft_stop_probability`` takes the place of the head's own; ``precision`` is the target's (:func:`precision`).
    Of one request ``points`` have rounds with all K drafts of the head's, ``alone_as_served`` the chosen K and 0 with
    early stops and lookup."""

    model_config = ConfigDict(extra="forbid")

    machine: str
    vllm: str
    target: str
    weights: str
    precision: str
    points: list[Point]
    alone_as_served: list[Point] = []
    num_speculative_tokens: PositiveInt
    schedule: Schedule
    draft_stop_probability: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _schedule_can_be(self) -> Tuning:
        """As vLLM's scheduler wants it, which would look at it when the model has been loaded."""
        from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

        validate_and_normalize_dynamic_sd_schedule(list(self.schedule))
        most = max(k for _, _, k in self.schedule)
        if most > self.num_speculative_tokens:
            raise ValueError(
                f"its schedule has {most} draft tokens, its num_speculative_tokens is {self.num_speculative_tokens}"
            )
        return self

    def speculative_config(self) -> dict[str, Any]:
        """The keys of vLLM's speculative config that this tuning sets."""
        found: dict[str, Any] = {"num_speculative_tokens": self.num_speculative_tokens}
        if {k for _, _, k in self.schedule} != {self.num_speculative_tokens}:
            found[SCHEDULE] = self.schedule
        return found


def untuned_schedule(k: int) -> Schedule:
    """What a CPU drafts until `griffin tune` has measured it, with ``k`` drafts for a request that is alone.

    Several requests share a target pass, whose products are then no longer nearly free: each draft soon costs more than
    it gives. Of six tunings of the demo target (``benchmarks/results/tuning.json`` and its history; AVX2 and AVX-512,
    float32 and bfloat16) all gained with this up to four requests, and most with none beyond.
    """
    return [(1, 1, k), (2, 2, min(k, 2)), (3, 4, 1), (5, 5, 0)]


def predicted_speed(point: Point) -> float:
    """Tokens a second of the batch by the cost model."""
    return 1000 * point.batch_size * point.acceptance_length / point.step_ms


def tuning_file(head: Head) -> Path:
    """Where the tuning of ``head`` is: what ``GRIFFIN_TUNING`` names, or ``tuning.json`` beside it."""
    named = os.environ.get(TUNING_VARIABLE)
    return Path(named).expanduser() if named else head.folder / TUNING_FILE


def read_tuning(head: Head, precision: str) -> Tuning | None:
    """The tuning of ``head``, unless it was made for other weights, another machine, vLLM or ``precision``.

    Raises:
        GriffinError: the file is damaged, or missing though ``GRIFFIN_TUNING`` names it.
    """
    path = tuning_file(head)
    try:
        if not path.is_file():
            if path == head.folder / TUNING_FILE:
                return None
            raise GriffinError.at(
                "environment", TUNING_VARIABLE, str(path), "a file that `griffin tune --out` wrote"
            )
        tuning = Tuning.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise GriffinError(
            f"{path}: is not a tuning ({GriffinError.reason(error)}); delete it or run `griffin tune`"
        ) from error
    ours = (machine(), vllm_version(), weights_digest(head.weights), precision)
    return tuning if (tuning.machine, tuning.vllm, tuning.weights, tuning.precision) == ours else None


def write_tuning(path: Path, tuning: Tuning) -> None:
    """Write ``path`` whole or not at all.

    Raises:
        GriffinError: it cannot be written.
    """
    write_whole(path, tuning.model_dump_json(indent=2) + "\n")


def check_writable(path: Path) -> None:
    """Raise GriffinError if ``write_tuning`` could not write ``path``; a file that is there stays as it is."""
    try:
        check_write_whole(path)
    except GriffinError as error:
        raise GriffinError(f"{error}; see --out") from error


def machine() -> str:
    """The machine that a tuning holds for: device, processor and cores."""
    from vllm.platforms import current_platform

    return f"{current_platform.get_device_name()}, {processor()}, {usable_cores()} cores"


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def precision(target: ModelConfig) -> str:
    """What ``target`` multiplies in: its dtype, and how it is quantised."""
    dtype = str(target.dtype).removeprefix("torch.")
    return f"{dtype}, {target.quantization}" if target.quantization else dtype


def processor() -> str:
    """The processor's name, as far as the system tells it, and its vector instructions as PyTorch calls them: clouds
    have very different processors of one name."""
    from torch.backends.cpu import get_cpu_capability

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {get_cpu_capability()}"


def vllm_version() -> str:
    import vllm

    return vllm.__version__
