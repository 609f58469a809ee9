"""The draft chains of one round, one a request: where the text gives them, where they end, what is handed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from griffin_vllm.serving.lookup import NOTHING, continuation

if TYPE_CHECKING:
    from collections.abc import Sequence


class Chains:
    """All requests' drafts of a round, while the head makes them one step after the other.

    ``most``: how many drafts are wanted of each request.
    ``texts``: of each request its text, the token sampled last included, (T,) of one integer type; none at all where
    nothing is looked up.
    ``stop_probability``: a chain ends once it is no likelier than this, by what the head says of its drafts, and by how
    much agrees (``lookup.py``) of those that were found.
    """

    def __init__(
        self,
        most: Sequence[int],
        texts: Sequence[np.ndarray] = (),
        lookup_min: int = 0,
        stop_probability: float = 0.0,
    ) -> None:
        self._most = most
        self._texts = list(texts)
        self._lookup_min = lookup_min
        self._stop_probability = stop_probability
        # Of each request the passage that its text goes on with, whole; its drafts once there is one, as far as they
        # are likely; and how many of those the head had made before.
        self.passages = [NOTHING] * len(most)
        if texts:
            self.passages = [
                continuation(text, lookup_min, k) if k else NOTHING
                for text, k in zip(texts, most, strict=True)
            ]
        self._found = [passage.likely_tokens(stop_probability) for passage in self.passages]
        self.made_before_found = [0] * len(most)
        self.wanted_of_head = [k > 0 and not tokens for k, tokens in zip(most, self._found, strict=True)]
        # The head's probability of each request's chain so far, (requests,), 0 where nobody wants it to go on; before
        # the first draft step just 1.
        self.likelihood: torch.Tensor | float = 1.0
        # Per draft step: tokens (requests,) and, where they were sampled, (requests, vocabulary).
        self._drafts: list[torch.Tensor] = []
        self._distributions: list[torch.Tensor] = []
        # Per draft step but the last: whether a request's chain was still likely after it.
        self._goes_on: list[torch.Tensor] = []

    @property
    def may_end(self) -> bool:
        """Whether a chain may end before the last draft step; only then ``extend`` is called, after each of them."""
        return self._stop_probability > 0 or bool(self._texts)

    def extend(
        self,
        tokens: torch.Tensor,
        probabilities: torch.Tensor,
        steps_left: int,
        distributions: torch.Tensor | None = None,
    ) -> bool:
        """Take one step's drafts with the head's top probabilities, (requests,) both, and look up how the texts go on
        with them. True if drafting can stop early: steps are left, and no chain wants them.

        ``distributions`` (requests, vocabulary) are those that the tokens were drawn from.
        """
        if not self._drafts and not all(self.wanted_of_head):
            self.likelihood = probabilities.new_tensor(self.wanted_of_head)
        self._drafts.append(tokens)
        if distributions is not None:
            self._distributions.append(distributions)
        self.likelihood = self.likelihood * probabilities
        if not steps_left:
            return False
        if self._texts:
            self._look_further(tokens, self.likelihood, steps_left)
        self._goes_on.append(self.likelihood > self._stop_probability)
        return not self._goes_on[-1].any()

    def _look_further(self, tokens: torch.Tensor, likelihood: torch.Tensor, steps_left: int) -> None:
        """What is found after ``tokens`` ends a request's chain: its place in ``likelihood`` becomes 0."""
        for i, (token, likely) in enumerate(zip(tokens.tolist(), likelihood.tolist(), strict=True)):
            if likely <= self._stop_probability:
                continue
            self._texts[i] = np.append(self._texts[i], self._texts[i].dtype.type(token))
            passage = continuation(self._texts[i], self._lookup_min, steps_left)
            if passage.tokens:
                made = [int(draft[i]) for draft in self._drafts]
                self.passages[i] = passage
                self._found[i] = made + passage.likely_tokens(self._stop_probability / likely)
                self.made_before_found[i] = len(made)
                likelihood[i] = 0.0

    def drafts(self) -> torch.Tensor:
        """What ``extend`` has been given so far, (requests, draft steps)."""
        return torch.stack(self._drafts, dim=1)

    def distributions(self) -> torch.Tensor | None:
        """What that was drawn from, (requests, draft steps, vocabulary); None for greedy drafts."""
        return torch.stack(self._distributions, dim=1) if self._distributions else None

    def handed_on(self, drafts: torch.Tensor) -> torch.Tensor | list[list[int]]:
        """Of the head's ``drafts`` (requests, draft steps) and those that were found the ones to verify, K or fewer; a
        list where requests get different numbers of them."""
        steps = drafts.shape[1]
        lengths = self._likely_lengths(steps)
        if not any(self._found) and set(lengths) == {steps} and min(self._most) >= steps:
            return drafts
        rows = zip(self._most, self._found, drafts.tolist(), lengths, strict=True)
        return [(tokens or row[:length])[:k] for k, tokens, row, length in rows]

    def _likely_lengths(self, steps: int) -> list[int]:
        """Of each request the number of its drafts up to the one that made its chain too unlikely."""
        if not self._goes_on:
            return [steps] * len(self._most)
        lengths: list[int] = (1 + torch.stack(self._goes_on).sum(dim=0)).tolist()
        return lengths

    def with_certain_drafts(self, distributions: torch.Tensor | None) -> torch.Tensor | None:
        """Distributions (requests, draft steps, vocabulary) of sampled drafts, with those of drafts that were found.

        Without distributions all drafts are taken as certain (``NO_DRAFT_PROBS`` of vLLM's ``rejection_sampler.py``).
        """
        if distributions is None or not any(self._found):
            return distributions
        requests, steps, vocabulary = distributions.shape
        longest = max(steps, *map(len, self._found))
        padded = distributions.new_zeros(requests, longest, vocabulary)
        padded[:, :steps] = distributions
        for rows, tokens, made in zip(padded, self._found, self.made_before_found, strict=True):
            if tokens:
                rows[made:] = 0
                rows[range(made, len(tokens)), tokens[made:]] = 1
        return padded
