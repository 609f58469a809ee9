"""A tiny target that speaks printable ASCII, and a head that often guesses it right.

The target's next token is mostly a fixed permutation of the last one; its two layers disturb that, so
answers depend on the whole context. The head knows the permutation only: some drafts are accepted,
some are not, at every length.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from griffin_vllm.checkpoint import SAFETENSORS_FILE, save_head, tensor_shapes
from griffin_vllm.config import HeadConfig

EOS = "<eos>"
# Byte-level BPE writes a space as this letter.
CHARACTERS = ["\u0120", *sorted(set(string.printable) - set(string.whitespace))]
HIDDEN_SIZE = 64
# vLLM's CPU attention takes head dims from 32 up; two heads are the fewest that two ranks can share.
CONFIG = HeadConfig(
    hidden_size=HIDDEN_SIZE,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=1 + len(CHARACTERS),
    draft_vocab_size=1 + len(CHARACTERS),
    max_position_embeddings=1024,
    num_speculative_tokens=3,
)
# How much the target's layers disturb the permutation; about half of all drafts are then accepted.
DISTURBANCE = 2.5


def write_target(folder: Path) -> Path:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    target = LlamaForCausalLM(target_config())
    target.model.embed_tokens.weight.data.normal_()
    target.lm_head.weight.data[torch.randperm(CONFIG.vocab_size)] = target.model.embed_tokens.weight.data
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.data *= DISTURBANCE
        layer.mlp.down_proj.weight.data *= DISTURBANCE
    target.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def target_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=HIDDEN_SIZE**-0.5,
        eos_token_id=0,
        bos_token_id=None,
    )


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {EOS: 0} | {character: i for i, character in enumerate(CHARACTERS, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def write_head(folder: Path, config: HeadConfig = CONFIG, target: Path | None = None) -> Path:
    """A head in the served layout, float32, whose guess is the permutation of ``write_target``."""
    torch.manual_seed(1)
    tensors = {name: 0.02 * torch.randn(shape) for name, shape in tensor_shapes(config).items()}
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor += 1
    # the fusion hands on the token's embedding, the layer behind it adds noise
    tensors["fc.fc.weight"][:, : config.hidden_size] += torch.eye(config.hidden_size)
    named = config.model_copy(update={"target": str(target)}) if target else config
    save_head(folder, named.to_served(), tensors, dtype=None)
    return folder


def write_uncertain_head(folder: Path, config: HeadConfig) -> Path:
    """A head that gives its drafts about 0.86; as :func:`write_head` writes it, it is certain of each."""
    head = write_head(folder, config)
    weights = head / SAFETENSORS_FILE
    tensors = load_file(weights)
    tensors["fc.fc.weight"] *= 0.1
    save_file(tensors, weights)
    return head


def write_reference_layout(folder: Path, config: HeadConfig, tensors: dict[str, torch.Tensor]) -> Path:
    """A head as the GRIFFIN authors publish them: ``pytorch_model.bin`` and a plain config."""
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(
        json.dumps(config.layer_config("llama") | {"architectures": ["LlamaForCausalLM"]})
    )
    return folder
