"""The trainer's head and the served one are the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from griffin_vllm.checkpoint import bundled_heads, find_head, load_tensors, open_head
from griffin_vllm.convert import convert
from griffin_vllm.training.attention import choose_attention
from griffin_vllm.training.head import GriffinHead, Streams
from griffin_vllm.training.target import Target
from tests.serving.engines import engine, runner_of
from tests.serving.test_reference_vectors import draft

HEAD = "smollm2-135m-instruct"
PROMPTS = Path(__file__).parents[2] / "shared/data/prompts/mt_bench.jsonl"
K = 5


# Every third token, so that the first choice of many steps is none of them.
VOCABULARIES = {"all tokens": None, "a third of them": torch.arange(0, 49152, 3)}


@pytest.mark.skipif(HEAD not in bundled_heads(), reason=f"no bundled head {HEAD}")
@pytest.mark.skipif(not PROMPTS.exists(), reason=f"no prompts in {PROMPTS}")
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_training_head_and_served_head_draft_the_same_tokens_after_a_real_conversation(
    demo_target: Path, vocabulary: str, tmp_path: Path
) -> None:
    drafted_ids = VOCABULARIES[vocabulary]
    folder = convert(find_head(HEAD), tmp_path / "head", draft_vocabulary=drafted_ids).folder
    whole = torch.arange(49152) if drafted_ids is None else drafted_ids
    turns = json.loads(PROMPTS.read_text(encoding="utf-8").splitlines()[0])["turns"]
    chat = [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": "Hawaii is a place of"}]
    ids = AutoTokenizer.from_pretrained(demo_target).apply_chat_template(chat, return_tensors="pt")[
        "input_ids"
    ]
    target = Target(demo_target, torch.device("cpu"), torch.float32)
    features, tokens = target.hidden_states(ids)[:, :-1], ids[:, 1:]

    stored = open_head(folder)
    head = GriffinHead(stored.config, choose_attention("auto", torch.device("cpu")))
    tensors = load_tensors(stored.weights, head.state_dict())
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    expected, prefix, words = [], features, tokens
    with torch.no_grad():
        for _ in range(K):
            embeddings = target.shared.embed_tokens[words]
            predict, regress = head(embeddings, prefix, Streams())
            expected.append(int(whole[(predict[0, -1] @ target.shared.lm_head[whole].T).argmax()]))
            prefix = torch.cat([prefix, regress[:, -1:]], 1)
            words = torch.cat([words, torch.tensor([expected[-1:]])], 1)

    with engine(
        model=str(demo_target), spec_model=f"griffin:{folder}", spec_tokens=K, max_num_batched_tokens=512
    ) as llm:
        _, drafted = draft(runner_of(llm), features, tokens, K)
    assert drafted[0].tolist() == expected
