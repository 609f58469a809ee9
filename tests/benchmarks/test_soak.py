"""A soak sees what was lost, what is wrong and what grows, and finds nothing where there is nothing."""

from __future__ import annotations

import asyncio
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak, soak_checks, soak_traffic
from benchmarks.engines import Answer
from benchmarks.memory import History, ProcessTree
from benchmarks.soak_traffic import Demand, Question, Reply
from tests.benchmarks import models


class Tokenizer:
    """A token is a letter."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


EXPECTED = Answer("q", 0, 0, list(map(ord, "one two three")), margins=[1.0] * 13, runners_up=[0] * 13)
EXPECTED.margins[1], EXPECTED.runners_up[1] = 5e-5, ord("f")


def reply(text: str, *, stop: str | None = None, **fields: Any) -> Reply:
    demand = Demand(Question("q", fields.pop("kind", "short"), (), stop), 0.0, streamed=True, cut_after=None)
    tokens = fields.pop("tokens", list(map(ord, text)))
    return Reply(
        demand, 0.0, **{"outcome": "finished", "finish_reason": "stop"} | fields, tokens=tokens, text=text
    )


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (reply("one two three"), "identical"),
        (reply("of course"), "near_tie"),
        (reply("one too many"), "wrong"),
        (reply("one two"), "wrong"),
        (reply("one two", outcome="aborted"), "identical"),
        (reply("one too", outcome="aborted"), "wrong"),
        (reply("one ", stop="two"), "identical"),
        # the tokens of the pass in which the stop string appeared may go on behind it
        (reply("one ", stop="two", tokens=list(map(ord, "one two th"))), "identical"),
        (reply("one two ", stop="two"), "wrong"),
        (reply("of ", stop="two"), "near_tie"),
    ],
)
def test_verdicts(found: Reply, verdict: str) -> None:
    assert soak_checks.compare(found, EXPECTED, Tokenizer(), 1e-4).kind == verdict


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (reply('{"answer": "x", "sure": true}', kind="json"), False),
        (reply('{"answer": "x", "su', kind="json", finish_reason="length"), False),
        (reply('{"answer": "x", "su', kind="json"), True),
        (reply('{"answer": "x", "sure": 1}', kind="json"), True),
        (reply("one ", stop="two"), False),
        (reply("one two", stop="two"), True),
    ],
)
def test_answers_keep_to_their_stop_string_and_schema(found: Reply, broken: bool) -> None:
    assert soak_checks.breaks_its_terms(found) is broken


def test_acceptance_lengths_compare_the_same_questions() -> None:
    def drafted(question: str, steps: int, accepted: int, **fields: Any) -> Reply:
        found = reply("x", steps=steps, accepted=accepted, **fields)
        found.demand = Demand(Question(question, "short", ()), 0.0, streamed=False, cut_after=None)
        return found

    first = [drafted("a", 10, 10), drafted("b", 10, 30), drafted("a", 10, 0)]
    last = [drafted("c", 10, 0), drafted("a", 10, 5), drafted("b", 10, 40, outcome="aborted")]
    assert soak_checks.acceptance_lengths(first, last) == (2.0, 1.5)
    assert soak_checks.acceptance_lengths(first, last[:1]) is None


def test_a_planted_leak_is_seen() -> None:
    leak = "import time; kept = []\nwhile True: kept.append(bytearray(b'x' * 500_000)); time.sleep(0.02)"
    sleep = "import time; time.sleep(60)"
    growth = {}
    for code in (leak, sleep):
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            tree, start = ProcessTree(process.pid), time.monotonic()
            time.sleep(0.5)
            while time.monotonic() - start < 3:
                tree.sample(time.monotonic() - start)
                time.sleep(0.2)
            process.kill()
        [summary] = tree.summaries(warm_up=1.0)
        growth[code] = summary["growth_mib"]
    assert growth[leak] > 10
    assert abs(growth[sleep]) < 1


def test_growth_is_measured_behind_the_warm_up() -> None:
    rising = [(float(t), 0.0, min(t, 100.0) + (t % 3)) for t in range(400)]
    summary = History("x", rising).summary(warm_up=120.0)
    assert summary is not None
    assert abs(summary["growth_mib"]) < 1
    assert History("x", rising).summary(warm_up=500.0) is None


def test_where_no_sample_was_taken_there_is_no_growth_to_tell_of() -> None:
    assert ProcessTree(os.getpid()).summaries(warm_up=0.0) == []


def test_requests_that_a_fake_endpoint_drops_are_lost() -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "x"}}]})
            head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            self.wfile.write(f"{head}data: {chunk}\n\n".encode())

    async def replies() -> list[Reply]:
        async with soak_traffic.client_of(f"http://127.0.0.1:{endpoint.server_address[1]}") as client:
            demands = [
                Demand(Question("q", "short", ({"role": "user", "content": "x"},)), 0.0, streamed, None)
                for streamed in (True, False)
            ]
            return [await soak_traffic.ask(client, "m", demand, 4) for demand in demands]

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        found = asyncio.run(replies())
        endpoint.shutdown()
    assert [one.outcome for one in found] == ["lost", "lost"]


ROW: dict[str, Any] = {
    "method": "griffin",
    "sent": 9,
    "lost": 0,
    "left_behind": 0,
    "num_answers": 5,
    "wrong": 0,
    "broken_terms": 0,
    "acceptance_length_first": 2.0,
    "acceptance_length_last": 2.01,
    "memory": [{"process": "p", "growth_mib": 1.0}],
    "exit_status": 0,
    "survivors": [],
}


@pytest.mark.parametrize(
    ("change", "criterion"),
    [
        ({}, None),
        ({"lost": 1}, "1 of 9 requests were lost"),
        ({"left_behind": 2}, "2 requests are still under way at the end"),
        ({"wrong": 1}, "1 of 5 greedy answers are wrong"),
        ({"num_answers": 0}, "0 of 0 greedy answers are wrong"),
        ({"broken_terms": 1}, "1 answers go beyond their stop string or schema"),
        ({"acceptance_length_last": 1.9}, "the acceptance length went from 2.0 to 1.9"),
        ({"acceptance_length_first": None}, "the acceptance length went from None to 2.01"),
        ({"acceptance_length_first": None, "method": "none"}, None),
        ({"memory": [{"process": "p", "growth_mib": 50.0}]}, "p grew by 50.0 MiB"),
        ({"memory": []}, "no memory was measured"),
        ({"exit_status": 1}, "the server ended with status 1"),
        ({"survivors": ["VLLM::EngineCore"]}, "the server left VLLM::EngineCore behind"),
    ],
)
def test_every_criterion_can_fail(change: dict[str, Any], criterion: str | None) -> None:
    class Limits:
        max_drift = 0.02
        max_growth_mib = 32.0

    assert soak_checks.failed_criteria(ROW | change, Limits()) == ([criterion] if criterion else [])


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], int]:
    """A folder, a command line and its exit status: some traffic on the tiny models."""
    folder = tmp_path_factory.mktemp("soak")
    models.write_models(folder)
    lines = [json.dumps({"question_id": i, "turns": [f"question {i * i}"]}) for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    command = models.arguments(folder, f"griffin:{folder / 'head'}", "--minutes", "0.3")
    # so short a run is all warm-up
    command += ["--max-growth-mib", "300", "--concurrency", "1,6"]
    return folder, command, soak.main(command)


def test_mixed_traffic_meets_every_criterion(soaked: tuple[Path, list[str], int]) -> None:
    folder, _, status = soaked
    record = models.record(folder)
    [row] = record["results"]
    assert row["failed"] == []
    assert status == 0
    assert row["sent"] == row["finished"] + row["aborted"]
    assert row["aborted"] > 0
    assert set(row["by_kind"]) == {"short", "long", "json", "stop"}
    assert set(row["by_temperature"]) == {"0", "1"}
    assert row["num_answers"] > 20
    assert row["acceptance_length_first"] > 1
    assert {"API server", "VLLM::EngineCore"} <= {one["process"] for one in row["memory"]}
    assert record["settings"]["engine"]["enable_prefix_caching"] is True


def test_a_planted_mismatch_is_seen(soaked: tuple[Path, list[str], int]) -> None:
    folder, command, _ = soaked
    path = folder / "out.trajectory.json"
    cached = json.loads(path.read_text())
    [planted] = [answer for answer in cached["answers"]["soak"] if answer["conversation"] == "prompts/0"]
    planted["tokens"][5] ^= 1
    path.write_text(json.dumps(cached))
    assert soak.main([*command, "--minutes", "0.1"]) == 1
    [row] = models.record(folder)["results"]
    assert row["wrong"] > 0
    assert {one["question"] for one in row["differences"] if one["kind"] == "wrong"} == {"prompts/0"}
    assert any("greedy answers are wrong" in criterion for criterion in row["failed"])
