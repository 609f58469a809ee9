"""What a round hands on, step by step: no vLLM is needed to see it."""

from __future__ import annotations

import numpy as np
import torch

from griffin_vllm.serving.chains import Chains

FRESH, REPEATING = np.arange(9), np.array([5, 6, 7, 8, 5, 6])


def test_drafting_ends_with_the_last_chain_that_is_likely_and_each_keeps_what_it_had_until_then() -> None:
    chains = Chains([3, 3], stop_probability=0.4)
    assert not chains.extend(torch.tensor([1, 2]), torch.tensor([0.9, 0.3]), steps_left=2)
    assert chains.extend(torch.tensor([3, 4]), torch.tensor([0.4, 0.9]), steps_left=1)
    assert chains.handed_on(chains.drafts()) == [[1, 3], [2]]


def test_a_request_whose_text_goes_on_by_itself_wants_nothing_of_the_head() -> None:
    chains = Chains([3, 3, 0], [FRESH, REPEATING, REPEATING], lookup_min=2)
    assert chains.wanted_of_head == [True, False, False]
    for step in range(3):
        assert not chains.extend(torch.tensor([20 + step, 0, 0]), torch.ones(3), steps_left=2 - step)
    assert chains.handed_on(chains.drafts()) == [[20, 21, 22], [7, 8, 5], []]


def test_a_chain_that_comes_to_a_passage_of_its_text_goes_on_with_it() -> None:
    chains = Chains([4], [np.array([5, 6, 7, 8, 5])], lookup_min=2)
    assert chains.wanted_of_head == [True]
    distribution = torch.full((1, 9), 1 / 9)
    assert chains.extend(torch.tensor([6]), torch.tensor([0.5]), 3, distribution)
    assert chains.handed_on(chains.drafts()) == [[6, 7, 8, 5]]
    certain = chains.with_certain_drafts(chains.distributions())
    assert certain is not None
    torch.testing.assert_close(certain[0, 0], distribution[0])
    assert certain[0, 1:].argmax(-1).tolist() == [7, 8, 5]
    assert (certain[0, 1:].amax(-1) == 1).all()


def test_a_passage_is_drafted_as_far_as_it_is_likely_with_the_chain_before_it() -> None:
    def drafted(stop_probability: float, likelihood: float) -> list[int]:
        chains = Chains([8], [np.array([5, 6, 7, 8, 9, 5])], 2, stop_probability)
        assert chains.extend(torch.tensor([6]), torch.tensor([likelihood]), steps_left=7)
        [drafts] = chains.handed_on(chains.drafts())
        return drafts

    assert drafted(0.2, 1.0) == [6, 7, 8, 9, 5]
    assert drafted(0.2, 0.5) == [6, 7, 8]
    assert drafted(0.0, 0.5) == [6, 7, 8, 9, 5, 6, 7, 8]


def test_a_passage_that_ends_before_the_drafts_of_others_is_certain_as_far_as_it_goes() -> None:
    chains = Chains([4, 4], [REPEATING, FRESH], lookup_min=2, stop_probability=0.4)
    distributions = torch.full((2, 20), 1 / 20)
    for step in range(3):
        assert not chains.extend(torch.tensor([0, 10 + step]), torch.ones(2), 3 - step, distributions)
    chains.extend(torch.tensor([0, 13]), torch.ones(2), 0, distributions)
    drafts = chains.handed_on(chains.drafts())
    assert drafts == [[7, 8], [10, 11, 12, 13]]
    certain = chains.with_certain_drafts(chains.distributions())
    assert certain is not None
    assert certain[0, :2].argmax(-1).tolist() == [7, 8]
    assert (certain[0, :2].amax(-1) == 1).all()
    torch.testing.assert_close(certain[1], distributions[1].expand(4, -1))


def test_drafts_of_one_length_for_all_requests_stay_a_tensor() -> None:
    drafts = torch.tensor([[1, 2], [3, 4]])
    assert Chains([2, 2]).handed_on(drafts) is drafts
    assert Chains([2, 1]).handed_on(drafts) == [[1, 2], [3]]
