"""The breakdown of a round accounts for all of its time, and puts it where it is spent."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, round, startup
from benchmarks.methods import Method, Run
from benchmarks.round import Round, Stopwatch, summarise
from benchmarks.sources import read_record
from tests.benchmarks import models

SLEEP = 0.1


def test_phases_add_up_to_the_round_and_a_planted_sleep_shows_in_its_own(tmp_path: Path) -> None:
    from griffin_vllm.serving.model import GriffinForCausalLM

    top_tokens = GriffinForCausalLM.get_top_tokens

    def slow(self: Any, hidden_states: Any) -> Any:
        time.sleep(SLEEP)
        return top_tokens(self, hidden_states)

    models.write_models(tmp_path)
    with models.engines_in_this_process() as patch:
        patch.setattr(GriffinForCausalLM, "get_top_tokens", slow)
        more = ("--concurrency", "2", "--repeats", "1")
        assert round.main(models.arguments(tmp_path, f"griffin:{tmp_path / 'head'}", *more)) == 0
    [row] = models.record(tmp_path)["results"]
    phases = row["phases_ms"]
    assert sum(phases.values()) == pytest.approx(row["round_ms"], rel=0.01)
    assert all(phases.values())
    assert row["acceptance_length"] > 1
    assert row["draft_step_ms"] > 1000 * SLEEP
    assert phases.pop("first draft: lm_head") > 1000 * SLEEP
    # K = 3: two later drafts
    assert phases.pop("later drafts: lm_head") > 2000 * SLEEP
    assert max(phases.values()) < 1000 * SLEEP
    # a column for the names and one a row of the record
    assert [len(line) for line in report.cells(read_record(tmp_path / "out.json"))] == [2] * 16


def test_a_function_inside_another_counts_once() -> None:
    class Work:
        def outer(self) -> None:
            time.sleep(0.02)
            self.inner()
            self.inner()

        def inner(self) -> None:
            time.sleep(0.01)

    work, stopwatch = Work(), Stopwatch()
    stopwatch.time(work, "outer", "rest")
    stopwatch.time(work, "inner", "first", "later")
    for _ in range(2):
        work.outer()
        assert stopwatch.seconds["rest"] == pytest.approx(0.02, rel=0.5)
        assert stopwatch.seconds["first"] == pytest.approx(0.01, rel=0.5)
        assert stopwatch.seconds["later"] == pytest.approx(0.01, rel=0.5)


def test_rounds_that_other_work_disturbed_do_not_count() -> None:
    repeats = [
        [Round(seconds, {"rest": seconds}, [2], 0) for seconds in repeat]
        for repeat in ((0.1, 9.0, 0.4), (0.1, 0.2, 0.4), (5.0, 0.2, 0.3))
    ]
    row = summarise(repeats)
    # a round of each depth, the deepest too
    assert row["round_ms"] == row["phases_ms"]["rest"] == pytest.approx((100 + 200 + 400) / 3)
    assert row["rounds"] == 3
    assert row["draft_step_ms"] is None


def test_a_later_draft_costs_what_those_that_were_made_cost() -> None:
    rounds = [
        Round(0.1, {"later drafts: head": 0.02 * made, "later drafts: lm_head": 0.01 * made}, [2], made)
        for made in (0, 3, 1, 0)
    ]
    assert summarise([rounds])["draft_step_ms"] == pytest.approx(30)


def test_starts_are_compared_within_a_turn() -> None:
    planned = [Run(Method("eagle", "e"), 2), Run(Method("griffin", "g"), 2), Run(Method("none"), 0)]
    eagle, griffin = startup.rows(planned, [{0: 30.0, 1: 40.0, 2: 90.0}, {0: 31.0, 2: 91.0}, {}])
    assert (eagle["startup_seconds"], eagle["beyond_first"]) == (40.0, 0.0)
    assert griffin["beyond_first"] == 1.0
