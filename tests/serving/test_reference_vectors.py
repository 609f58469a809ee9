"""The served head gives what the GRIFFIN authors' implementation gives."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.serving.engines import engine, runner_of

VECTORS = Path(
    os.environ.get("GRIFFIN_REFERENCE_VECTORS")
    or Path(__file__).parents[2].parent / "shared/data/reference-vectors"
)
FILES = sorted(VECTORS.glob("*.safetensors"))
TOLERANCE = 1e-4


class Step(NamedTuple):
    """What the draft model returned in one call; both (tokens, d)."""

    predict: torch.Tensor
    regress: torch.Tensor


@pytest.mark.skipif(not FILES, reason=f"no reference vectors in {VECTORS}")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_served_model_gives_the_reference_vectors(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    with safe_open(file, "pt") as stored:
        config = json.loads(stored.metadata()["config"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    head = write_reference_layout(tmp_path / "head", config, tensors)
    target = write_target_around(tmp_path / "target", config, tensors)
    features, tokens = tensors["input.hidden_states"], tensors["input.input_ids"]
    rows, length, _ = features.shape
    k = len(tensors["decode.tokens"])

    with engine(
        model=str(target),
        skip_tokenizer_init=True,
        spec_model=f"griffin:{head}",
        spec_tokens=k,
        max_model_len=length + k + 1,
        max_num_batched_tokens=rows * (length + k + 1),
        max_num_seqs=rows,
        # the smallest page that CPU attention takes
        block_size=32,
    ) as llm:
        steps, drafted = draft(runner_of(llm), features, tokens, k)

    shape = (rows, length, -1)
    torch.testing.assert_close(
        steps[0].predict.view(shape), tensors["train.step0.predict"], atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(
        steps[0].regress.view(shape), tensors["train.step0.regress"], atol=TOLERANCE, rtol=0
    )
    # The first draft token comes from the last position of the prefix, row 0 of every later call is request 0.
    chain = [Step(steps[0].predict[length - 1], steps[0].regress[length - 1])]
    chain += [Step(step.predict[0], step.regress[0]) for step in steps[1:]]
    # nothing is fed back from the last draft step, so its regress is not computed
    for name, steps_with_it in {"predict": k, "regress": k - 1}.items():
        found = torch.stack([getattr(step, name) for step in chain[:steps_with_it]])
        torch.testing.assert_close(found, tensors[f"decode.{name}"][:steps_with_it], atol=TOLERANCE, rtol=0)
    assert drafted[0].tolist() == tensors["decode.tokens"].tolist()


def write_reference_layout(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights.") and name != "weights.lm_head"
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_target_around(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A target with the file's embeddings and lm_head; its layer is never asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    embeddings, lm_head = tensors["weights.embed_tokens.weight"], tensors["weights.lm_head"]
    target = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=lm_head.shape[0],
            hidden_size=lm_head.shape[1],
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
            head_dim=config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
            max_position_embeddings=1 << 16,
            tie_word_embeddings=False,
        )
    )
    target.model.embed_tokens.weight.data.copy_(embeddings)
    target.lm_head.weight.data.copy_(lm_head)
    target.save_pretrained(folder)
    return folder


def draft(
    runner: Any, features: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[list[Step], torch.Tensor]:
    """Let vLLM's proposer draft k tokens after B requests of T tokens, as after their prefill.

    Args:
        runner: V1 model runner with a GRIFFIN proposer; its KV cache must be unused.
        features: (B, T, d) the target's hidden states.
        tokens: (B, T) the token after each.
        k: tokens to draft.

    Returns:
        What the draft model returned in each of its k calls, and the drafted tokens (B, k).
    """
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backend import CommonAttentionMetadata

    rows, length, _ = features.shape
    block = runner.drafter.block_size
    pages = -(-(length + k) // block)
    # Page 0 is vLLM's null page.
    table = 1 + torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    positions = torch.arange(length)
    slots = table[:, positions // block] * block + positions % block
    starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    lengths = torch.full((rows,), length, dtype=torch.int32)
    batch = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts.clone(),
        "seq_lens": lengths,
        "_seq_lens_cpu": lengths.clone(),
        "_num_computed_tokens_cpu": torch.zeros(rows, dtype=torch.int32),
        "seq_lens_cpu_upper_bound": lengths.clone(),
        "num_reqs": rows,
        "num_actual_tokens": rows * length,
        "max_query_len": length,
        "max_seq_len": length,
        "block_table_tensor": table,
        "slot_mapping": slots.reshape(-1).long(),
    }
    known = {field.name for field in fields(CommonAttentionMetadata)}
    metadata = CommonAttentionMetadata(**{name: value for name, value in batch.items() if name in known})

    steps: list[Step] = []

    def keep(_module: Any, _arguments: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        steps.append(Step(output[0].clone(), output[1].clone()))

    hook = runner.drafter.model.register_forward_hook(keep)
    # The proposer gets x_0 ... x_(T-1) and the sampled x_T, and pairs f_t with x_(t+1) itself.
    seen = torch.cat((torch.zeros_like(tokens[:, :1]), tokens[:, :-1]), dim=1)
    with torch.inference_mode(), set_current_vllm_config(runner.vllm_config):
        drafted = runner.drafter.propose(
            num_speculative_tokens=k,
            target_token_ids=seen.reshape(-1).int(),
            target_positions=positions.repeat(rows),
            target_hidden_states=features.reshape(rows * length, -1),
            next_token_ids=tokens[:, -1].int(),
            token_indices_to_sample=None,
            common_attn_metadata=metadata,
            sampling_metadata=runner.input_batch._make_sampling_metadata(),
        )
    hook.remove()
    assert len(steps) == k
    return steps, drafted
