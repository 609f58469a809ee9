"""The folder of one run: it belongs to the settings, the data and the weights that the run was begun with."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from griffin_vllm.bf16 import multiplies_bf16
from griffin_vllm.checkpoint import Head, weights_digest
from griffin_vllm.files import (
    check_same,
    make_folder,
    only_process_in,
    read_json,
    write_whole,
)
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import dataset_digest
from griffin_vllm.training.features import target_config_digest, target_digest
from griffin_vllm.training.training_state import latest_checkpoint

SETTINGS, INPUTS, CHECKPOINTS, HEAD = "config.json", "inputs.json", "checkpoints", "head"
REMEDY = "name another output folder"
# What may differ when a run goes on: the weights that it ends with do not depend on it.
MAY_CHANGE = {"output", "validate_every", "validation_samples", "checkpoint_minutes"}


def with_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """``config`` with the precision that ``auto`` means: that of the run in ``output``, else the faster one.

    A run that goes on with another machine keeps its precision, which may be the slower one there.
    """
    if config.precision != "auto":
        return config
    before = _settings_before(config)
    faster = "bf16" if multiplies_bf16(device) else "fp32"
    return config.model_copy(update={"precision": faster if before is None else before.precision})


def check_output(config: TrainConfig, start: Head | None = None) -> dict[str, str | None]:
    """Refuse an ``output`` that holds a run with other settings (but for ``MAY_CHANGE``) or other inputs, unless that
    run never trained a step; nothing is written into it. Returns the digests of this run's inputs.

    ``start``: the head of ``init_from``. Paths may change where digests tell that what lies behind them is the same. A
    folder that does not say its inputs, as older ones do not, is taken at its settings' word.

    Raises:
        GriffinError: another run's folder (the first difference is named), or it cannot be written.
    """
    path, inputs = config.output / SETTINGS, config.output / INPUTS
    found = input_digests(config, start)
    before = _settings_before(config)
    if before is not None:
        stored = read_json(inputs) if inputs.is_file() else {}
        may_change = MAY_CHANGE | _paths_that_may_change(before, config, stored, found)
        old, new = (one.model_dump(mode="json", exclude=may_change) for one in (before, config))
        check_same(path, old, new, REMEDY)
        # a digest that is younger than the run is not among those that it has stored
        check_same(inputs, stored, {name: digest for name, digest in found.items() if name in stored}, REMEDY)
    if not (config.output / HEAD).is_dir():
        make_folder(config.output)
    return found


def claim_output(config: TrainConfig, start: Head | None = None) -> None:
    """Make ``output`` this run's folder, which ``check_output`` allows; that of a finished run is left as it is.

    Raises:
        GriffinError: it does not, or the folder cannot be written.
    """
    found = check_output(config, start)
    if (config.output / HEAD).is_dir():
        return
    write_whole(config.output / SETTINGS, json.dumps(config.model_dump(mode="json"), indent=2))
    write_whole(config.output / INPUTS, json.dumps(found, indent=2))


def only_run_in(output: Path) -> AbstractContextManager[None]:
    """Keep every other process from training in ``output`` meanwhile.

    Raises:
        GriffinError: one is doing that, or the folder cannot be written.
    """
    return only_process_in(output, "another run is training in it")


def _settings_before(config: TrainConfig) -> TrainConfig | None:
    """The settings of the run in ``output``; None where no run has trained a step there."""
    path = config.output / SETTINGS
    trained = latest_checkpoint(config.output / CHECKPOINTS) or (config.output / HEAD).is_dir()
    # a setting that is younger than the run has its default there
    return TrainConfig.check(read_json(path), path) if trained and path.is_file() else None


def _paths_that_may_change(
    before: TrainConfig, now: TrainConfig, stored: dict[str, Any], found: dict[str, str | None]
) -> set[str]:
    """Settings that are paths to what the digests in ``stored`` and ``found`` tell apart."""
    names = {name for name, digest in found.items() if None not in (digest, stored.get(name))}
    # a cache is checked against data and target whenever it is opened; with none the features are not rounded
    if names >= {"data", "target"} and None not in (before.features, now.features):
        names.add("features")
    return names


def input_digests(config: TrainConfig, start: Head | None) -> dict[str, str | None]:
    """Digests of what lies behind the settings' paths; the path stays when data are prepared anew."""
    return {
        "data": dataset_digest(config.data),
        "target": target_digest(config.target),
        "target_config": target_config_digest(config.target),
        "init_from": None if start is None else weights_digest(start.weights),
    }
