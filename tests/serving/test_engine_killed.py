"""An engine that is killed in mid-request: the client hears of it, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from griffin_vllm.checkpoint import tensor_shapes
from tests.serving import tiny
from tests.serving.server import Server, serve

pytest.importorskip("vllm")


def kill_in_mid_request(server: Server) -> tuple[str, int]:
    """What the client of a streamed answer is told when the engine dies, and the server's exit status."""
    import openai

    children = psutil.Process(server.process.pid).children(recursive=True)
    [engine] = [child for child in children if "EngineCore" in "".join(child.cmdline())]
    stream = server.client().completions.create(
        model="tiny",
        prompt="Once upon a time",
        temperature=0,
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    engine.kill()
    with pytest.raises(openai.APIError) as told:
        list(stream)
    status = server.process.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    return str(told.value), status


def test_killed_engine_ends_the_server_as_it_ends_plain_vllms(tmp_path: Path) -> None:
    import torch

    target = tiny.write_target(tmp_path / "target")
    tensors = {name: 0.02 * torch.randn(shape) for name, shape in tensor_shapes(tiny.CONFIG).items()}
    # a layout that is converted below vLLM's cache folder
    head = tiny.write_reference_layout(tmp_path / "head", tiny.CONFIG, tensors)
    cache = tmp_path / "cache"
    ends = {}
    for name, flags in {"plain": (), "griffin": ("--speculative-model", f"griffin:{head}")}.items():
        with serve(
            target, tmp_path / name, "--max-model-len", "1024", *flags, VLLM_CACHE_ROOT=str(cache)
        ) as server:
            ends[name] = kill_in_mid_request(server)
        assert "EngineDeadError" in (tmp_path / name).read_text()
    assert ends["griffin"] == ends["plain"]
    [converted] = (cache / "griffin").iterdir()
    assert sorted(path.name for path in converted.iterdir()) == ["config.json", "model.safetensors"]
