"""The plan of a run: which samples each optimiser step trains on, at how many draft steps and at which rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from griffin_vllm.errors import GriffinError
from griffin_vllm.training.config import Stage, TrainConfig
from griffin_vllm.training.data import TokenDataset, length_buckets


@dataclass(frozen=True)
class PlannedStep:
    """One optimiser step: its stage, the samples of each micro-batch, and its learning rate."""

    stage: Stage
    micro_batches: list[list[int]]
    learning_rate: float


def plan_steps(data: TokenDataset, config: TrainConfig) -> list[PlannedStep]:
    """Every optimiser step of the run, in order; the same for the same data and settings.

    Raises:
        GriffinError: no sample is left to train on.
    """
    samples = [i for i in range(len(data)) if config.loops == "keep" or not data.loops[i]]
    if not samples:
        raise GriffinError(f"{data.folder}: has no sample to train on (loops: {config.loops})")
    lengths = data.lengths[samples]
    tokens, n = config.batch_tokens // config.gradient_accumulation, config.gradient_accumulation
    planned: list[list[list[list[int]]]] = []  # stage, step, micro-batch, sample
    epoch = 0
    for stage in config.stages:
        left, steps = stage.epochs, []
        while left > 0:
            buckets = [[samples[i] for i in b] for b in length_buckets(lengths, tokens, config.seed, epoch)]
            buckets = buckets[: max(1, round(min(left, 1.0) * len(buckets)))]
            steps += [buckets[i : i + n] for i in range(0, len(buckets), n)]
            left, epoch = left - 1, epoch + 1
        planned.append(steps)
    plan: list[PlannedStep] = []
    total = sum(map(len, planned))
    for stage, steps in zip(config.stages, planned, strict=True):
        for i, micro_batches in enumerate(steps):
            rate = (
                learning_rate(config, config.learning_rate, len(plan), total)
                if stage.learning_rate is None
                else learning_rate(config, stage.learning_rate, i, len(steps))
            )
            plan.append(PlannedStep(stage, micro_batches, rate))
    return plan


def learning_rate(config: TrainConfig, peak: float, step: int, steps: int) -> float:
    """The rate of optimiser step ``step`` of ``steps``: linear warm-up, then the schedule down to zero."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return peak * falling[config.schedule]
