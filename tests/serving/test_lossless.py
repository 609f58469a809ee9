"""Temperature 0, float32: every answer under GRIFFIN is, token by token, plain vLLM's.

Each case runs the same requests on an engine without and on one with a head that is right about half of
the time, so drafts are accepted and rejected at every length.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from griffin_vllm.convert import convert
from tests.serving import tiny
from tests.serving.engines import engine, runner_of, spec_counters

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import RequestOutput

K = 4


class Answer(NamedTuple):
    tokens: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


class Models(NamedTuple):
    target: str
    head: str


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return Models(str(tiny.write_target(folder / "target")), f"griffin:{tiny.write_head(folder / 'head')}")


Ask = Callable[["LLM"], Any]
Compare = Callable[..., Any]


@pytest.fixture
def compare(models: Models) -> Compare:
    """Ask a plain engine and a speculating one the same; they must agree, and the second must speculate."""

    def compare(ask: Ask, k: int = K, only_speculating: dict[str, Any] | None = None, **both: Any) -> Any:
        with engine(model=models.target, **both) as llm:
            expected = ask(llm)
        speculating = {"spec_model": models.head, "spec_tokens": k, **both, **(only_speculating or {})}
        with engine(model=models.target, **speculating) as llm:
            found = ask(llm)
            counters = spec_counters(llm)
        assert found == expected
        assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]
        return expected

    return compare


def sampling(**arguments: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**({"temperature": 0, "max_tokens": 48, "ignore_eos": True} | arguments))


def prompts(number: int, length: int = 20) -> list[str]:
    """Random texts whose lengths lie around ``length``."""
    source = random.Random(length)
    return [
        "".join(source.choices(tiny.CHARACTERS[1:], k=source.randint(length // 2, 3 * length // 2)))
        for _ in range(number)
    ]


def answers(outputs: list[RequestOutput]) -> list[Answer]:
    return [
        Answer(list(one.token_ids), one.text, one.finish_reason, one.stop_reason)
        for output in outputs
        for one in output.outputs
    ]


def generate(llm: LLM, texts: list[str], parameters: Any) -> list[Answer]:
    return answers(llm.generate(texts, parameters, use_tqdm=False))


def preemptions(llm: LLM) -> float:
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.mark.parametrize("k", [1, 5])
def test_sixteen_at_once_and_one_at_a_time(compare: Compare, k: int) -> None:
    texts = prompts(16)

    def ask(llm: LLM) -> list[list[Answer]]:
        together = generate(llm, texts, sampling())
        alone = [generate(llm, [text], sampling())[0] for text in texts[:1]]
        assert together[:1] == alone
        return [together]

    compare(ask, k=k, max_num_seqs=16)


def test_prompts_that_are_asked_again_without_a_prefix_cache(compare: Compare) -> None:
    texts = prompts(4, length=120)
    compare(
        lambda llm: generate(llm, texts, sampling()) + generate(llm, texts, sampling()),
        enable_prefix_caching=False,
    )


def test_prompts_whose_beginning_is_in_the_prefix_cache(compare: Compare) -> None:
    start = "".join(prompts(5, length=24))
    texts = [start + text for text in prompts(4)]

    def ask(llm: LLM) -> list[Answer]:
        generate(llm, [start], sampling(max_tokens=1))
        outputs = llm.generate(texts, sampling(), use_tqdm=False)
        assert all(output.num_cached_tokens >= 32 for output in outputs)
        return answers(outputs)

    compare(ask, enable_prefix_caching=True, block_size=32)


def test_prompt_longer_than_a_chunk(compare: Compare) -> None:
    texts = [text[:190] for text in prompts(4, length=200)]
    compare(
        lambda llm: generate(llm, texts, sampling()),
        enable_chunked_prefill=True,
        max_num_batched_tokens=64,
        max_num_seqs=4,
    )


def test_preempted_requests(compare: Compare) -> None:
    texts = prompts(8, length=40)

    def ask(llm: LLM) -> list[Answer]:
        found = generate(llm, texts, sampling(max_tokens=150))
        assert preemptions(llm) > 0
        return found

    # 14 pages of 32 tokens in 3 layers, of which 8 requests of about 190 tokens want 48
    page = 32 * 2 * tiny.HIDDEN_SIZE * 4
    compare(ask, block_size=32, kv_cache_memory_bytes=3 * 14 * page, enable_prefix_caching=False)


@pytest.mark.parametrize("schedule", [None, [(1, 4, K), (5, 16, 0)]])
def test_every_way_of_drafting_less_at_once(
    schedule: list[tuple[int, int, int]] | None,
    compare: Compare,
    tmp_path: Path,
    drafted: list[tuple[int, int]],
) -> None:
    limit = 160
    options = {"prompt_lookup_min": 2, "draft_stop_probability": 0.7, "draft_context_limit": limit}
    whole = tiny.write_uncertain_head(tmp_path / "whole", tiny.CONFIG.model_copy(update=options))
    vocabulary = torch.tensor([i for i in range(tiny.CONFIG.vocab_size) if i % 5])
    head = convert(whole, tmp_path / "head", draft_vocabulary=vocabulary).folder
    texts = prompts(8, length=40)
    lengths = [sampling(max_tokens=150 - 10 * i) for i in range(8)]
    page = 32 * 2 * tiny.HIDDEN_SIZE * 4

    def ask(llm: LLM) -> list[list[Answer]]:
        found = [generate(llm, texts, lengths), generate(llm, texts[:1], sampling())]
        assert preemptions(llm) > 0
        return found

    config = {"num_speculative_tokens_per_batch_size": schedule} if schedule else None
    compare(
        ask,
        only_speculating={"spec_model": f"griffin:{head}", "speculative_config": config},
        block_size=32,
        kv_cache_memory_bytes=3 * 14 * page,
    )
    assert {drafts for context, drafts in drafted if context > limit + 1} == {0}
    assert len({drafts for context, drafts in drafted if context < limit - K}) > 1


def test_requests_that_end_inside_a_draft(compare: Compare, models: Models) -> None:
    texts = prompts(6)
    with engine(model=models.target) as llm:
        whole = generate(llm, texts, sampling())

    def ask(llm: LLM) -> list[Answer]:
        found = []
        for length in range(1, 2 * K):
            found += generate(llm, texts, sampling(max_tokens=length))
        for at in range(10, 10 + 2 * K):
            stops = [sampling(stop=answer.text[at : at + 2]) for answer in whole]
            found += generate(llm, texts, stops)
            stops = [sampling(stop_token_ids=[answer.tokens[at]]) for answer in whole]
            found += generate(llm, texts, stops)
        return found + generate(llm, texts, sampling(ignore_eos=False, max_tokens=200))

    found = compare(ask)
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    assert any(answer.stop_reason is None and answer.finish_reason == "stop" for answer in found), "no EOS"


def test_answers_that_would_end_at_about_their_least_length(compare: Compare, models: Models) -> None:
    texts = prompts(6)
    with engine(model=models.target) as llm:
        whole = generate(llm, texts, sampling())

    def ask(llm: LLM) -> list[Answer]:
        found = []
        for at in range(8, 20):
            ends = [
                sampling(stop_token_ids=[answer.tokens[at]], min_tokens=at, ignore_eos=False)
                for answer in whole
            ]
            found += generate(llm, texts, ends)
        return found

    # with one draft a step the target's own token is often the one that ends an answer
    compare(ask, k=1)


def test_several_answers_to_one_prompt(compare: Compare) -> None:
    # Greedy requests may not ask for several; the most likely token of one at a temperature is the same.
    parameters = sampling(n=3, temperature=1.0, top_k=1)
    found = compare(lambda llm: generate(llm, prompts(3), parameters))
    assert len(found) == 9


def test_log_probabilities_of_answer_and_prompt(compare: Compare) -> None:
    def ask(llm: LLM) -> list[Any]:
        outputs = llm.generate(prompts(4), sampling(logprobs=3, prompt_logprobs=2), use_tqdm=False)
        positions = [
            position
            for output in outputs
            for position in [*output.outputs[0].logprobs, *output.prompt_logprobs[1:]]
        ]
        return [
            {token: (round(entry.logprob, 3), entry.rank) for token, entry in position.items()}
            for position in positions
        ]

    compare(ask)


def test_log_probabilities_of_tokens_that_are_asked_for(compare: Compare) -> None:
    from vllm import SamplingParams

    if "logprob_token_ids" not in SamplingParams.__struct_fields__:
        pytest.skip("this vLLM has no logprob_token_ids")
    wanted = [5, 7]

    def ask(llm: LLM) -> list[Any]:
        # beside one that wants the usual ones, and alone with those that want none
        parameters = [sampling(logprobs=2, logprob_token_ids=wanted), sampling(logprobs=2), sampling()]
        outputs = llm.generate(prompts(3), parameters, use_tqdm=False)
        outputs += llm.generate(prompts(2), [parameters[0], parameters[2]], use_tqdm=False)
        outputs += llm.generate(prompts(2), parameters[1:], use_tqdm=False)
        return [
            (
                list(output.outputs[0].token_ids),
                [
                    {token: round(entry.logprob, 3) for token, entry in position.items()}
                    for position in output.outputs[0].logprobs or []
                ],
            )
            for output in outputs
        ]

    found = compare(ask)
    assert all(set(wanted) <= set(position) for position in found[0][1])


def test_answers_in_a_schema(compare: Compare) -> None:
    import json

    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    parameters = sampling(structured_outputs=StructuredOutputsParams(json=schema), ignore_eos=False)
    found = compare(lambda llm: generate(llm, prompts(4), parameters))
    assert all(set(json.loads(answer.text)) == {"name", "old"} for answer in found)


def test_sequences_that_reach_max_model_len(compare: Compare) -> None:
    texts = [text[:60] for text in prompts(4, length=50)]
    found = compare(lambda llm: generate(llm, texts, sampling(max_tokens=500)), max_model_len=96)
    assert {answer.finish_reason for answer in found} == {"length"}


def test_requests_that_join_and_leave_mid_flight(compare: Compare) -> None:
    texts = prompts(6)

    def ask(llm: LLM) -> dict[str, Answer]:
        running = llm.llm_engine
        finished: dict[str, Answer] = {}
        step = 0
        while len(finished) < len(texts) - 1:
            if step % 3 == 0 and step // 3 < len(texts):
                running.add_request(str(step // 3), texts[step // 3], sampling())
            if step == 7:
                running.abort_request(["1"])
            for output in running.step():
                if output.finished:
                    finished[output.request_id] = answers([output])[0]
            step += 1
        alone = generate(llm, texts, sampling())
        assert finished == {str(i): answer for i, answer in enumerate(alone) if i != 1}
        return finished

    compare(ask)


def test_tensor_parallel(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    compare(lambda llm: generate(llm, prompts(4), sampling()), only_speculating={"tensor_parallel_size": 2})


@pytest.mark.parametrize("ranks", [1, 2])
def test_as_many_drafts_as_suit_the_load(
    compare: Compare, drafted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    lengths = [sampling(max_tokens=6 * i) for i in range(1, 11)]
    compare(
        lambda llm: generate(llm, prompts(10), lengths),
        only_speculating={"spec_tokens": None, "tensor_parallel_size": ranks},
    )
    assert {drafts for _, drafts in drafted} == {0, 1, 2, tiny.CONFIG.num_speculative_tokens}


def test_compiled_models(compare: Compare) -> None:
    texts = prompts(4)
    eager: list[bool] = []

    def ask(llm: LLM) -> list[Answer]:
        drafter = getattr(runner_of(llm), "drafter", None)
        if drafter:
            eager.append(drafter.model.model.do_not_compile)
        return generate(llm, texts, sampling())

    compare(ask, only_speculating={"enforce_eager": False})
    assert eager == [False]
