"""Drafting less where it does not pay changes no answer and leaves the head's KV cache whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from griffin_vllm.checkpoint import SAFETENSORS_FILE
from tests.serving import tiny
from tests.serving.engines import engine, spec_counters

if TYPE_CHECKING:
    from vllm import LLM

K = 4


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_target(tmp_path_factory.mktemp("models") / "target"))


def ask(llm: LLM, *texts: str) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(texts, parameters)]


def test_drafting_stops_where_the_chain_is_unlikely(target: str, tmp_path: Path) -> None:
    texts = ["hello world", "how are you?", "42"]
    answers: list[list[list[int]]] = []
    depths: list[float] = []
    accepted: list[float] = []
    for stop_probability in (0.0, 0.6, 0.999):
        config = tiny.CONFIG.model_copy(update={"draft_stop_probability": stop_probability})
        head = tiny.write_head(tmp_path / str(stop_probability), config)
        weights = head / SAFETENSORS_FILE
        tensors = load_file(weights)
        # as it is written the head is certain of every draft; now it gives them about 0.86
        tensors["fc.fc.weight"] *= 0.1
        save_file(tensors, weights)
        with engine(model=target, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
            # one at a time, then together: the batch goes on while one of its chains is likely
            answers.append([ask(llm, text)[0] for text in texts] + ask(llm, *texts))
            counters = spec_counters(llm)
        depths.append(counters["num_draft_tokens"] / counters["num_drafts"])
        accepted.append(counters["num_accepted_tokens"] / counters["num_drafts"])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][:3] == answers[0][3:]
    assert depths[0] > 0.9 * K
    assert 1.1 < depths[1] < depths[0]
    assert depths[2] == 1
    assert accepted[0] >= accepted[1] > accepted[2] > 0


def head_cache(worker: Any) -> torch.Tensor:
    [layer] = worker.model_runner.drafter.model.model.layers
    return layer.self_attn.attn.kv_cache.clone()


def test_a_step_that_wants_no_drafts_writes_the_same_cache(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from griffin_vllm.serving.model import GriffinDecoderLayer

    head = tiny.write_head(tmp_path / "head")
    speculating = {
        "model": target,
        "speculative_config": {
            "method": "griffin",
            "model": str(head),
            "num_speculative_tokens": K,
            "num_speculative_tokens_per_batch_size": [(1, 16, 0)],
        },
    }
    calls = []
    write_cache = GriffinDecoderLayer.write_cache

    def counted(self: Any, *args: torch.Tensor) -> None:
        calls.append(len(args[0]))
        write_cache(self, *args)

    monkeypatch.setattr(GriffinDecoderLayer, "write_cache", counted)
    caches = []
    for apart in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not apart:
                patch.setattr(GriffinDecoderLayer, "writes_cache_apart", False)
            calls.clear()
            with engine(**speculating) as llm:
                answers = ask(llm, "hello world", "how are you?")
                caches.append((answers, llm.collective_rpc(head_cache)[0]))
        # the prefill, and every step after it
        assert len(calls) == (40 if apart else 0)
    assert caches[0][0] == caches[1][0]
    assert caches[0][1].abs().sum() > 0
    torch.testing.assert_close(caches[0][1], caches[1][1])


def test_drafting_begins_again_when_the_batch_is_small_enough(target: str, tmp_path: Path) -> None:
    head = tiny.write_head(tmp_path / "head")
    schedule = {"num_speculative_tokens_per_batch_size": [(1, 1, K), (2, 16, 0)]}
    with engine(model=target) as llm:
        expected = ask(llm, "hello world", "how are you?")
    with engine(
        model=target,
        speculative_config={"method": "griffin", "model": str(head), "num_speculative_tokens": K, **schedule},
    ) as llm:
        assert ask(llm, "hello world", "how are you?") == expected
        assert ask(llm, "hello world") == expected[:1]
        assert spec_counters(llm)["num_accepted_tokens"] > 0
