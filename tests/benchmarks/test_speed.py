"""Speed ratios: what slows down is seen, what is noise is not taken for a difference."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import engines, served, speed
from benchmarks.engines import Answer
from benchmarks.intervals import speedup
from benchmarks.methods import Method, Run, head_digest, in_turn, parse_methods
from benchmarks.prompts import Conversation
from benchmarks.speed import Sample
from griffin_vllm.errors import GriffinError
from tests.benchmarks import models
from tests.serving import tiny


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
        patch.setattr(speed, "WARM_UP_TOKENS", 2)
        methods = f"none,none,griffin:{tmp_path / 'head'}"
        more = ("--concurrency", "4", "--max-tokens", "12", "--repeats", "1")
        arguments = models.arguments(tmp_path, methods, *more)
        assert speed.main(arguments) == 0
    record = models.record(tmp_path)
    assert 0 < record["settings"]["host_overhead_share"] < 1
    plain, again, griffin = record["results"]
    assert griffin["speedup_ci"][1] < 1.0
    assert griffin["time_per_output_token_ms"] > plain["time_per_output_token_ms"]
    # one 95 % interval in twenty may miss it by a little
    assert again["speedup_ci"][0] < 1.1
    assert again["speedup_ci"][1] > 0.9
    assert plain["repeats"] == 1
    # what the ratio and its interval are computed from is in the record
    ratio, bounds = speedup(griffin["samples"], plain["samples"]) or (0, (0, 0))
    assert (ratio, list(bounds)) == (griffin["speedup"], griffin["speedup_ci"])
    assert len(griffin["samples"]["conversations"]) == models.CONVERSATIONS
    # a target step takes a tenth of a second and gives up to four tokens
    percentiles = list(griffin["time_per_output_token_ms_percentiles"].values())
    assert 25 <= percentiles[0] <= percentiles[1] <= percentiles[2]


def test_a_slow_spell_meets_every_method_early_in_one_repeat_and_late_in_another() -> None:
    order = [[run for repeat, run in in_turn(3, 7) if repeat == wanted] for wanted in range(3)]
    assert all(sorted(runs) == list(range(7)) for runs in order)
    places = [sum(runs.index(run) for runs in order) / 3 for run in range(7)]
    assert 2 <= min(places) <= max(places) <= 4


LOOPING = {"0", "1"}


@contextmanager
def synthetic_engines() -> Iterator[list[str]]:
    """Engines whose step times are drawn with a fixed seed and grow by a quarter with each draft, all of which are
    accepted; yields the labels of those that were started."""
    random = np.random.default_rng(3)
    started: list[str] = []

    @contextmanager
    def start(run: Run, **_: Any) -> Iterator[Any]:
        started.append(run.label)
        drafts = run.num_speculative_tokens
        step = 0.03 * (1 + drafts / 4) * random.lognormal(sigma=0.03)
        yield SimpleNamespace(step=step, drafts=drafts, get_tokenizer=lambda: None)

    def answer(llm: Any, conversations: Sequence[Conversation], **_: Any) -> list[Answer]:
        found = []
        for conversation in conversations:
            for turn in range(len(conversation.turns)):
                emitted = [1] + [1 + llm.drafts] * int(random.integers(10, 40))
                steps = llm.step * random.lognormal(sigma=0.1, size=len(emitted))
                count = sum(emitted)
                tokens = [0] * count if conversation.id in LOOPING else list(range(count))
                found.append(Answer(conversation.id, turn, 9, tokens, emitted, list(np.cumsum(steps))))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "start", start)
        patch.setattr(engines, "answer", answer)
        patch.setattr(engines, "resolved_settings", lambda llm: {})
        patch.setattr(engines, "fitting", lambda tokenizer, conversations, *_: conversations)
        patch.setattr(speed, "_on_cpu", lambda: False)
        yield started


def prompt_file(folder: Path, name: str, conversations: int) -> Path:
    path = folder / f"{name}.jsonl"
    lines = [json.dumps({"turns": [f"{name} {i}", "and then?"]}) for i in range(conversations)]
    path.write_text("\n".join(lines))
    return path


def test_plain_decoding_against_itself_contains_one_from_answers_to_record(tmp_path: Path) -> None:
    prompt_file(tmp_path, "prompts", 20)
    with synthetic_engines() as started:
        assert speed.main(models.arguments(tmp_path, "none,none,ngram", "--concurrency", "4")) == 0
    assert started == [
        *("none", "none", "ngram K=3"),
        *("none", "ngram K=3", "none"),
        *("ngram K=3", "none", "none"),
    ]
    plain, again, ngram = models.record(tmp_path)["results"]
    assert plain["repeats"] == 3
    low, high = again["speedup_ci"]
    assert low <= 1.0 <= high
    assert "speedup_ci" not in plain
    # four tokens in the time of 1.75
    assert ngram["speedup_ci"][0] <= 4 / 1.75 <= ngram["speedup_ci"][1]
    # and the same on those conversations that plain decoding does not loop in
    names = plain["samples"]["conversations"]
    assert plain["samples"]["loops"] == [name in LOOPING for name in names]
    sides = []
    for row in (ngram, plain):
        kept = [i for i, name in enumerate(names) if name not in LOOPING]
        numbers = {
            field: [[repeat[i] for i in kept] for repeat in row["samples"][field]]
            for field in ("tokens", "seconds")
        }
        sides.append(row["samples"] | numbers)
    ratio, bounds = speedup(sides[0], sides[1]) or (0, (0, 0))
    assert [ngram["speedup_loop_free"], *ngram["speedup_loop_free_ci"]] == pytest.approx([ratio, *bounds])
    assert ratio != ngram["speedup"]


def test_a_row_at_the_best_k_of_a_tuning_record_stands_beside_the_fixed_one(tmp_path: Path) -> None:
    others = prompt_file(tmp_path, "others", 4)
    prompt_file(tmp_path, "prompts", 4)
    tuning, load = tmp_path / "tuning.json", ("--concurrency", "1")
    swept = ("--prompts", str(others), "--num-speculative-tokens", "1,4,2", "--json", str(tuning))
    with synthetic_engines():
        assert speed.main(models.arguments(tmp_path, "none,ngram", *load, *swept)) == 0
        more = (*load, "--best-k-from", str(tuning))
        assert speed.main(models.arguments(tmp_path, "none,ngram", *more)) == 0
        rows = [
            (row["method"], row["num_speculative_tokens"], row.get("best_k"))
            for row in models.record(tmp_path)["results"]
        ]
        assert rows == [("none", 0, None), ("ngram", 3, None), ("ngram", 4, True)]

        # a tuning record that shares one prompt with those that are measured
        others.write_text(json.dumps({"turns": ["prompts 2"]}))
        assert speed.main(models.arguments(tmp_path, "none,ngram", *load, *swept)) == 0
        with pytest.raises(GriffinError, match="holds 1 of the 4 prompts of prompts"):
            speed.main(models.arguments(tmp_path, "none,ngram", *more))


@pytest.mark.parametrize(
    "field",
    [
        "machine.cpu",
        "machine.cores",
        "versions.vllm",
        "arguments.target",
        "arguments.dtype",
        "arguments.concurrency",
        "heads.head",
        "first_turns",
    ],
)
def test_a_tuning_record_of_other_conditions_or_without_its_prompts_is_refused(
    tmp_path: Path, field: str
) -> None:
    methods = parse_methods(f"none,griffin:{tiny.write_head(tmp_path / 'head')}")
    ours = {
        "machine": {"cpu": "a", "cores": 2},
        "versions": {"vllm": "1"},
        "arguments": {"target": "t", "dtype": "float32", "concurrency": [1]},
        "first_turns": {"data": ["x"]},
    }
    theirs = {
        **json.loads(json.dumps(ours)),
        "heads": {"head": head_digest(methods[1])},
        "first_turns": {"other": ["y"]},
    }
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"settings": theirs}))
    speed.check_tuning_record(path, ours, methods)
    group, _, name = field.partition(".")
    if name:
        theirs[group][name] = "another"
    else:
        del theirs[group]
    path.write_text(json.dumps({"settings": theirs}))
    with pytest.raises(GriffinError, match=f"settings.{field} is"):
        speed.check_tuning_record(path, ours, methods)


def test_served_methods_take_turns_and_the_median_counts_with_the_clients_command_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_file(tmp_path, "prompts", 4)
    times = {"none": [30.0, 90.0, 33.0], "ngram K=3": [20.0, 22.0, 80.0]}
    running: list[str] = []

    @contextmanager
    def server(run: Run, arguments: dict[str, Any]) -> Iterator[Any]:
        running.append(run.label)
        yield SimpleNamespace(url="http://127.0.0.1:1")

    def client(command: list[str], **_: Any) -> None:
        assert command[1:3] == ["bench", "serve"]
        options = dict(pairwise(command))
        assert len(json.loads(Path(options["--dataset-path"]).read_text())) == 4
        time_per_token = times[running[-1]][running.count(running[-1]) - 1]
        result = {
            "completed": 4,
            "output_throughput": 1000 / time_per_token,
            "mean_tpot_ms": time_per_token,
            "median_ttft_ms": 100.0,
        }
        (Path(options["--result-dir"]) / options["--result-filename"]).write_text(json.dumps(result))

    # asks a process of the system's the first time, by the function that is replaced below
    platform.platform()
    monkeypatch.setattr(served, "server", server)
    monkeypatch.setattr(served.subprocess, "run", client)
    more = ("--served", "--concurrency", "2")
    assert speed.main(models.arguments(tmp_path, "none,ngram", *more)) == 0
    assert running == ["none", "ngram K=3", "ngram K=3", "none", "none", "ngram K=3"]
    plain, ngram = models.record(tmp_path)["results"]
    assert [plain["time_per_output_token_ms"], ngram["time_per_output_token_ms"]] == [33.0, 22.0]
    assert (plain["repeats"], plain["num_prompts"], plain["speedup"]) == (3, 4, 1.0)
    assert ngram["speedup"] == pytest.approx(1.5)


def test_the_best_number_of_draft_tokens_comes_from_all_tuning_records(tmp_path: Path) -> None:
    rows = [
        {"method": "griffin", "head": "h", "num_speculative_tokens": k, "dataset": data, "speedup": speedup}
        for data, by_k in {"a": {3: 1.2, 5: 1.6}, "b": {3: 1.5, 5: 1.0}}.items()
        for k, speedup in by_k.items()
    ]
    paths = [tmp_path / "shallow.json", tmp_path / "deep.json"]
    deep = [row | {"num_speculative_tokens": 8, "speedup": 1.2} for row in rows]
    for path, some in zip(paths, (rows, deep), strict=True):
        path.write_text(json.dumps({"settings": {}, "results": some}))
    assert speed.best_ks(paths) == {Method("griffin", "h"): 3}


def test_each_method_runs_at_its_best_k_alone_and_one_without_a_best_k_is_not_left_out_in_silence() -> None:
    methods = parse_methods("none,ngram")
    plain, ngram = speed._plan(methods, [], {Method("ngram"): 5}, "float32")
    assert (plain.num_speculative_tokens, ngram.num_speculative_tokens) == (0, 5)
    with pytest.raises(GriffinError, match="--best-k-from: nothing was measured there of ngram"):
        speed._plan(methods, [], {}, "float32")
