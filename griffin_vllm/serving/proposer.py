"""Drafting with a GRIFFIN head in vLLM's V1 model runner."""

from __future__ import annotations

import torch
from vllm.v1.spec_decode.eagle import EagleProposer


class GriffinProposer(EagleProposer):
    """vLLM's EAGLE proposer, which carries the name and the contract.

    ``SpecDecodeBaseProposer.propose`` (``vllm/v1/spec_decode/llm_base_proposer.py``) already is
    GRIFFIN's decoding loop for a chain: it runs the model on the target's hidden states paired with
    the next tokens, hands the first output (predict) to ``compute_logits`` and feeds the second
    (regress) back as hidden states, K times, keeping the head's KV cache in step with what the
    target accepts. EAGLE returns one vector twice there; the dual head returns two.

    The subclass exists so that the runner's ``isinstance(drafter, EagleProposer)`` holds, logs and
    profiles name what is running, and draft-side features of GRIFFIN have their place.
    """

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Greedy drafts (N,) of predict (N, d), whatever the drafts of other temperatures are made by."""
        return self.model.get_top_tokens(hidden_states)
