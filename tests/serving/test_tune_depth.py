"""The threshold of `griffin tune` is the one that a round's costs and the head's certainty ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from griffin_vllm.serving.chains import Chains
from griffin_vllm.serving.lookup import Passage
from griffin_vllm.serving.tune_depth import (
    Chain,
    Depth,
    _recorded,
    _start_recording,
    chains,
    choose_depth,
    drafts_made,
)
from griffin_vllm.serving.tuning import Point


def points(*step_ms: float) -> list[Point]:
    return [
        Point(batch_size=1, num_speculative_tokens=k, step_ms=ms, acceptance_length=1, tokens_per_second=1)
        for k, ms in enumerate(step_ms)
    ]


SURE, UNSURE = Chain([0.9, 0.8, 0.7, 0.6], 4, 4), Chain([0.3, 0.1, 0.05, 0.01], 0, 4)


@pytest.mark.parametrize(
    ("depth", "made"),
    [
        (Depth(4, 0.0), 4),
        (Depth(2, 0.0), 2),
        (Depth(4, 0.2), 2),
        (Depth(4, 0.5), 1),
        (Depth(1, 0.2), 1),
        # as unlikely as that is too unlikely, as in chains.py
        (Depth(4, 0.1), 2),
    ],
)
def test_the_draft_that_makes_a_chain_unlikely_is_the_last(depth: Depth, made: int) -> None:
    assert drafts_made(UNSURE, depth) == made
    assert drafts_made(SURE, depth) == depth.num_speculative_tokens


def test_a_head_that_knows_when_it_is_right_drafts_deep_and_stops_early() -> None:
    best = choose_depth([SURE, UNSURE, UNSURE], points(30, 33, 36, 39, 42), 1)
    assert best.num_speculative_tokens == 4
    # the unsure one's first draft is as likely as 0.3
    assert 0.3 <= best.draft_stop_probability < 0.6


def test_a_head_whose_certainty_says_nothing_gets_no_threshold() -> None:
    alike = [Chain([0.5, 0.25, 0.125, 0.06], accepted, 4) for accepted in (0, 1, 4)]
    assert choose_depth(alike, points(30, 33, 36, 39, 42), 4) == Depth(4, 0.0)


@pytest.mark.parametrize(("lookup_ms", "drafts"), [(33, 4), (200, 1)])
def test_drafts_that_were_looked_up_cost_their_verification(lookup_ms: float, drafts: int) -> None:
    looked_up = [Chain([1.0] * 4, 4, 0, lookup_ms)] * 4
    assert choose_depth([*looked_up, UNSURE], points(30, 34, 38, 42, 46), 1).num_speculative_tokens == drafts


@pytest.mark.parametrize(("plain_ms", "drafts"), [(30, 4), (12, 0)])
def test_lookup_may_pay_where_no_number_of_the_heads_own_drafts_does(plain_ms: float, drafts: int) -> None:
    looked_up = [Chain([1.0] * 4, 4, 0, 50)] * 4
    found = choose_depth([*looked_up, UNSURE], points(plain_ms, 50, 60, 70, 80), 0)
    assert found.num_speculative_tokens == drafts


def test_nothing_is_chosen_from_nothing() -> None:
    assert choose_depth([], points(30, 33, 36), 2) == Depth(2, 0.0)
    assert choose_depth([SURE], points(30, 33), 1) == Depth(1, 0.0)


def test_a_round_is_told_of_with_the_drafts_that_it_verified_with_an_engine_of_our_own() -> None:
    # The prefill drafts for the first round, each round for the next one.
    drafted = [
        ([0.9, 0.8], []),
        ([], [0.6, 0.5, 0.4]),
        ([], [0.9, 0.8, 0.7]),
        ([0.5], [0.3, 0.2]),
        ([0.4], []),
    ]
    rounds = [(0.03125, [2]), (0.0625, [4]), (0.05, [1]), (0.06, [3])]
    recorded = iter([[([0.1], [])], drafted])  # what an earlier answer left is not of this one
    engine: Any = SimpleNamespace(collective_rpc=lambda _: [next(recorded)])
    assert chains(engine, iter(rounds)) == [
        Chain([0.9, 0.8], 1, 2),
        Chain([0.6, 0.5, 0.4], 3, 0, 62.5),
        Chain([0.9, 0.8, 0.7], 0, 0),
        Chain([0.5, 0.3, 0.2], 2, 1),
    ]


class Drafter:
    """Stands for the proposer: one draft, made with probability 0.5."""

    shapes_may_vary = True
    draft_model_config = SimpleNamespace(hf_config=SimpleNamespace(prompt_lookup_min=0))
    model = SimpleNamespace(get_top_tokens_and_probabilities=lambda *_: (None, torch.tensor([0.5])))
    chains = Chains([1])

    def _greedy_sample(self) -> torch.Tensor:
        return torch.tensor([7])

    def propose(self) -> list[list[int]]:
        return [self._greedy_sample().tolist()]


def test_the_parts_of_a_long_prompt_are_no_rounds_with_a_drafter_of_our_own() -> None:
    drafter: Any = Drafter()
    unfinished = np.array([True])
    runner = SimpleNamespace(drafter=drafter, discard_request_mask=SimpleNamespace(np=unfinished))
    worker = SimpleNamespace(model_runner=runner)
    assert _start_recording(worker)
    drafter.propose()
    drafter.propose()
    unfinished[0] = False
    drafter.propose()
    assert _recorded(worker) == [([0.5], [])]


@pytest.mark.parametrize(("by_head", "before"), [(0, 1.0), (1, 0.5)])
def test_what_is_looked_up_is_as_likely_as_its_agreement_and_what_the_head_made_before_it_with_a_drafter_of_our_own(
    by_head: int, before: float
) -> None:
    passage = Passage([1, 2, 3], 2)

    class LooksUp(Drafter):
        def propose(self) -> list[list[int]]:
            made = [int(self._greedy_sample()) for _ in range(by_head)]
            return [made + passage.tokens]

    drafter: Any = LooksUp()
    drafter.chains = Chains([4])
    drafter.chains.passages = [passage]
    finished = SimpleNamespace(np=np.array([False]))
    worker = SimpleNamespace(model_runner=SimpleNamespace(drafter=drafter, discard_request_mask=finished))
    assert _start_recording(worker)
    drafter.propose()
    [(made, looked_up)] = _recorded(worker)
    assert made == [0.5] * by_head
    assert looked_up == pytest.approx([before * (2 / (2 + n)) ** 1.5 for n in (1, 2, 3)])
