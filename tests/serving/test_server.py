"""An OpenAI-compatible server with a GRIFFIN head: streaming, and vLLM's counters in /metrics."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator

import pytest

from tests.serving import tiny
from tests.serving.server import Server, serve

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    target = tiny.write_target(folder / "target")
    head = tiny.write_head(folder / "head")
    speculation = ("--speculative-model", f"griffin:{head}", "--num-speculative-tokens", "4")
    # a worker process of its own, which is imported for seconds, is nothing that these tests look at
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with serve(target, folder / "log", "--max-model-len", "256", *speculation, **one_process) as running:
        yield running


def counter(server: Server, name: str) -> float:
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
    return sum(float(value) for value in re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE))


def test_a_streamed_answer_is_the_whole_answer(server: Server) -> None:
    request = {"model": "tiny", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60}
    whole = server.client().completions.create(**request).choices[0].text
    pieces = [
        chunk.choices[0].text
        for chunk in server.client().completions.create(**request, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == whole
    assert len(whole) > 10
    # an accepted draft arrives in one piece
    assert any(len(piece) > 1 for piece in pieces)


def test_a_streamed_chat_ends_at_a_stop_string(server: Server) -> None:
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello?"}],
        "temperature": 0,
        "max_tokens": 60,
    }
    whole = server.client().chat.completions.create(**request).choices[0].message.content
    stop = whole[20:22]
    chunks = list(server.client().chat.completions.create(**request, stop=stop, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole[: whole.index(stop)]


def test_metrics_count_drafts_and_acceptances(server: Server) -> None:
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    before = [counter(server, f"spec_decode_{name}") for name in names]
    server.client().completions.create(model="tiny", prompt="Once upon a time", temperature=0, max_tokens=60)
    drafts, drafted, accepted = (
        counter(server, f"spec_decode_{name}") - old for name, old in zip(names, before, strict=True)
    )
    assert drafts > 0
    assert drafted == 4 * drafts
    assert 0 < accepted < drafted
