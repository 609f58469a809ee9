"""Drafting with a GRIFFIN head in vLLM's V1 model runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.v1.spec_decode.eagle import EagleProposer

from griffin_vllm.serving import fixed_depth
from griffin_vllm.serving.chains import Chains
from griffin_vllm.serving.model import GriffinForCausalLM
from griffin_vllm.serving.postponed import PostponedWrites

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.sample.metadata import SamplingMetadata


class DraftedEnough(Exception):  # noqa: N818 - nothing went wrong
    """Leaves vLLM's drafting loop, whose length is fixed when it begins."""


def _last_rows(metadata: CommonAttentionMetadata, token_indices_to_sample: torch.Tensor | None) -> list[int]:
    """Of each request, which of the step's tokens is the last that was accepted."""
    if token_indices_to_sample is None:
        return [end - 1 for end in metadata.query_start_loc_cpu[1:].tolist()]
    return token_indices_to_sample.tolist()


class GriffinProposer(EagleProposer):
    """vLLM's EAGLE proposer that drafts less where less is enough.

    ``SpecDecodeBaseProposer.propose`` (``vllm/v1/spec_decode/llm_base_proposer.py``) already is
    GRIFFIN's decoding loop for a chain: it runs the model on the target's hidden states paired with
    the next tokens, hands the first output (predict) to ``compute_logits`` and feeds the second
    (regress) back as hidden states, K times, keeping the head's KV cache in step with what the
    target accepts. EAGLE returns one vector twice there; the dual head returns two.

    Around that loop: how many drafts each request wants (``_most_of_each``), what its text gives without the head and
    where its chain ends (``chains.py``), and, where nobody wants a draft of the head, only entries of its KV cache, of
    many steps at once if all requests decode (``postponed.py``). From the last draft step nothing is fed back, so the
    head leaves regress out.

    A scheduler that waits for the drafts takes fewer than K, and other numbers of each request. An asynchronous one has
    made room for K of each request already: there a request is drafted for that wants none in a mixed batch, and a
    batch of none but such gets zeros, as ``_input_fits_in_drafter`` of vLLM's ``gpu_model_runner.py`` does it.
    """

    model: GriffinForCausalLM

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        config, head = self.vllm_config, self.draft_model_config.hf_config
        # Ranks of data parallelism that share experts must all take the same number of draft steps.
        self.steps_may_vary = config.parallel_config.data_parallel_size == 1
        self.scheduler_waits = not config.scheduler_config.async_scheduling
        self.shapes_may_vary = not fixed_depth.reasons(config)
        self.stop_probability: float = head.draft_stop_probability if self.shapes_may_vary else 0.0
        self.lookup_min: int = head.prompt_lookup_min if self.shapes_may_vary else 0
        # vLLM lets a draft model have a shorter context than its target; with us that is a limit of each request.
        shorter = self.draft_model_config.max_model_len
        limits = (head.draft_context_limit, shorter if shorter < config.model_config.max_model_len else None)
        self.context_limit: int | None = min((limit for limit in limits if limit is not None), default=None)
        # A KV connector reads blocks behind the proposer's back, and saves a layer's where the layer attends.
        self.has_connector = config.kv_transfer_config is not None
        # See also initialize_attn_backend.
        self.may_postpone = self.steps_may_vary and not self.has_connector
        self.postponed = PostponedWrites(self._write_cache)
        # Those of this round, and how many draft steps of it are still to be made.
        self.chains = Chains([])
        self._missing = 0

    @property
    def _unwrapped(self) -> GriffinForCausalLM | None:
        """The head, or None where the runner has put it into a ``BreakableCUDAGraphWrapper``: a captured graph does the
        same in every round."""
        return self.model if isinstance(self.model, GriffinForCausalLM) else None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head; a target that takes LoRA adapters shares its embeddings without them.

        An adapter's layer expects the target's own batch of tokens, which a later draft step is not.
        The V2 runner shares the same (``maybe_share_target_embed``).
        """
        super().load_model(target_model)
        # for the touch point in hooks.py; the runner makes its sampler after its drafter
        self.runner.rejection_sampler.serves_griffin = True
        if self.steps_may_vary:
            # so that the runner always calls propose, which looks at the length by itself
            self.runner.effective_drafter_max_model_len = (
                self.runner.max_model_len + self.num_speculative_tokens
            )
        embed_tokens = self.model.model.embed_tokens
        if isinstance(embed_tokens, BaseLayerWithLoRA):
            self.model.model.embed_tokens = embed_tokens.base_layer

    def initialize_attn_backend(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """Also see whether the cache's blocks are the head's own.

        The groups of a hybrid target (Gemma 3) lie over each other in one memory, so a block that a request has given
        back may hold the target's entries by the time that the head's are written.
        """
        super().initialize_attn_backend(kv_cache_config, *args, **kwargs)
        self.may_postpone &= len(kv_cache_config.kv_cache_groups) == 1

    def propose(
        self,
        *,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        **rest: Any,
    ) -> torch.Tensor | list[list[int]]:
        """Drafts after a step of the target over N tokens.

        Args:
            num_speculative_tokens: the most that are wanted of a request; 0 only writes the head's KV cache.
            target_token_ids, target_positions: (N,) what the target has seen, and where.
            target_hidden_states: (N, d) its final normalised hidden states there.
            next_token_ids: (requests,) the token sampled last.
            token_indices_to_sample: (requests,) of each the last of its N tokens that was accepted; None: the last.
            rest: what only vLLM's own loop needs.

        Returns:
            (requests, K or fewer); a list where requests get different numbers of them.
        """
        # Not every way below leads through vLLM's own loop.
        self._last_draft_probs: torch.Tensor | None = None
        # An asynchronous scheduler's step is still running on the GPU: nothing of it is looked at.
        ends = _last_rows(common_attn_metadata, token_indices_to_sample) if self.scheduler_waits else []
        most = self._most_of_each(
            num_speculative_tokens, common_attn_metadata, ends, target_positions, next_token_ids
        )
        texts: list[np.ndarray] = []
        if self.lookup_min and any(most):
            starts = common_attn_metadata.query_start_loc_cpu.tolist()
            texts = self._texts_so_far(starts, ends, target_token_ids, target_positions, next_token_ids)
        self.chains = Chains(most, texts, self.lookup_min, self.stop_probability)
        steps = self._steps(num_speculative_tokens, most)
        if steps == 0 and self._only_decodes(common_attn_metadata):
            requests = len(next_token_ids)
            # of one token a request, the token after it is the next one
            slots = common_attn_metadata.slot_mapping[:requests]
            self.postponed.add(
                next_token_ids, target_positions[:requests], target_hidden_states[:requests], slots
            )
            drafts = next_token_ids.new_empty(requests, 0, dtype=torch.int64)
        else:
            self.postponed.write()
            drafts = self._draft(
                steps,
                target_token_ids=target_token_ids,
                target_positions=target_positions,
                target_hidden_states=target_hidden_states,
                next_token_ids=next_token_ids,
                token_indices_to_sample=token_indices_to_sample,
                common_attn_metadata=common_attn_metadata,
                **rest,
            )
        self._last_draft_probs = self.chains.with_certain_drafts(self._last_draft_probs)
        if self.scheduler_waits:
            return self.chains.handed_on(drafts)
        return drafts if steps else drafts.new_zeros(len(most), num_speculative_tokens)

    def _most_of_each(
        self,
        k: int,
        metadata: CommonAttentionMetadata,
        ends: list[int],
        target_positions: torch.Tensor,
        next_token_ids: torch.Tensor,
    ) -> list[int]:
        """How many drafts each request wants: ``k``, or fewer near the model's maximum length (left to itself vLLM's
        runner does not call a proposer there: its scheduler takes K zeros for each request's drafts, and the head's KV
        cache misses the step); none beyond the head's ``draft_context_limit``."""
        room, within_limit = self._room(metadata), self._within_limit(metadata)
        if not self.scheduler_waits:
            return [k if within and room >= k else 0 for within in within_limit]
        most = [min(k, room) if within else 0 for within in within_limit]
        last_positions = target_positions[ends].tolist()
        self._leave_out_unfinished_prompts(most, last_positions, next_token_ids)
        self._stay_below_min_tokens(most, last_positions)
        return most

    def _steps(self, k: int, most: Sequence[int]) -> int:
        """How many draft steps the head makes; with 0 only its cache is written."""
        if not self.steps_may_vary:
            return k
        if not any(self.chains.wanted_of_head):
            return 0
        return max(most) if self.scheduler_waits else k

    def _leave_out_unfinished_prompts(
        self, most: list[int], last_positions: Sequence[int], next_token_ids: torch.Tensor
    ) -> None:
        """A request whose prompt goes on in the next step wants no drafts in ``most``: the scheduler would drop them.
        vLLM says that its next token is the prompt's last one; in ``next_token_ids`` it is made the one after this
        step's part, which is what the head's cache needs."""
        text = self.runner.input_batch.token_ids_cpu
        for i in self.runner.discard_request_mask.np[: len(most)].nonzero()[0].tolist():
            most[i] = 0
            next_token_ids[i] = int(text[i, last_positions[i] + 1])

    def _stay_below_min_tokens(self, most: list[int], last_positions: Sequence[int]) -> None:
        """A request with ``min_tokens`` wants no more drafts than leave the target's own token behind them below that
        length: vLLM keeps *that* token from ending the answer whenever the step began below it. Where the scheduler
        does not wait the numbers of drafts are fixed, and an answer may end later than plain vLLM's."""
        batch, requests = self.runner.input_batch, self.runner.requests
        for i, request in enumerate(batch.req_ids[: len(most)]):
            least = getattr(requests[request].sampling_params, "min_tokens", 0)
            if least and most[i]:
                answered = last_positions[i] + 2 - int(batch.num_prompt_tokens[i])
                if answered < least:
                    most[i] = min(most[i], least - answered - 1)

    def _room(self, metadata: CommonAttentionMetadata) -> int:
        """How many draft steps the longest request can take until the head's position passes the last one."""
        return max(0, self.runner.max_model_len - metadata.max_seq_len + 1)

    def _within_limit(self, metadata: CommonAttentionMetadata) -> list[bool]:
        """Of each request, whether its context, drafts under verification included, is within the limit."""
        if self.context_limit is None or metadata.max_seq_len <= self.context_limit:
            return [True] * metadata.num_reqs
        lengths = metadata.seq_lens_cpu_upper_bound[: metadata.num_reqs]
        return (lengths <= self.context_limit).tolist()

    def _texts_so_far(
        self,
        starts: Sequence[int],
        ends: Sequence[int],
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        next_token_ids: torch.Tensor,
    ) -> list[np.ndarray]:
        """Of each request what the runner had before this step, the step's accepted tokens (from its place in
        ``starts`` to that in ``ends``), and what was sampled."""
        before = self.runner.input_batch.token_ids_cpu
        step, positions = target_token_ids.cpu().numpy(), target_positions.cpu().numpy()
        sampled = next_token_ids.cpu().numpy().astype(before.dtype)
        return [
            np.concatenate([before[i, : positions[start]], step[start : end + 1], sampled[i : i + 1]])
            for i, (start, end) in enumerate(zip(starts, ends, strict=False))
        ]

    def _only_decodes(self, metadata: CommonAttentionMetadata) -> bool:
        """Whether the step has one token of each request, and its cache entries can be written later."""
        head = self._unwrapped
        return (
            self.may_postpone and metadata.max_query_len == 1 and head is not None and head.writes_cache_apart
        )

    def _write_cache(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        mapping = {self.model.attention.layer_name: slots}
        with set_forward_context(None, self.vllm_config, num_tokens=len(slots), slot_mapping=mapping):
            self.model.model.write_cache(input_ids, positions, hidden_states)

    def _draft(self, steps: int, **step_of_target: Any) -> torch.Tensor:
        """vLLM's own loop of ``steps`` draft steps, or fewer: (requests, drafts)."""
        self._missing = steps
        if head := self._unwrapped:
            head.writes_cache_only = steps == 0 and not self.has_connector
            head.feeds_back = steps > 1
        try:
            return super().propose(num_speculative_tokens=steps, **step_of_target)
        except DraftedEnough:
            self._last_draft_probs = self.chains.distributions()
            return self.chains.drafts()

    def _sample_draft_tokens(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._missing -= 1
        if head := self._unwrapped:
            head.feeds_back = self._missing > 1
        tokens, distributions = super()._sample_draft_tokens(*args, **kwargs)
        if distributions is not None and self.chains.may_end:
            # Not of the token that was drawn: an unlikely one is accepted as often as the target wants it, too.
            self._go_on_or_stop(tokens, distributions.amax(dim=-1), distributions)
        return tokens, distributions

    def _sample_from_logits(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drafts (N,) drawn from logits (N, vocabulary), among the tokens that can be drafted, and the distributions
        (N, vocabulary): of a reduced draft vocabulary the rest is never looked at."""
        head = self._unwrapped
        vocabulary = head.draft_vocabulary if head else None
        if vocabulary is None:
            return super()._sample_from_logits(logits, sampling_metadata)
        tokens, distributions = super()._sample_from_logits(vocabulary.narrow(logits), sampling_metadata)
        return vocabulary.to_target(tokens), vocabulary.widen(distributions, 0.0)

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Greedy drafts (N,) of predict (N, d), whatever the drafts of other temperatures are made by."""
        if not self.chains.may_end:
            return self.model.get_top_tokens(hidden_states)
        tokens, probabilities = self.model.get_top_tokens_and_probabilities(hidden_states)
        self._go_on_or_stop(tokens, probabilities)
        return tokens

    def _go_on_or_stop(
        self,
        tokens: torch.Tensor,
        probabilities: torch.Tensor,
        distributions: torch.Tensor | None = None,
    ) -> None:
        """Add one draft step to the chains, and leave vLLM's loop where none of them goes on."""
        if self.chains.extend(tokens, probabilities, self._missing, distributions):
            raise DraftedEnough
