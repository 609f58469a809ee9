"""Drafting with a GRIFFIN head in vLLM's V1 model runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.v1.spec_decode.eagle import EagleProposer

from griffin_vllm.serving.model import GriffinForCausalLM

if TYPE_CHECKING:
    from torch import nn


class DraftedEnough(Exception):  # noqa: N818 - nothing went wrong
    """Leaves vLLM's drafting loop, whose length is fixed when it begins."""


class GriffinProposer(EagleProposer):
    """vLLM's EAGLE proposer with what LoRA needs, and two ways of drafting less.

    ``SpecDecodeBaseProposer.propose`` (``vllm/v1/spec_decode/llm_base_proposer.py``) already is
    GRIFFIN's decoding loop for a chain: it runs the model on the target's hidden states paired with
    the next tokens, hands the first output (predict) to ``compute_logits`` and feeds the second
    (regress) back as hidden states, K times, keeping the head's KV cache in step with what the
    target accepts. EAGLE returns one vector twice there; the dual head returns two.

    *Dynamic depth*: greedy drafting stops as soon as no request's chain is, by the head's own
    probabilities, as likely as ``draft_stop_probability`` of the head's config. It needs a scheduler that
    waits for the drafts (a narrower draft tensor than K is fine with it) and no fixed shapes.

    *No drafts wanted* (K = 0 from a batch-size schedule): the head only writes its KV cache.
    """

    model: GriffinForCausalLM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        shapes_may_vary = (
            not config.scheduler_config.async_scheduling
            and config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
            and config.parallel_config.tensor_parallel_size == 1
        )
        stop_probability = getattr(self.draft_model_config.hf_config, "draft_stop_probability", 0.0)
        self.stop_probability = stop_probability if shapes_may_vary else 0.0
        self._drafts: list[torch.Tensor] = []
        self._likelihood: torch.Tensor | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head; a target that takes LoRA adapters shares its embeddings without them.

        An adapter's layer expects the target's own batch of tokens, which a later draft step is not.
        The V2 runner shares the same (``maybe_share_target_embed``).
        """
        super().load_model(target_model)
        embed_tokens = self.model.model.embed_tokens
        if isinstance(embed_tokens, BaseLayerWithLoRA):
            self.model.model.embed_tokens = embed_tokens.base_layer

    def propose(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._drafts, self._likelihood = [], None
        if isinstance(self.model, GriffinForCausalLM):
            self.model.writes_cache_only = kwargs.get("num_speculative_tokens") == 0
        try:
            return super().propose(*args, **kwargs)
        except DraftedEnough:
            return torch.stack(self._drafts, dim=1)

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Greedy drafts (N,) of predict (N, d), whatever the drafts of other temperatures are made by."""
        if not self.stop_probability:
            return self.model.get_top_tokens(hidden_states)
        tokens, probabilities = self.model.get_top_tokens_and_probabilities(hidden_states)
        self._drafts.append(tokens)
        self._likelihood = probabilities if self._likelihood is None else self._likelihood * probabilities
        if len(self._drafts) < self.num_speculative_tokens and self._likelihood.max() < self.stop_probability:
            raise DraftedEnough
        return tokens
