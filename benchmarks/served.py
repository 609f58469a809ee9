"""The served case: ``vllm serve`` under load from vLLM's own client, ``vllm bench serve``."""

from __future__ import annotations

import argparse
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
from itertools import product
from pathlib import Path
from statistics import median_low
from typing import Any

from benchmarks.methods import Cell, Run, in_turn
from benchmarks.prompts import Conversation, PromptSet
from benchmarks.records import Record

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
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    if result.get("failed"):
        raise RuntimeError(f"{result['failed']} of {len(questions)} requests failed")
    row = {
        "num_prompts": result["completed"],
        "tokens_per_second": result["output_throughput"],
        "time_per_output_token_ms": result["mean_tpot_ms"],
        "time_to_first_token_ms": result["median_ttft_ms"],
    }
    if "spec_decode_acceptance_length" in result:
        row["vllm_acceptance_length"] = result["spec_decode_acceptance_length"]
    return row


def measure(
    args: argparse.Namespace,
    sets: Sequence[PromptSet],
    record: Record,
    planned: Sequence[Run],
    arguments: dict[str, Any],
) -> None:
    """Fill the record of ``speed.py`` with what the client measures of each planned run's server."""
    record.settings["client"] = "vllm bench serve"
    # a prompt is asked more than once; its second prefill must cost what the first did
    arguments = arguments | {"enable_prefix_caching": False}
    measured: dict[Cell, list[dict[str, Any]]] = {}
    for _, engine in in_turn(args.repeats, len(planned)):
        run = planned[engine]
        with record.attempt(run), server(run, arguments) as started:
            record.note_engine(run, asked(arguments))
            for prompts, temperature, concurrency in product(sets, run.temperatures, args.concurrency):
                fields = bench(
                    started.url,
                    args.target,
                    prompts.conversations,
                    max_tokens=args.max_tokens,
                    temperature=temperature,
                    concurrency=concurrency,
                )
                measured.setdefault(Cell(engine, prompts.name, temperature, concurrency), []).append(fields)
            record.results = _rows(planned, measured)


def _rows(planned: Sequence[Run], measured: dict[Cell, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = [
        {
            **planned[cell.engine].fields(),
            "dataset": cell.dataset,
            "temperature": cell.temperature,
            "concurrency": cell.concurrency,
            "repeats": len(repeats),
            # each of them is a measurement, so the middle one of an even number is the lower
            **{name: median_low(one[name] for one in repeats if name in one) for name in repeats[0]},
        }
        for cell, repeats in sorted(measured.items())
    ]
    _add_speedups(rows)
    return rows


def _add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Ratios of times per token to the first ``none`` under the same load."""

    def load(row: dict[str, Any]) -> tuple[str, float, int]:
        return row["dataset"], row["temperature"], row["concurrency"]

    # from the last to the first, which stays
    plain = {load(row): row for row in reversed(rows) if row["method"] == "none"}
    for row in rows:
        if load(row) in plain:
            baseline = plain[load(row)]["time_per_output_token_ms"]
            row["speedup"] = baseline / row["time_per_output_token_ms"]
