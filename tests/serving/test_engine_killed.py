"""An engine that is killed in mid-request: the client hears of it, and nothing is left behind."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
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
    from vllm import envs

    target = tiny.write_target(tmp_path / "target")
    tensors = {name: 0.02 * torch.randn(shape) for name, shape in tensor_shapes(tiny.CONFIG).items()}
    # a layout that is converted below vLLM's cache folder
    head = tiny.write_reference_layout(tmp_path / "head", tiny.CONFIG, tensors)
    cache = tmp_path / "cache"
    # what vLLM knows of its model classes, which costs a process for each to find out
    known = Path(envs.VLLM_CACHE_ROOT) / "modelinfos"
    if known.is_dir():
        shutil.copytree(known, cache / known.name)

    def end(name: str, *flags: str) -> tuple[str, int]:
        flags = ("--max-model-len", "1024", *flags)
        with serve(target, tmp_path / name, *flags, VLLM_CACHE_ROOT=str(cache)) as server:
            told = kill_in_mid_request(server)
        assert "EngineDeadError" in (tmp_path / name).read_text()
        return told

    with ThreadPoolExecutor() as at_once:
        plain = at_once.submit(end, "plain")
        griffin = at_once.submit(end, "griffin", "--speculative-model", f"griffin:{head}")
    assert griffin.result() == plain.result()
    [converted] = (cache / "griffin").iterdir()
    assert sorted(path.name for path in converted.iterdir()) == ["config.json", "model.safetensors"]
