"""vLLM's V2 model runner needs a GPU; how it loads a draft head runs here, on what the V1 runner has made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from griffin_vllm.convert import convert
from tests.serving import tiny
from tests.serving.engines import engine, runner_of


@pytest.mark.parametrize("reduced", [False, True], ids=["whole vocabulary", "reduced vocabulary"])
def test_v2_loader_on_cpu_gives_the_head_what_the_v1_runner_gives_it(tmp_path: Path, reduced: bool) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.gpu.spec_decode.eagle.utils import load_eagle_model

    target, head = tiny.write_target(tmp_path / "target"), tiny.write_head(tmp_path / "head")
    if reduced:
        convert(head, tmp_path / "reduced", draft_vocabulary=torch.arange(0, tiny.CONFIG.vocab_size, 3))
        head = tmp_path / "reduced"
    with engine(model=str(target), spec_model=f"griffin:{head}", spec_tokens=3) as llm:
        runner = runner_of(llm)
        first = runner.drafter.model
        layers = runner.vllm_config.compilation_config.static_forward_context
        attention = layers.pop(first.attention.layer_name)
        with set_current_vllm_config(runner.vllm_config):
            second = load_eagle_model(runner.model, runner.vllm_config)
        layers[first.attention.layer_name] = attention
        assert type(second) is type(first)
        assert second.model.embed_tokens is runner.model.model.embed_tokens
        assert (second.lm_head is runner.model.lm_head) == (not reduced)
        found, expected = second.state_dict(), first.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        predict = torch.randn(5, tiny.HIDDEN_SIZE)
        assert torch.equal(second.get_top_tokens(predict), first.get_top_tokens(predict))
