"""The folder of one run: it belongs to the settings, the data and the weights that the run was begun with."""

from __future__ import annotations

import json

import torch

from griffin_vllm.bf16 import multiplies_bf16
from griffin_vllm.checkpoint import Head, weights_digest
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import check_same, read_json, write_whole
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import dataset_digest
from griffin_vllm.training.features import target_digest

SETTINGS, INPUTS = "config.json", "inputs.json"
REMEDY = "name another output folder"
# What may differ when a run goes on: the weights that it ends with do not depend on it.
MAY_CHANGE = {"validate_every", "validation_samples", "checkpoint_minutes"}


def with_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """``config`` with the precision that ``auto`` means: that of the run in ``output``, else the faster one.

    A run that goes on with another machine keeps its precision, which may be the slower one there.
    """
    if config.precision != "auto":
        return config
    before = _settings_before(config)
    faster = "bf16" if multiplies_bf16(device) else "fp32"
    return config.model_copy(update={"precision": faster if before is None else before.precision})


def claim_output(config: TrainConfig, start: Head | None = None) -> None:
    """Make ``output`` this run's folder; a folder of a run with other settings (but for ``MAY_CHANGE``) or other
    inputs is refused.

    ``start``: the head of ``init_from``. A folder that does not say its inputs, as older ones do not, is taken at its
    settings' word.

    Raises:
        GriffinError: another run's folder (the first difference is named), or it cannot be written.
    """
    path = config.output / SETTINGS
    before = _settings_before(config)
    if before is not None:
        old, new = (one.model_dump(mode="json", exclude=MAY_CHANGE) for one in (before, config))
        check_same(path, old, new, REMEDY)
    found = _inputs(config, start)
    inputs = config.output / INPUTS
    if inputs.is_file():
        check_same(inputs, read_json(inputs), found, REMEDY)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GriffinError(f"{config.output}: cannot be written ({GriffinError.reason(error)})") from error
    if before != config:
        write_whole(path, json.dumps(config.model_dump(mode="json"), indent=2))
    if not inputs.is_file():
        write_whole(inputs, json.dumps(found, indent=2))


def _settings_before(config: TrainConfig) -> TrainConfig | None:
    path = config.output / SETTINGS
    # a setting that is younger than the run has its default there
    return TrainConfig.check(read_json(path), path) if path.is_file() else None


def _inputs(config: TrainConfig, start: Head | None) -> dict[str, str | None]:
    """Digests of what lies behind the settings' paths; the path stays when data are prepared anew."""
    return {
        "data": dataset_digest(config.data),
        "target": target_digest(config.target),
        "init_from": None if start is None else weights_digest(start.weights),
    }
