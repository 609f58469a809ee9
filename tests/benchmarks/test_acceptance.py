"""Acceptance lengths are what the engine really did, whatever the answers' length and order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import acceptance
from benchmarks.acceptance import acceptance_length, position_acceptance, score, summarise
from benchmarks.engines import Answer
from benchmarks.intervals import ratio_interval
from benchmarks.oracle import Seen
from griffin_vllm.errors import GriffinError
from tests.benchmarks import models


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Plain decoding, a head and a worse one, with a count of what the scheduler was handed in each step."""
    from vllm.v1.core.sched.scheduler import Scheduler

    folder = tmp_path_factory.mktemp("acceptance")
    models.write_models(folder)
    yields: list[Counter[str]] = []
    original, start = Scheduler.update_from_output, Scheduler.__init__

    def new_engine(self: Any, *args: Any, **kwargs: Any) -> None:
        yields.append(Counter())
        start(self, *args, **kwargs)

    def update(self: Any, scheduled: Any, output: Any) -> Any:
        yields[-1].update(
            request
            for request, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True)
            if tokens
        )
        return original(self, scheduled, output)

    with models.engines_in_this_process() as patch:
        patch.setattr(Scheduler, "__init__", new_engine)
        patch.setattr(Scheduler, "update_from_output", update)
        (folder / "empty").mkdir()
        methods = f"none,eagle:{folder / 'empty'},griffin:{folder / 'head'},griffin:{folder / 'worse'}"
        status = acceptance.main(models.arguments(folder, methods, "--concurrency", "2"))
    trajectory = json.loads((folder / "out.trajectory.json").read_text())["answers"]["prompts"]
    return models.record(folder) | {"status": status, "yields": yields, "trajectory": trajectory}


def test_acceptance_length_is_an_independent_count_of_tokens_and_passes(measured: dict[str, Any]) -> None:
    answers = [answer["tokens"] for answer in measured["trajectory"]]
    assert len(answers) == 2 * models.CONVERSATIONS
    for row, steps in zip(measured["results"], measured["yields"], strict=True):
        assert row["identical_answers"] == 1.0
        passes = sum(count - 1 for count in steps.values())
        assert row["acceptance_length"] == pytest.approx(sum(len(one) - 1 for one in answers) / passes)
        assert row["acceptance_length"] == pytest.approx(1 + sum(row["position_acceptance"]))
    assert measured["results"][0]["acceptance_length"] == 1.0


def test_a_planted_lower_acceptance_shows(measured: dict[str, Any]) -> None:
    _, head, worse = measured["results"]
    assert worse["acceptance_length"] < 0.9 * head["acceptance_length"]
    assert worse["position_acceptance"][0] < head["position_acceptance"][0]


def test_a_record_says_how_it_was_measured(
    measured: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = measured["settings"]
    assert settings["versions"]["vllm"]
    assert settings["machine"]["cores"]
    assert settings["date"]
    assert len(set(settings["heads"].values())) == len(settings["heads"]) == 3
    assert settings["engine"]["dtype"] == "float32"
    assert settings["engine"]["threads"] >= 1
    assert settings["engine"]["cores"]
    assert settings["arguments"]["num_speculative_tokens"] == [3]
    assert settings["arguments"]["methods"] == "none,eagle:empty,griffin:head,griffin:worse"
    assert settings["speculative_configs"]["none"] is None
    assert settings["speculative_configs"]["griffin:head K=3"]["model"] == "head"
    assert len(set(settings["first_turns"]["prompts"])) == models.CONVERSATIONS
    assert settings["prompts"]["prompts"]["conversations"] == models.CONVERSATIONS
    assert str(tmp_path_factory.getbasetemp()) not in json.dumps(settings)
    assert not [row["head"] for row in measured["results"] if row["head"] and row["head"].startswith("/")]


def test_a_run_that_fails_is_named_and_the_others_go_on(measured: dict[str, Any]) -> None:
    assert measured["status"] == 1
    assert [failure["run"] for failure in measured["failures"]] == ["eagle:empty K=3"]
    assert len(measured["results"]) == 3


def answer(emitted: list[int], tokens: list[int] | None = None, turn: int = 0) -> Answer:
    tokens = tokens or list(range(sum(emitted)))
    return Answer("c", turn, prompt_tokens=100, tokens=tokens, emitted=emitted, times=[0.0] * len(emitted))


def test_lengths_are_pooled_over_passes_and_not_averaged_over_answers() -> None:
    scored = [score(answer([1, 4]), None), score(answer([1, 1, 1, 1]), None)]
    assert acceptance_length(scored) == 7 / 4
    assert position_acceptance(scored, 4) == [1 / 4, 1 / 4, 1 / 4, 0]


def test_passes_count_only_while_the_answer_follows_the_trajectory() -> None:
    reference = [0, 1, 2, 3, 4, 9, 9, 9]
    scored = score(answer([1, 2, 2, 3]), reference)
    assert scored.passes == [2, 2]
    assert scored.contexts == [101, 103]
    assert not scored.identical


def test_perfect_greedy_drafts_end_where_the_target_sampled_another_token() -> None:
    likeliest = [False, True, True, False, True, True, True, True, True]
    seen = Seen(answer([1] * 9), likeliest, [0.5] * 9)
    # runs of two, three (K allows no more) and one, each with one more token, but for the last: the answer ends
    assert seen.replayed(3).emitted == [1, 3, 4, 1]
    assert seen.replayed(1).emitted == [1, 2, 1, 2, 2, 1]
    assert Seen(answer([1]), [True], [0.5]).replayed(3).emitted == [1]


def test_the_oracle_accepts_what_the_targets_top_probability_says(tmp_path: Path) -> None:
    models.write_models(tmp_path)
    more = ("--temperature", "0.5", "--oracle", "--repeats", "6", "--max-tokens", "64", "--concurrency", "4")
    with models.engines_in_this_process():
        assert acceptance.main(models.arguments(tmp_path, f"none,griffin:{tmp_path / 'head'}", *more)) == 0
    _, griffin, oracle = models.record(tmp_path)["results"]
    assert (oracle["method"], oracle["num_speculative_tokens"]) == ("oracle", 3)
    # a chain's first draft is accepted as often as that, at all positions alike but for the luck of sampling
    assert oracle["position_acceptance"][0] == pytest.approx(oracle["mean_top_probability"], abs=0.05)
    assert griffin["acceptance_length"] < oracle["acceptance_length"] < 4


def test_loops_are_told_apart() -> None:
    loop = answer([1, 3, 3, 3, 3, 3], tokens=[1, 2] * 8)
    row = summarise([score(loop, None), score(answer([1, 1, 1, 2, 2, 2], turn=1), None)], 3)
    assert row["acceptance_length_loop_free"] == 8 / 5
    assert row["acceptance_length_by_repetition"] == {"loops": 3.0, "varied": 8 / 5}
    assert row["acceptance_length_by_turn"] == {"1": 3.0, "2": 8 / 5}
    assert row["acceptance_length_by_context"] == {"128": 23 / 10}


def test_greedy_scoring_refuses_another_dtype(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match="float32"):
        acceptance.main([*models.arguments(tmp_path, "none"), "--dtype", "bfloat16"])


def test_a_ratio_pairs_conversations_and_its_interval_holds_it() -> None:
    ours = {str(i): [30 + i % 7, 15] for i in range(40)}
    theirs = {name: [tokens - 5, passes] for name, (tokens, passes) in ours.items()}
    ratio, (low, high) = ratio_interval(ours, {**theirs, "only here": [1000, 1]})
    assert low < ratio < high
    assert ratio == pytest.approx(sum(t for t, _ in ours.values()) / sum(t for t, _ in theirs.values()))
    # paired: the spread between conversations, which both share, hardly widens the interval
    assert high - low < 0.02
    assert ratio_interval(ours, ours) == (1.0, (1.0, 1.0))
