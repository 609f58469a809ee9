"""An OpenAI-compatible server with a GRIFFIN head: streaming, and vLLM's counters in /metrics."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import tiny

pytest.importorskip("vllm")

START_SECONDS = 240


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    target = tiny.write_target(folder / "target")
    head = tiny.write_head(folder / "head")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(target)]
    command += ["--speculative-model", f"griffin:{head}", "--num-speculative-tokens", "4"]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    command += ["--kv-cache-memory-bytes", str(1 << 26)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(server, address, folder / "log")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"no server after {START_SECONDS} s:\n{log.read_text()}")


def client(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none")


def counter(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    return sum(float(value) for value in re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE))


def test_a_streamed_answer_is_the_whole_answer(url: str) -> None:
    request = {"model": "tiny", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60}
    whole = client(url).completions.create(**request).choices[0].text
    pieces = [
        chunk.choices[0].text
        for chunk in client(url).completions.create(**request, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == whole
    assert len(whole) > 10
    # an accepted draft arrives in one piece
    assert any(len(piece) > 1 for piece in pieces)


def test_a_streamed_chat_ends_at_a_stop_string(url: str) -> None:
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello?"}],
        "temperature": 0,
        "max_tokens": 60,
    }
    whole = client(url).chat.completions.create(**request).choices[0].message.content
    stop = whole[20:22]
    chunks = list(client(url).chat.completions.create(**request, stop=stop, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole[: whole.index(stop)]


def test_metrics_count_drafts_and_acceptances(url: str) -> None:
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    before = [counter(url, f"spec_decode_{name}") for name in names]
    client(url).completions.create(model="tiny", prompt="Once upon a time", temperature=0, max_tokens=60)
    drafts, drafted, accepted = (
        counter(url, f"spec_decode_{name}") - old for name, old in zip(names, before, strict=True)
    )
    assert drafts > 0
    assert drafted == 4 * drafts
    assert 0 < accepted < drafted
