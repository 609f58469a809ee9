"""The frozen target: its hidden states, its embeddings and its ``lm_head``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from griffin_vllm.bf16 import multiplies_bf16
from griffin_vllm.config import check_family
from griffin_vllm.errors import GriffinError


@dataclass(frozen=True)
class SharedWeights:
    """What a head borrows from its target, frozen: embeddings and ``lm_head``, both (V, d), as they are
    stored, and the bound that some targets put on their logits (``cap_logits``)."""

    embed_tokens: Tensor
    lm_head: Tensor
    logit_softcap: float | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> SharedWeights:
        tied = self.lm_head is self.embed_tokens
        embed_tokens = self.embed_tokens.to(device, dtype)
        lm_head = embed_tokens if tied else self.lm_head.to(device, dtype)
        return SharedWeights(embed_tokens, lm_head, self.logit_softcap)


@dataclass(frozen=True)
class SoftTargets:
    """The target's ``k`` most likely next tokens, most likely first: ids (..., k) and probabilities
    (..., k), float32. Where k is smaller than the vocabulary the rest of the mass is left out."""

    ids: Tensor
    probabilities: Tensor

    def __getitem__(self, rows: Tensor | slice) -> SoftTargets:
        return SoftTargets(self.ids[rows], self.probabilities[rows])


class Target:
    """A causal language model from transformers, in evaluation mode and without gradients."""

    def __init__(self, path: Path | str, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Load the target in ``dtype``, by default bf16 where that is fast; a checkpoint's own code is never run.

        Raises:
            GriffinError: the folder is not a causal language model that transformers can load.
        """
        self.config = target_config(path)
        if dtype is None:
            dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
        # transformers' SDPA drops Gemma 2's soft cap of the attention scores without a word
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=False,
                attn_implementation="eager" if capped else None,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise GriffinError(
                f"{path}: cannot be loaded as a target ({GriffinError.reason(error)})"
            ) from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        embed_tokens = model.get_input_embeddings().weight
        output = model.get_output_embeddings()
        tied = output is None or output.weight is embed_tokens
        self.shared = SharedWeights(
            embed_tokens,
            embed_tokens if tied else output.weight,
            getattr(self.config, "final_logit_softcapping", None),
        )

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Final normalised hidden states (B, T, d) of right-padded ``input_ids`` (B, T).

        A causal target never looks right, so the padding needs no attention mask.
        """
        return self.model.base_model(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits bent into (-softcap, softcap), as Gemma 2 has them; their order stays."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@torch.no_grad()
def soft_targets(
    features: Tensor, lm_head: Tensor, k: int, softcap: float | None = None, rows: int = 256
) -> SoftTargets:
    """The target's top-k distribution after each of ``features`` (N, d), ``rows`` at a time."""
    parts = []
    for chunk in features.split(rows):
        probabilities = cap_logits((chunk.to(lm_head.dtype) @ lm_head.T).float(), softcap).softmax(-1)
        parts.append(probabilities.topk(min(k, probabilities.shape[-1]), sorted=True))
    return SoftTargets(
        torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
    )


def target_config(path: Path | str) -> PreTrainedConfig:
    """The target's Hugging Face config, without loading its weights.

    Raises:
        GriffinError: there is none, or no head can be trained for such a target.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a value of another type than transformers expects is any kind of error
        raise GriffinError(
            f"{path}: has no readable config.json of a target ({GriffinError.reason(error)})"
        ) from error
    check_family(path, config.model_type)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise GriffinError.at(
            path,
            "quantization_config",
            quantization.get("quant_method"),
            "none; train on the model that was quantised, its head serves both",
        )
    return config
