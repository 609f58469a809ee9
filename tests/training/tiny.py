"""A tiny random target that answers prompts itself, as data to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from griffin_vllm.config import HeadConfig
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import prepare
from tests.training.chat_targets import write_target as write_tokenizer

HIDDEN = 64
# A run of seconds.
SETTINGS: dict[str, Any] = {
    "stages": [{"draft_steps": 1, "epochs": 2, "k_weight": 0.0}, {"draft_steps": 2, "epochs": 2}],
    "batch_tokens": 256,
    "learning_rate": 1e-3,
    "soft_target_tokens": 16,
    "precision": "fp32",
    "validation_samples": 2,
}
# Of the target and of heads for it.
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEAD = HeadConfig(**SIZES, head_dim=16, vocab_size=9, draft_vocab_size=9)


def settings(target: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    values = {**SETTINGS, "target": str(target), "data": str(data), "output": str(output), **changes}
    return TrainConfig.check(values, Path("settings.yaml"))


def write_target(folder: Path) -> Path:
    """A two-layer llama with a chat template; its answers depend on what it has just said."""
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(
    folder: Path,
    target: Path,
    conversations: int = 12,
    answer_tokens: int = 40,
    validation_share: float = 0.3,
) -> Path:
    """A token dataset of the target's own greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = LlamaForCausalLM.from_pretrained(target)
    records: list[dict[str, Any]] = []
    for number in range(conversations):
        question = f"What is {number} and {number * 7}?"
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        output = model.generate(prompt, max_new_tokens=answer_tokens, do_sample=False, eos_token_id=None)
        answer = output[0, prompt.shape[1] :].tolist()
        turn = {
            "from": "gpt",
            "value": tokenizer.decode(answer),
            "token_ids": answer,
            "finish_reason": "length",
        }
        records.append({"id": f"talk{number}", "conversations": [{"from": "human", "value": question}, turn]})
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    prepare(str(target), [str(source)], folder, validation_share=validation_share)
    return folder
