"""The served case: ``vllm serve`` under load from vLLM's own client, ``vllm bench serve``."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods import Run
from benchmarks.prompts import Conversation

START_SECONDS, STOP_SECONDS, HEALTH_SECONDS = 900, 60, 5
VLLM = str(Path(sys.executable).with_name("vllm"))


def asked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The engine arguments for a record: a server does not tell what vLLM made of them."""
    compilation = "eager" if arguments["enforce_eager"] else "as vLLM chooses"
    return {name: value for name, value in arguments.items() if name != "model"} | {
        "compilation": compilation
    }


@dataclass(frozen=True)
class Server:
    """``url``: without a path; ``process``: the API server, parent of all others."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def server(run: Run, arguments: dict[str, Any]) -> Iterator[Server]:
    """A server with the engine arguments of the offline engines.

    Raises:
        RuntimeError: the server ended, or was not ready after ``START_SECONDS``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM, "serve", arguments["model"], "--host", "127.0.0.1", "--port", str(port)]
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command.append(flag if value else f"--no-{flag[2:]}")
        elif name != "model":
            command += [flag, str(value)]
    if run.speculative_config:
        command += ["--speculative-config", json.dumps(run.speculative_config)]
    process = subprocess.Popen(command, stdout=sys.stderr)
    started = Server(f"http://127.0.0.1:{port}", process)
    try:
        _wait(process, started.url)
        yield started
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # its exit status tells; what hangs would share the cores with all that is measured after it
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    # past an http_proxy, which may not know this machine's own address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with status {process.returncode}")
        try:
            with opener.open(f"{url}/health", timeout=HEALTH_SECONDS):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"vllm serve was not ready after {START_SECONDS} s")


def bench(
    url: str,
    target: str,
    conversations: Sequence[Conversation],
    *,
    max_tokens: int,
    temperature: float,
    concurrency: int,
) -> dict[str, Any]:
    """First turns of the conversations as chat requests; the measured fields of a result row."""
    with tempfile.TemporaryDirectory() as folder:
        # ShareGPT form, because the client reads it with nothing but the standard library; the
        # answers are asked for by length only, so any text will do
        questions = [
            {"conversations": [{"value": conversation.turns[0]}, {"value": "-"}]}
            for conversation in conversations
        ]
        data = Path(folder) / "prompts.json"
        data.write_text(json.dumps(questions), encoding="utf-8")
        command = [VLLM, "bench", "serve", "--base-url", url, "--model", target]
        command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
        command += ["--dataset-name", "sharegpt", "--dataset-path", str(data), "--disable-shuffle"]
        command += ["--num-prompts", str(len(questions)), "--no-oversample"]
        command += ["--sharegpt-output-len", str(max_tokens), "--temperature", str(temperature)]
        command += ["--max-concurrency", str(concurrency), "--num-warmups", str(concurrency)]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    if found.get("failed"):
        raise RuntimeError(f"{found['failed']} of {len(questions)} requests failed")
    row = {
        "num_prompts": found["completed"],
        "tokens_per_second": found["output_throughput"],
        "time_per_output_token_ms": found["mean_tpot_ms"],
        "time_to_first_token_ms": found["median_ttft_ms"],
    }
    if "spec_decode_acceptance_length" in found:
        row["vllm_acceptance_length"] = found["spec_decode_acceptance_length"]
    return row
