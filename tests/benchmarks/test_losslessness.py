"""Answers are called wrong when, and only when, arithmetic cannot explain the difference."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engines, losslessness
from benchmarks.engines import Answer
from benchmarks.losslessness import judge
from benchmarks.methods import Run
from griffin_vllm.errors import GriffinError
from tests.benchmarks import models

REFERENCE = Answer("c", 0, 1, tokens=[5, 6, 7], margins=[1.0, 5e-5, 1.0], runners_up=[1, 2, 3])


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        ([5, 6, 7], "identical"),
        ([5, 2, 8, 9], "near_tie"),  # the runner-up where the two are close, and whatever follows from it
        ([5, 3, 7], "wrong"),  # close, but not the runner-up
        ([5, 6, 3], "wrong"),  # the runner-up, but not close
        ([5, 6], "wrong"),
        ([5, 6, 7, 8], "wrong"),
    ],
)
def test_verdicts(tokens: list[int], verdict: str) -> None:
    assert judge(Answer("c", 0, 1, tokens=tokens), REFERENCE, 1e-4).kind == verdict


def test_one_planted_wrong_token_is_the_one_wrong_answer(tmp_path: Path) -> None:
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    models.write_models(tmp_path)
    original, calls = RejectionSampler.forward, 0

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        output = original(self, *args, **kwargs)
        calls += 1
        if calls == 5:
            output.sampled_token_ids[0, 0] ^= 1
        return output

    with models.engines_in_this_process() as patch:
        patch.setattr(RejectionSampler, "forward", forward)
        methods = f"griffin:{tmp_path / 'head'}"
        status = losslessness.main(models.arguments(tmp_path, methods, "--concurrency", "2"))
    plain, griffin = models.record(tmp_path)["results"]
    assert plain["identical"] == plain["num_answers"] == 2 * models.CONVERSATIONS
    assert status == 1
    assert griffin["wrong"] == 1
    assert griffin["identical"] == 2 * models.CONVERSATIONS - 1
    assert griffin["acceptance_length"] > 1


def test_a_resumed_record_keeps_its_rows_and_starts_only_the_missing_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.write_models(tmp_path)
    started: list[str] = []
    start = engines.start

    def recorded_start(run: Run, **settings: Any) -> Any:
        started.append(run.label)
        return start(run, **settings)

    monkeypatch.setattr(engines, "start", recorded_start)
    command = models.arguments(tmp_path, f"griffin:{tmp_path / 'head'}", "--concurrency", "2", "--resume")
    with models.engines_in_this_process():
        assert losslessness.main(command) == 0
        whole = models.record(tmp_path)
        (tmp_path / "out.json").write_text(json.dumps(whole | {"results": whole["results"][:1]}))
        started.clear()
        assert losslessness.main(command) == 0
    assert len(started) == 1
    assert "griffin" in started[0]
    assert models.record(tmp_path)["results"] == whole["results"]


def test_another_benchmarks_record_is_not_resumed(tmp_path: Path) -> None:
    models.write_models(tmp_path)
    command = models.arguments(tmp_path, f"griffin:{tmp_path / 'head'}", "--resume")
    (tmp_path / "out.json").write_text('{"settings": {"benchmark": "acceptance"}, "results": []}')
    with pytest.raises(GriffinError, match=r"out\.json: benchmark is 'acceptance'"):
        losslessness.main(command)
