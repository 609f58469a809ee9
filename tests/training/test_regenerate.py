"""`griffin data regenerate` against a small HTTP server in this process that stands in for vLLM: no model runs."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from griffin_vllm.cli import app
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.conversations import Conversation, read_source
from griffin_vllm.training.regenerate import Settings, Summary, regenerate


class Flight:
    """Requests that are being answered, now and at most."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = 0

    def change(self, by: int) -> None:
        with self.lock:
            self.now += by
            self.most = max(self.most, self.now)


class FakeEndpoint(ThreadingHTTPServer):
    """Answers "re: QUESTION" with made-up token ids; can be told to fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.flight = Flight()
        self.delay = 0.0
        self.failures: dict[str, int] = {}  # question: how often it gets a 500 first
        self.refuses_token_ids = False
        self.odd_replies: list[tuple[str, bytes]] = []  # type and body of the next ones, behind the first
        self.model = "target"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def questions(self) -> Counter[str]:
        return Counter(request["messages"][-1]["content"] for request in self.requests[1:])

    def reply(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        question = request["messages"][-1]["content"]
        with self.lock:
            failing = self.failures.get(question, 0)
            self.failures[question] = failing - 1
        if request["model"] != self.model:
            return 404, {"error": {"message": "no such model"}}
        if self.refuses_token_ids and "return_token_ids" in request:
            return 400, {"error": {"message": "unknown field return_token_ids"}}
        if failing > 0:
            return 500, {"error": {"message": "out of luck"}}
        if question.startswith("too long"):
            return 400, {"error": {"message": "the prompt is too long"}}
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "length" if "cut" in question else "stop",
            "message": {
                "role": "assistant",
                "content": "" if question.startswith("silence") else f"re: {question}",
            },
        }
        if request.get("return_token_ids"):
            choice["token_ids"] = [1, 2, 3, 4, 5, 6]
        return 200, {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 6, "total_tokens": 7},
        }


class _Handler(BaseHTTPRequestHandler):
    server: FakeEndpoint
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": self.server.model, "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
        self.server.flight.change(+1)
        time.sleep(self.server.delay)
        self.server.flight.change(-1)
        if self.server.odd_replies and len(self.server.requests) > 1:
            kind, data = self.server.odd_replies.pop()
            self._send_bytes(200, kind, data)
        else:
            self._send(*self.server.reply(request))

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self._send_bytes(status, "application/json", json.dumps(body).encode())

    def _send_bytes(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    yield from _serve()


@pytest.fixture
def second_endpoint() -> Iterator[FakeEndpoint]:
    yield from _serve()


def _serve() -> Iterator[FakeEndpoint]:
    server = FakeEndpoint()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write_prompts(folder: Path, *questions: str | list[str]) -> str:
    records = [{"id": f"p{i}", "turns": [q] if isinstance(q, str) else q} for i, q in enumerate(questions)]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def run(folder: Path, prompts: str, *endpoints: FakeEndpoint, **options: Any) -> Summary:
    limit = options.pop("limit", None)
    exclude = options.pop("exclude", ())
    fields = {"model": "target", "first_pause": 0.01, "concurrency": 4, **options}
    return regenerate(
        [e.url for e in endpoints],
        [prompts],
        folder / "out.jsonl",
        Settings(**fields),
        limit=limit,
        exclude=exclude,
    )


def written(folder: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def test_fake_endpoint_answers_turn_by_turn_and_token_ids_are_kept(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, ["one", "two, cut", "three"], "four")
    summary = run(tmp_path, prompts, endpoint, max_turns=2, max_tokens=99, temperatures=(0.7,))
    assert (summary.written, summary.failed) == (2, 0)
    ids = {"token_ids": [1, 2, 3, 4, 5, 6], "distinct_4grams": 1.0}
    assert written(tmp_path)["p0"] == {
        "id": "p0",
        "model": "target",
        "family": "p0",
        "conversations": [
            {"from": "human", "value": "one"},
            {"from": "gpt", "value": "re: one", "finish_reason": "stop", **ids},
            {"from": "human", "value": "two, cut"},
            {"from": "gpt", "value": "re: two, cut", "finish_reason": "length", **ids},
        ],
        "temperature": 0.7,
    }
    second = next(r for r in endpoint.requests if r["messages"][-1]["content"] == "two, cut")
    assert [m["content"] for m in second["messages"]] == ["one", "re: one", "two, cut"]
    assert (second["max_tokens"], second["temperature"]) == (99, 0.7)
    found = [
        record for record in read_source(str(tmp_path / "out.jsonl")) if isinstance(record, Conversation)
    ]
    assert found[0].turns[1].token_ids == (1, 2, 3, 4, 5, 6)


def test_fake_endpoint_gets_the_user_turns_of_conversations_and_their_system_turn(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    turns = (("system", "S"), ("human", "one"), ("gpt", "other model"), ("human", "two"))
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"id": "a", "conversations": [{"from": f, "value": v} for f, v in turns]}]))
    run(tmp_path, str(file), endpoint)
    assert [m["content"] for m in endpoint.requests[-1]["messages"]] == ["S", "one", "re: one", "two"]
    assert [t["from"] for t in written(tmp_path)["a"]["conversations"]] == [
        "system",
        "human",
        "gpt",
        "human",
        "gpt",
    ]


def test_fake_endpoint_is_not_asked_again_for_what_is_written(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "a", "b", "too long", "c")
    assert run(tmp_path, prompts, endpoint, limit=2).written == 2
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"id": "p3", "conversa')
    summary = run(tmp_path, prompts, endpoint)
    assert (summary.written, summary.done_before) == (1, 2)
    assert out.read_bytes().startswith(whole)
    assert sorted(written(tmp_path)) == ["p0", "p1", "p3"]
    before = len(endpoint.requests)
    assert run(tmp_path, prompts, endpoint).written == 0
    assert len(endpoint.requests) == before
    assert endpoint.questions["a"] == endpoint.questions["c"] == endpoint.questions["too long"] == 1


def test_refusals_of_the_fake_endpoint_are_listed_and_earlier_turns_kept(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    summary = run(tmp_path, write_prompts(tmp_path, "too long", ["fine", "too long"], "silence"), endpoint)
    assert summary.skipped == {"refused by the endpoint": 1, "empty answer": 1}
    assert len(written(tmp_path)["p1"]["conversations"]) == 2
    listed = [json.loads(line) for line in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in listed} == {"p0", "p2"}
    assert "too long" in listed[0]["reason"] + listed[1]["reason"]


def test_fake_endpoint_is_asked_again_for_what_found_no_room_for_an_answer(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, "silence, cut", "fine")
    summary = run(tmp_path, prompts, endpoint)
    assert summary.skipped == {"no answer within --max-tokens": 1}
    assert not (tmp_path / "out.skipped.jsonl").exists()
    assert run(tmp_path, prompts, endpoint).done_before == 1
    assert endpoint.questions["silence, cut"] == 2


def test_failing_fake_endpoint_is_tried_again(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.failures = {"a": 2, "b": 9}
    summary = run(tmp_path, write_prompts(tmp_path, "a", "b", "c"), endpoint, attempts=3)
    assert (summary.written, summary.failed) == (2, 1)
    assert endpoint.questions == {"a": 3, "b": 3, "c": 1}
    endpoint.failures = {}
    assert run(tmp_path, str(tmp_path / "prompts.jsonl"), endpoint).written == 1


@pytest.mark.parametrize(
    "reply", [("text/html", b"<html>later"), ("application/json", b"{}"), ("application/json", b"{half")]
)
def test_fake_endpoint_whose_reply_is_no_completion_is_tried_again(
    reply: tuple[str, bytes], endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, "a", "b")
    endpoint.odd_replies = [reply] * 2
    summary = run(tmp_path, prompts, endpoint, attempts=3, concurrency=1)
    assert (summary.written, summary.failed) == (2, 0)
    assert endpoint.questions == {"a": 3, "b": 1}


def test_fake_endpoints_share_the_work_and_concurrency_is_bounded(
    endpoint: FakeEndpoint, second_endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    endpoint.delay = second_endpoint.delay = 0.02
    second_endpoint.flight = endpoint.flight
    prompts = write_prompts(tmp_path, *(f"question {i}" for i in range(40)))
    assert run(tmp_path, prompts, endpoint, second_endpoint, concurrency=6).written == 40
    assert 1 < endpoint.flight.most <= 6
    assert min(len(endpoint.requests), len(second_endpoint.requests)) > 12


def test_work_of_a_fake_endpoint_that_dies_goes_to_the_other(
    endpoint: FakeEndpoint, second_endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    second_endpoint.failures = {f"question {i}": 100 for i in range(20)}
    prompts = write_prompts(tmp_path, *(f"question {i}" for i in range(20)))
    assert run(tmp_path, prompts, endpoint, second_endpoint, first_pause=0.1).written == 20


def test_fake_endpoint_that_is_not_available_at_the_start_is_left_out(
    endpoint: FakeEndpoint, second_endpoint: FakeEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_endpoint.failures["Hi"] = 1
    prompts = write_prompts(tmp_path, "a", "b")
    assert run(tmp_path, prompts, endpoint, second_endpoint).written == 2
    assert not second_endpoint.questions
    told = " ".join(capsys.readouterr().err.split())
    assert f"{second_endpoint.url}/: does not answer chat completions" in told
    assert "going on without it" in told


def test_run_stops_when_the_fake_endpoint_only_fails_and_keeps_what_it_has(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    endpoint.failures = {f"q{i}": 100 for i in range(5, 40)}
    prompts = write_prompts(tmp_path, *(f"q{i}" for i in range(40)))
    with pytest.raises(GriffinError, match="in a row failed after 2 attempts"):
        run(tmp_path, prompts, endpoint, attempts=2)
    assert sorted(written(tmp_path)) == [f"p{i}" for i in range(5)]


def test_fake_endpoint_that_knows_no_token_ids_is_still_used(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.refuses_token_ids = True
    run(tmp_path, write_prompts(tmp_path, "a"), endpoint)
    assert "token_ids" not in written(tmp_path)["p0"]["conversations"][1]


def test_mix_of_temperatures_is_the_same_for_a_conversation_in_every_run(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, *(f"q{i}" for i in range(30)))
    drawn = []
    for name in ("one", "two"):
        run(tmp_path / name, prompts, endpoint, temperatures=(0.0, 0.8))
        drawn.append({key: record["temperature"] for key, record in written(tmp_path / name).items()})
    assert drawn[0] == drawn[1]
    assert set(drawn[0].values()) == {0.0, 0.8}


def test_wrong_model_name_is_told_with_the_names_that_the_fake_endpoint_serves(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    with pytest.raises(GriffinError, match=r"--model is 'other', expected one of \['target'\]"):
        run(tmp_path, write_prompts(tmp_path, "a"), endpoint, model="other")


def test_excluded_families_are_not_sent_to_the_fake_endpoint(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "prompt": i}) + "\n" for i in ("QWJhYvA_0", "hijklmn_0")))
    heldout = tmp_path / "heldout.json"
    heldout.write_text('[{"id": "QWJhYvA_4", "prompt": "x"}]')
    run(tmp_path, str(prompts), endpoint, exclude=[heldout])
    assert list(written(tmp_path)) == ["hijklmn_0"]


@pytest.mark.parametrize("prompt", ["a", "too long"])
def test_answers_and_refusals_of_two_models_of_a_fake_endpoint_are_never_mixed(
    prompt: str, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, prompt)
    run(tmp_path, prompts, endpoint)
    (file,) = tmp_path.glob("out*.jsonl")
    before = file.read_text()
    with pytest.raises(GriffinError, match=r"model of line 1 is 'target', expected 'other', or give another"):
        run(tmp_path, prompts, endpoint, model="other")
    assert file.read_text() == before


@pytest.mark.parametrize(
    "text",
    [
        "my notes\n",
        "my notes",
        json.dumps([{"id": "a", "conversations": []}]),
        '{"id": "a", "prompt": "a"}\n{"id": "b", "prompt": "b"}',
    ],
    ids=["lines", "a line that does not end", "an array", "prompts"],
)
def test_output_that_is_something_else_is_never_changed(
    text: str, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(GriffinError, match="line 1 is not a record"):
        run(tmp_path, write_prompts(tmp_path, "a"), endpoint)
    assert (tmp_path / "out.jsonl").read_text() == text


def test_a_source_is_never_the_output(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    text = json.dumps({"id": "a", "conversations": [{"from": "human", "value": "a"}]})
    for name in ("out.jsonl", "out.skipped.jsonl"):
        source = tmp_path / name
        source.write_text(text)
        with pytest.raises(GriffinError, match="which is read"):
            run(tmp_path, str(source), endpoint)
        with pytest.raises(GriffinError, match="which is read"):
            run(tmp_path, write_prompts(tmp_path, "b"), endpoint, exclude=[source])
        assert source.read_text() == text
        source.unlink()


def test_prompts_without_ids_of_their_own_are_told_apart_and_stay_one_family_for_prepare(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    sources = []
    for name, prompts in (("a", ["one", "two"]), ("b", ["three", "one"])):
        (tmp_path / name).mkdir()
        sources.append(tmp_path / name / "prompts.jsonl")
        numbered = ({"question_id": i, "prompt": prompt} for i, prompt in enumerate(prompts))
        bare = ({"prompt": prompt} for prompt in prompts)
        sources[-1].write_text("".join(json.dumps(r) + "\n" for r in (numbered if name == "a" else bare)))
    (tmp_path / "b" / "prompts.jsonl").open("a").write('{"id": "", "prompt": "three"}\n{"id": "x"}\n')
    settings = Settings("target", first_pause=0.01)
    summary = regenerate([endpoint.url], list(map(str, sources)), tmp_path / "out.jsonl", settings)
    assert summary.written == 4
    assert summary.skipped == {
        "the same id as another prompt": 1,
        "none of the fields conversations, messages, turns, prompt": 1,
    }
    found = [
        record for record in read_source(str(tmp_path / "out.jsonl")) if isinstance(record, Conversation)
    ]
    assert sorted(record.family for record in found) == ["one", "one", "three", "two"]
    again = regenerate([endpoint.url], list(map(str, sources)), tmp_path / "out.jsonl", settings)
    assert (again.written, again.done_before) == (0, 4)


def test_every_option_of_the_command_reaches_the_fake_endpoint(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, *([f"question {i}", "and then?", "why?"] for i in range(12)))
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"id": "p2", "prompt": "x"}) + "\n")
    out = tmp_path / "answers.jsonl"
    command = [
        "data",
        "regenerate",
        "--base-url",
        endpoint.url,
        "--model",
        "target",
        "--out",
        str(out),
        prompts,
    ]
    options = ["--temperature", "0", "--temperature", "0.8", "--max-tokens", "7", "--max-turns", "2"]
    done = CliRunner().invoke(app, [*command, *options, "--limit", "8", "--exclude", str(heldout)])
    assert done.exit_code == 0, done.output
    asked = endpoint.requests[1:]
    assert {request["temperature"] for request in asked} == {0, 0.8}
    assert {request["max_tokens"] for request in asked} == {7}
    assert "why?" not in endpoint.questions
    answered = {json.loads(line)["id"] for line in out.read_text().splitlines()}
    assert answered == {f"p{i}" for i in range(9)} - {"p2"}


def test_two_runs_never_write_to_one_file_of_a_fake_endpoints_answers(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    with (tmp_path / "out.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(GriffinError, match=r"out\.jsonl: another run is writing to it"):
            run(tmp_path, write_prompts(tmp_path, "question"), endpoint)
    assert not endpoint.questions


def test_bad_arguments_are_one_line_of_the_command(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "a")
    base = ["data", "regenerate", "--model", "target", "--out", str(tmp_path / "out.jsonl")]
    url = ["--base-url", "http://127.0.0.1:9/v1"]
    for arguments, words in (
        ([*url, prompts], "does not answer"),
        (["--base-url", "http://localhost:abc/v1", prompts], "--base-url"),
        ([*url, prompts, "--concurrency", "0"], "--concurrency"),
        ([*url, prompts, "--temperature", "-1"], "--temperature"),
        ([*url, prompts, "--temperature", "nan"], "--temperature"),
        ([*url, prompts, "--temperature", "inf"], "--temperature"),
        ([*url, str(tmp_path / "none.jsonl")], "there is no such file"),
    ):
        result = CliRunner().invoke(app, base + arguments)
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
        assert words in result.output
