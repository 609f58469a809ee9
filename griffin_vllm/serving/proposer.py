"""Drafting with a GRIFFIN head in vLLM's V1 model runner."""

from __future__ import annotations

from vllm.v1.spec_decode.eagle import EagleProposer


class GriffinProposer(EagleProposer):
    """vLLM's EAGLE proposer; it carries the name and the contract, and needs no code of its own.

    ``SpecDecodeBaseProposer.propose`` (``vllm/v1/spec_decode/llm_base_proposer.py``) already is
    GRIFFIN's decoding loop for a chain: it runs the model on the target's hidden states paired with
    the next tokens, hands the first output (predict) to ``compute_logits`` and feeds the second
    (regress) back as hidden states, K times, keeping the head's KV cache in step with what the
    target accepts. EAGLE returns one vector twice there; the dual head returns two.

    The subclass exists so that the runner's ``isinstance(drafter, EagleProposer)`` holds, logs and
    profiles name what is running, and draft-side features of GRIFFIN have their place.
    """
