"""The trainer's head and the served one are the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from griffin_vllm.checkpoint import bundled_heads, find_head, load_tensors, open_head
from griffin_vllm.convert import convert
from griffin_vllm.training.attention import choose_attention
from griffin_vllm.training.head import DraftHead, EagleHead, GriffinHead, Streams
from griffin_vllm.training.target import SharedWeights, Target
from tests.serving.engines import engine, runner_of
from tests.serving.test_reference_vectors import draft
from tests.test_families import TARGETS, trainer, write_target
from tests.training.chat_targets import write_target as write_tokenizer

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
    # all of the chain, by the head
    config = json.loads((folder / "config.json").read_text())
    whole_chain = {"draft_stop_probability": 0.0, "prompt_lookup_min": 0}
    (folder / "config.json").write_text(json.dumps(config | whole_chain))
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
    _, expected = chain(head, target.shared, features, tokens, whole)

    with engine(
        model=str(demo_target), spec_model=f"griffin:{folder}", spec_tokens=K, max_num_batched_tokens=512
    ) as llm:
        _, drafted = draft(runner_of(llm), features, tokens, K)
    assert drafted[0].tolist() == expected


@pytest.mark.parametrize(("method", "draft_steps"), [("eagle", 1), ("hass", 3)])
def test_head_for_vllms_own_eagle_method_drafts_there_what_it_drafts_in_the_trainer(
    method: str, draft_steps: int, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    target_folder = write_target(tmp_path / "target", tokenizer, *TARGETS["llama 2, vicuna"])
    run = trainer(
        target_folder, tmp_path, method=method, stages=[{"draft_steps": draft_steps}], learning_rate=1e-2
    )
    folder = run.run()
    head = EagleHead(run.head_config, choose_attention("auto", torch.device("cpu")))
    tensors = load_file(folder / "model.safetensors")
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    target = Target(target_folder, torch.device("cpu"), torch.float32)
    ids = (torch.arange(25) * 7 + 5)[None]
    features, tokens = target.hidden_states(ids)[:, :-1], ids[:, 1:]
    expected, expected_tokens = chain(head, target.shared, features, tokens)

    with engine(
        model=str(target_folder),
        skip_tokenizer_init=True,
        speculative_config={"method": "eagle", "model": str(folder), "num_speculative_tokens": K},
    ) as llm:
        runner = runner_of(llm)
        assert type(runner.drafter.model).__module__ == "vllm.model_executor.models.llama_eagle"
        steps, drafted = draft(runner, features, tokens, K)

    torch.testing.assert_close(steps[0].predict, expected[0], atol=1e-4, rtol=1e-4)
    for step, vectors in zip(steps[1:], expected[1:], strict=True):
        torch.testing.assert_close(step.predict[0], vectors[-1], atol=1e-4, rtol=1e-4)
    assert drafted[0].tolist() == expected_tokens


@torch.no_grad()
def chain(
    head: DraftHead,
    shared: SharedWeights,
    features: torch.Tensor,
    tokens: torch.Tensor,
    drafted_ids: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], list[int]]:
    """K greedy drafts, one pass over the whole prefix each.

    Args:
        features: (1, T, d), the target's.
        tokens: (1, T), the token after each.
        drafted_ids: the draft vocabulary; None: all tokens.

    Returns:
        Predict of every pass, (T + n, d) each, and the drafted tokens.
    """
    whole = torch.arange(len(shared.lm_head)) if drafted_ids is None else drafted_ids
    predicted, drafted = [], []
    for _ in range(K):
        predict, regress = head(shared.embed_tokens[tokens], features, Streams())
        predicted.append(predict[0])
        drafted.append(int(whole[(predict[0, -1] @ shared.lm_head[whole].T).argmax()]))
        features = torch.cat([features, regress[:, -1:]], 1)
        tokens = torch.cat([tokens, torch.tensor([drafted[-1:]])], 1)
    return predicted, drafted
