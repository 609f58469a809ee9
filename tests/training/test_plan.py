"""The optimiser steps of a run: which samples, and at what rate."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.plan import learning_rate, plan_steps
from tests.training.tiny import settings


def test_learning_rate_warms_up_and_anneals_to_zero() -> None:
    config = settings(Path("t"), Path("d"), Path("o"), warmup=0.1)
    rates = [learning_rate(config, config.learning_rate, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(config.learning_rate / 10)
    assert max(rates) == pytest.approx(config.learning_rate)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01 * config.learning_rate


def test_stage_with_a_rate_of_its_own_warms_up_and_anneals_by_itself(data: Path) -> None:
    peaks = {1: 5e-5, 2: 3e-5}
    stages = [{"draft_steps": n, "epochs": 10, "learning_rate": peak} for n, peak in peaks.items()]
    config = settings(Path("t"), data, Path("o"), stages=stages, warmup=0.1)
    plan = plan_steps(TokenDataset(data, "train"), config)
    for n, peak in peaks.items():
        rates = [step.learning_rate for step in plan if step.stage.draft_steps == n]
        assert rates == [learning_rate(config, peak, i, len(rates)) for i in range(len(rates))]
        assert max(rates) == pytest.approx(peak)


def test_stages_without_a_rate_share_one_schedule(data: Path) -> None:
    config = settings(Path("t"), data, Path("o"))
    rates = [step.learning_rate for step in plan_steps(TokenDataset(data, "train"), config)]
    assert rates == [learning_rate(config, config.learning_rate, i, len(rates)) for i in range(len(rates))]


def test_gradient_accumulation_splits_a_batch_of_the_same_size(data: Path) -> None:
    tokens = TokenDataset(data, "train")
    step = plan_steps(tokens, settings(Path("t"), data, Path("o"), gradient_accumulation=2))[0]
    assert len(step.micro_batches) == 2
    assert sum(int(tokens.lengths[i]) for part in step.micro_batches for i in part) <= 256


def test_answers_that_loop_are_left_out_of_every_epoch_and_half_an_epoch_is_half_of_the_steps(
    data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    looping = np.load(copy / "train.loops.npy")
    looping[:] = False
    looping[[0, 3]] = True
    np.save(copy / "train.loops.npy", looping)
    tokens = TokenDataset(copy, "train")

    def planned(epochs: float, loops: str) -> list[list[int]]:
        stages = [{"draft_steps": 1, "epochs": epochs}]
        config = settings(Path("t"), copy, Path("o"), stages=stages, loops=loops, batch_tokens=100)
        return [[i for part in step.micro_batches for i in part] for step in plan_steps(tokens, config)]

    whole = planned(1, "drop")
    everything = set(range(len(tokens)))
    assert sorted(i for step in whole for i in step) == sorted(everything - {0, 3})
    assert {i for step in planned(1, "keep") for i in step} == everything
    assert len(planned(0.5, "drop")) == round(len(whole) / 2)
    assert len(planned(1.5, "drop")) == len(whole) + round(len(whole) / 2)
