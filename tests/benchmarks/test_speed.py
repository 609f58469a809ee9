"""Speed ratios: what slows down is seen, what is noise is not taken for a difference."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import speed
from benchmarks.engines import Answer
from benchmarks.methods import Method
from benchmarks.speed import Sample, speedup
from tests.benchmarks import models


def simulated(random: np.random.Generator, factor: float = 1.0, repeats: int = 3) -> dict[str, Any]:
    """20 conversations whose speeds differ, on a machine whose engine starts differ by about 5 %."""
    found: dict[str, Any] = {"repeats": list(range(repeats)), "tokens": [], "seconds": []}
    for _ in range(repeats):
        tokens = random.integers(20, 500, 20).astype(float)
        start = random.lognormal(sigma=0.05)
        found["tokens"].append(tokens)
        found["seconds"].append(tokens * 0.03 * factor * start * random.lognormal(sigma=0.05, size=20))
    return found


def test_plain_decoding_against_itself_contains_one_as_often_as_promised() -> None:
    random = np.random.default_rng(0)
    contained = 0
    for _ in range(200):
        _, (low, high) = speedup(simulated(random), simulated(random), draws=500) or (0, (0, 0))
        contained += low <= 1.0 <= high
    assert contained >= 180


def test_a_slow_down_of_a_third_is_told_from_noise() -> None:
    random = np.random.default_rng(0)
    ratio, (low, high) = speedup(simulated(random, 1.5), simulated(random)) or (0, (0, 0))
    assert low < ratio < high < 1.0
    assert ratio == pytest.approx(1 / 1.5, rel=0.15)


def test_turns_of_a_conversation_are_drawn_together() -> None:
    def answer(conversation: str, turn: int) -> Answer:
        return Answer(conversation, turn, 9, tokens=[0] * 5, emitted=[1, 2, 2], times=[1.0, 2.0, 4.0])

    sample = Sample.of([answer("a", 0), answer("a", 1), answer("b", 0)], wall_seconds=9.0)
    assert sample.tokens == {"a": 8, "b": 4}
    assert sample.seconds == {"a": 6, "b": 3}
    assert sample.passes == 6


def test_a_planted_sleep_in_the_proposer_is_seen_and_plain_decoding_equals_itself(tmp_path: Path) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from griffin_vllm.serving.proposer import GriffinProposer

    models.write_models(tmp_path)

    def slowed(function: Any, seconds: float) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **kwargs)

        return call

    with models.engines_in_this_process() as patch:
        # a target step as long as a real model's, beside which a busy machine's noise is small
        patch.setattr(GPUModelRunner, "_model_forward", slowed(GPUModelRunner._model_forward, 0.1))
        patch.setattr(GriffinProposer, "propose", slowed(GriffinProposer.propose, 0.4))
        methods = f"none,none,griffin:{tmp_path / 'head'}"
        arguments = models.arguments(tmp_path, methods, "--concurrency", "4", "--max-tokens", "12")
        assert speed.main(arguments) == 0
    record = models.record(tmp_path)
    assert 0 < record["settings"]["host_overhead_share"] < 1
    plain, again, griffin = record["results"]
    assert griffin["speedup_ci"][1] < 1.0
    assert griffin["time_per_output_token_ms"] > plain["time_per_output_token_ms"]
    # one 95 % interval in twenty may miss it by a little
    assert again["speedup_ci"][0] < 1.1
    assert again["speedup_ci"][1] > 0.9
    assert plain["repeats"] == 3
    # what the ratio and its interval are computed from is in the record
    ratio, bounds = speedup(griffin["samples"], plain["samples"]) or (0, (0, 0))
    assert (ratio, list(bounds)) == (griffin["speedup"], griffin["speedup_ci"])
    assert len(griffin["samples"]["conversations"]) == models.CONVERSATIONS
    # a round takes half a second and gives up to four tokens
    percentiles = list(griffin["time_per_output_token_ms_percentiles"].values())
    assert 125 < percentiles[0] <= percentiles[1] <= percentiles[2]


def test_the_best_number_of_draft_tokens_comes_from_the_tuning_record(tmp_path: Path) -> None:
    rows = [
        {"method": "griffin", "head": "h", "num_speculative_tokens": k, "dataset": data, "speedup": speedup}
        for data, by_k in {"a": {3: 1.2, 5: 1.6}, "b": {3: 1.5, 5: 1.0}}.items()
        for k, speedup in by_k.items()
    ]
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"settings": {}, "results": rows}))
    assert speed.best_ks(path) == {Method("griffin", "h"): 3}
