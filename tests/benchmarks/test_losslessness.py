"""Answers are called wrong when, and only when, arithmetic cannot explain the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import losslessness
from benchmarks.engines import Answer
from benchmarks.losslessness import judge
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
