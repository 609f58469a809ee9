"""Drafts that a request's own text gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from griffin_vllm.serving.lookup import LONGEST, NOTHING, Passage, continuation
from tests.serving import tiny
from tests.serving.engines import engine, runner_of, spec_counters
from tests.serving.test_draft_depth import ask

K = 4


@pytest.mark.parametrize(
    ("tokens", "n", "k", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], 2, 4, [3, 9, 1, 2]),
        ([1, 2, 3, 9, 1, 2], 2, 6, [3, 9, 1, 2, 3, 9]),
        ([1, 2, 3, 9, 1, 2], 2, 1, [3]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, 1, [4]),
        ([8, 1, 2, 3, 1, 2, 4, 8, 1, 2], 2, 1, [3]),
        ([7, 7, 7, 7], 3, 4, [7, 7, 7, 7]),
        ([1, 2, 1, 2, 1], 3, 4, [2, 1, 2, 1]),
        ([1, 2, 3, 4], 2, 4, []),
        ([5], 1, 4, []),
        ([], 1, 4, []),
    ],
)
def test_the_latest_place_that_agrees_furthest_is_continued(
    tokens: list[int], n: int, k: int, expected: list[int]
) -> None:
    assert continuation(np.array(tokens, dtype=np.int32), n, k).tokens == expected


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, LONGEST + 1), st.integers(1, 6))
def test_a_continuation_is_what_a_plain_search_finds(tokens: list[int], n: int, k: int) -> None:
    for length in range(max(n, LONGEST), n - 1, -1):
        places = [i for i in range(len(tokens) - length) if tokens[i : i + length] == tokens[-length:]]
        if places:
            break
    expected = Passage((tokens[places[-1] + length :] * k)[:k], length) if places else NOTHING
    assert continuation(np.array(tokens, dtype=np.int64), n, k) == expected


def test_no_more_than_the_longest_agreement_is_looked_for() -> None:
    assert continuation(np.full(30, 7), 2, 1).agreeing == LONGEST
    assert continuation(np.array([1, 2, 3, 9, 1, 2, 3]), 2, 1).agreeing == 3
    # the second of three like passages agrees to the longest with the third, the first beyond it
    passage = list(range(100, 100 + LONGEST))
    text = [*range(4), *passage, 50, *passage, 60, *range(4), *passage]
    assert continuation(np.array(text), 2, 1) == Passage([60], LONGEST)


@pytest.mark.parametrize(
    ("agreeing", "stop_probability", "drafts"),
    [(2, 0.0, 8), (2, 0.2, 4), (3, 0.2, 6), (4, 0.2, 8), (2, 0.5, 2), (LONGEST, 0.5, 8), (2, 0.99, 1)],
)
def test_the_further_a_passage_agrees_the_more_of_it_is_drafted(
    agreeing: int, stop_probability: float, drafts: int
) -> None:
    assert Passage(list(range(8)), agreeing).likely_tokens(stop_probability) == list(range(drafts))


def head(folder: Path, **settings: Any) -> str:
    return str(tiny.write_head(folder, tiny.CONFIG.model_copy(update=settings)))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_target(tmp_path_factory.mktemp("models") / "target"))


REPEATING, FRESH = "one two three one two three one two", "hello world"


@pytest.mark.parametrize(("stop_probability", "padded"), [(0.0, True), (0.6, False)])
def test_answers_are_those_of_the_target_alone_and_drafts_are_looked_up(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_probability: float, padded: bool
) -> None:
    from griffin_vllm.serving import chains, proposer

    texts: list[list[int]] = []
    found: list[list[int]] = []
    texts_so_far = proposer.GriffinProposer._texts_so_far

    def noted_texts(self: Any, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        searched = texts_so_far(self, *args, **kwargs)
        for request, text in zip(self.runner.input_batch.req_ids, searched, strict=True):
            prompt = self.runner.requests[request].prompt_token_ids
            assert text.tolist()[: len(prompt)] == prompt
            texts.append(text.tolist())
        return searched

    def noted(tokens: np.ndarray, n: int, k: int) -> Passage:
        passage = continuation(tokens, n, k)
        found.append(passage.tokens)
        return passage

    monkeypatch.setattr(chains, "continuation", noted)
    monkeypatch.setattr(proposer.GriffinProposer, "_texts_so_far", noted_texts)
    with engine(model=target) as llm:
        expected = ask(llm, REPEATING, FRESH)
        prompts = [llm.get_tokenizer().encode(text) for text in (REPEATING, FRESH)]
    looks_up = head(tmp_path / "head", prompt_lookup_min=2, draft_stop_probability=stop_probability)
    speculation = {"method": "griffin", "model": looks_up, "num_speculative_tokens": K}
    with engine(
        model=target, speculative_config=speculation | {"disable_padded_drafter_batch": not padded}
    ) as llm:
        assert ask(llm, REPEATING, FRESH) == expected
        assert ask(llm, REPEATING) == expected[:1]
        assert spec_counters(llm)["num_accepted_tokens"] > 0
    assert any(found)
    whole = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
    # what was searched is the request's text so far, to the token sampled last (a round may go past the answer's end)
    assert all(any(text[: len(one)] == one[: len(text)] for one in whole) for text in texts)
    assert {len(text) for text in texts} >= {len(prompts[0]) + 1, len(prompts[1]) + 1}


def test_a_step_whose_drafts_are_all_looked_up_runs_no_draft_step(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from griffin_vllm.serving import chains
    from griffin_vllm.serving.model import GriffinForCausalLM

    monkeypatch.setattr(chains, "continuation", lambda tokens, n, k: Passage([5] * k, LONGEST))
    writes_only: list[bool] = []
    forward = GriffinForCausalLM.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        writes_only.append(self.writes_cache_only)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GriffinForCausalLM, "forward", counted)
    with engine(
        model=target, spec_model=f"griffin:{head(tmp_path / 'head', prompt_lookup_min=1)}", spec_tokens=K
    ) as llm:
        writes_only.clear()
        ask(llm, REPEATING, FRESH)
    assert writes_only
    assert all(writes_only)


@pytest.mark.parametrize("stop_probability", [0.0, 0.3])
def test_a_chain_of_the_head_goes_on_with_what_is_looked_up(
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drafted: list[tuple[int, int]],
    stop_probability: float,
) -> None:
    from griffin_vllm.serving import chains

    searches: list[int] = []

    def after_one_draft(tokens: np.ndarray, n: int, k: int) -> Passage:
        searches.append(k)
        return NOTHING if k == K else Passage([5] * k, LONGEST)

    monkeypatch.setattr(chains, "continuation", after_one_draft)
    with engine(model=target) as llm:
        expected = ask(llm, FRESH, REPEATING)
    looks_up = head(tmp_path / "head", prompt_lookup_min=1, draft_stop_probability=stop_probability)
    with engine(model=target, spec_model=f"griffin:{looks_up}", spec_tokens=K) as llm:
        assert ask(llm, FRESH, REPEATING) == expected
    # the text before drafting, and once more with the head's first draft; then the chain is whole
    assert set(searches) == {K, K - 1}
    assert {drafts for _, drafts in drafted} == {K}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each search the number of tokens that had to stand before."""
    from griffin_vllm.serving import chains

    found: list[int] = []

    def noted(tokens: np.ndarray, n: int, k: int) -> Passage:
        found.append(n)
        return continuation(tokens, n, k)

    monkeypatch.setattr(chains, "continuation", noted)
    return found


def test_an_operator_can_turn_lookup_on_and_off(target: str, tmp_path: Path, asked: list[int]) -> None:
    for of_head, of_operator in ((2, 0), (0, 3)):
        speculation = {
            "method": "griffin",
            "model": head(tmp_path / str(of_head), prompt_lookup_min=of_head),
            "num_speculative_tokens": K,
            "prompt_lookup_min": of_operator,
        }
        asked.clear()
        with engine(model=target, speculative_config=speculation) as llm:
            ask(llm, REPEATING)
        assert set(asked) == ({of_operator} if of_operator else set())


def test_drafts_found_beside_sampled_ones_are_certain(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    from griffin_vllm.serving import chains

    certain = 7

    def in_even_texts(tokens: np.ndarray, n: int, k: int) -> Passage:
        """At once, or after the head's first draft."""
        return Passage([certain] * k, LONGEST) if len(tokens) % 2 == 0 else NOTHING

    monkeypatch.setattr(chains, "continuation", in_even_texts)
    speculation = {
        "method": "griffin",
        "model": head(tmp_path / "head", prompt_lookup_min=2),
        "num_speculative_tokens": K,
        "draft_sample_method": "probabilistic",
    }
    with engine(model=target, speculative_config=speculation) as llm:
        drafter, seen = runner_of(llm).drafter, []
        propose = drafter.propose

        def keep(*arguments: Any, **named: Any) -> Any:
            drafts = propose(*arguments, **named)
            seen.append((drafts, list(drafter.chains.made_before_found), drafter._last_draft_probs))
            return drafts

        drafter.propose = keep
        llm.generate(
            [REPEATING, FRESH, "42"], SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
        )
    kinds = set()
    for drafts, made, distributions in seen:
        for i, (tokens, by_head) in enumerate(zip(drafts, made, strict=True)):
            assert len(tokens) == K
            if distributions is None:
                assert list(tokens) == [certain] * K
                continue
            torch.testing.assert_close(distributions[i].sum(-1), torch.ones(K))
            assert (distributions[i, by_head:, certain] == 1).all()
            assert (distributions[i, range(by_head), tokens[:by_head]] > 0).all()
            kinds.add(by_head)
    assert kinds == {0, 1}
