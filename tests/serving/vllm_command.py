"""The ``vllm`` command as a user runs it, at a second a run: one process imports vLLM, forks of it run commands."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Finished:
    """A command's exit status and all that it printed."""

    status: int
    output: str

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1]


class VllmCommand:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *arguments: str, before: str = "") -> Finished:
        """``vllm ARGUMENTS`` after the Python code ``before``.

        A run that takes longer than ``TIMEOUT`` seconds ends with status -14.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "before": before}) + "\n")
        self._process.stdin.flush()
        return Finished(**json.loads(self._process.stdout.readline()))


TIMEOUT = 20


@contextmanager
def vllm_command() -> Iterator[VllmCommand]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield VllmCommand(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve_commands() -> None:
    import signal
    import tempfile

    import vllm.engine.arg_utils
    import vllm.entrypoints.cli.main
    import vllm.entrypoints.cli.serve
    import vllm.entrypoints.openai.api_server
    from vllm.model_executor.models.registry import ModelRegistry

    # vLLM looks into a model's class in a process of its own, and keeps what it finds for this version; a command
    # that is the first to ask takes several times as long.
    for architecture in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        ModelRegistry.models[architecture].inspect_model_cls()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                signal.alarm(TIMEOUT)
                sys.argv = ["vllm", *asked["arguments"]]
                status = 1
                try:
                    exec(asked["before"], {})
                    vllm.entrypoints.cli.main.main()
                    status = 0
                except SystemExit as end:
                    status = end.code if isinstance(end.code, int) else 1
                except BaseException:
                    traceback.print_exc()
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(status)
            _, waited = os.waitpid(child, 0)
            output.seek(0)
            answer = {"status": os.waitstatus_to_exitcode(waited), "output": output.read()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve_commands()
