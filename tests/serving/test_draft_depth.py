"""Drafting less where it does not pay changes no answer and leaves the head's KV cache whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.serving import tiny
from tests.serving.engines import engine, spec_counters

if TYPE_CHECKING:
    from vllm import LLM


K = 4


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_target(tmp_path_factory.mktemp("models") / "target"))


def ask(llm: LLM, *texts: str) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(texts, parameters)]


def test_drafting_stops_where_the_chain_is_unlikely(target: str, tmp_path: Path) -> None:
    texts = ["hello world", "how are you?", "42"]
    answers: list[list[list[int]]] = []
    depths: list[float] = []
    accepted: list[float] = []
    for stop_probability in (0.0, 0.6, 0.999):
        config = tiny.CONFIG.model_copy(update={"draft_stop_probability": stop_probability})
        head = tiny.write_uncertain_head(tmp_path / str(stop_probability), config)
        with engine(model=target, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
            # one at a time, then together: the batch goes on while one of its chains is likely
            answers.append([ask(llm, text)[0] for text in texts] + ask(llm, *texts))
            counters = spec_counters(llm)
        depths.append(counters["num_draft_tokens"] / counters["num_drafts"])
        accepted.append(counters["num_accepted_tokens"] / counters["num_drafts"])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][:3] == answers[0][3:]
    assert depths[0] > 0.9 * K
    assert 1.1 < depths[1] < depths[0]
    assert depths[2] == 1
    assert accepted[0] >= accepted[1] > accepted[2] > 0


def test_each_request_of_a_batch_hands_on_the_drafts_up_to_the_one_that_made_its_chain_unlikely(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from griffin_vllm.serving.proposer import GriffinProposer

    stop = 0.6
    config = tiny.CONFIG.model_copy(update={"draft_stop_probability": stop})
    rounds: list[tuple[list[list[int]], list[tuple[tuple[int, float], ...]]]] = []
    steps: list[list[tuple[int, float]]] = []
    propose, go_on_or_stop = GriffinProposer.propose, GriffinProposer._go_on_or_stop

    def noted_propose(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.clear()
        drafts = propose(self, *args, **kwargs)
        rows = drafts if isinstance(drafts, list) else drafts.tolist()
        rounds.append((rows, list(zip(*steps, strict=True))))
        return drafts

    def noted_step(self: Any, tokens: torch.Tensor, probabilities: torch.Tensor, *more: Any) -> None:
        likelihoods = (self.chains.likelihood * probabilities).tolist()
        steps.append(list(zip(tokens.tolist(), likelihoods, strict=True)))
        go_on_or_stop(self, tokens, probabilities, *more)

    monkeypatch.setattr(GriffinProposer, "propose", noted_propose)
    monkeypatch.setattr(GriffinProposer, "_go_on_or_stop", noted_step)
    head = tiny.write_uncertain_head(tmp_path / "head", config)
    with engine(model=target, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
        rounds.clear()
        ask(llm, "hello world", "how are you?", "42")
    for rows, chains in rounds:
        for row, chain in zip(rows, chains, strict=True):
            length = 1 + sum(likelihood > stop for _, likelihood in chain[:-1])
            assert row == [token for token, _ in chain[:length]]
    assert any(len({len(row) for row in rows}) > 1 for rows, _ in rounds)


@pytest.mark.parametrize("k", [1, 3])
def test_the_last_draft_step_leaves_out_what_would_be_fed_back(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    from griffin_vllm.serving.model import DualHeadMLP

    made = []

    def counted(method: str) -> Any:
        original = getattr(DualHeadMLP, method)

        def call(self: Any, *args: torch.Tensor) -> Any:
            made.append(method)
            return original(self, *args)

        return call

    for method in ("forward", "regress"):
        monkeypatch.setattr(DualHeadMLP, method, counted(method))
    head = tiny.write_head(tmp_path / "head")
    with engine(model=target, spec_model=f"griffin:{head}", spec_tokens=k) as llm:
        made.clear()
        ask(llm, "hello world")
    assert made
    assert made == (["forward", "regress"] * (k - 1) + ["forward"]) * (len(made) // (2 * k - 1))


def head_cache(worker: Any) -> torch.Tensor:
    drafter = worker.model_runner.drafter
    drafter.postponed.write()
    return drafter.model.attention.kv_cache.clone()


def test_steps_that_want_no_drafts_write_the_same_cache_together(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from griffin_vllm.serving import postponed
    from griffin_vllm.serving.model import GriffinDecoderLayer, GriffinForCausalLM

    head = tiny.write_head(tmp_path / "head")
    speculating = {
        "model": target,
        "speculative_config": {
            "method": "griffin",
            "model": str(head),
            "num_speculative_tokens": K,
            "num_speculative_tokens_per_batch_size": [(1, 16, 0)],
        },
    }
    calls = []
    write_cache = GriffinDecoderLayer.write_cache

    def counted(self: Any, *args: torch.Tensor) -> None:
        calls.append(len(args[0]))
        write_cache(self, *args)

    monkeypatch.setattr(GriffinDecoderLayer, "write_cache", counted)
    monkeypatch.setattr(postponed, "MOST", 6)
    texts = ["hello world", "how are you?"]
    caches = []
    for apart in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not apart:
                patch.setattr(GriffinForCausalLM, "writes_cache_apart", False)
            calls.clear()
            with engine(**speculating) as llm:
                answers = ask(llm, *texts)
                caches.append((answers, llm.collective_rpc(head_cache)[0]))
        # the prefill, and 39 steps of two tokens
        assert calls == ([len("".join(texts))] + [6] * 13 if apart else [])
    assert caches[0][0] == caches[1][0]
    assert caches[0][1].abs().sum() > 0
    torch.testing.assert_close(caches[0][1], caches[1][1])


def test_the_parts_of_a_long_prompt_are_not_drafted_for_and_written_as_the_whole_is(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    from griffin_vllm.serving.proposer import GriffinProposer

    steps = 0
    greedy_sample = GriffinProposer._greedy_sample

    def counted(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return greedy_sample(self, hidden_states)

    monkeypatch.setattr(GriffinProposer, "_greedy_sample", counted)
    head = tiny.write_uncertain_head(tmp_path / "head", tiny.CONFIG)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    caches = []
    for part in (64, 256):
        with engine(
            model=target,
            spec_model=f"griffin:{head}",
            spec_tokens=K,
            max_num_batched_tokens=part,
            enable_chunked_prefill=True,
        ) as llm:
            steps = 0
            llm.generate([LONG * 3], one, use_tqdm=False)
            # after the prompt's last part
            assert steps == K
            caches.append(llm.collective_rpc(head_cache)[0])
    assert caches[0].abs().sum() > 0
    torch.testing.assert_close(*caches)


def test_near_the_maximum_length_every_step_is_the_proposers_and_its_drafts_become_fewer(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from griffin_vllm.serving.model import GriffinModel
    from griffin_vllm.serving.proposer import GriffinProposer

    steps, drafts, positions = [], [], []
    model_forward, propose, head_forward = (
        GPUModelRunner._model_forward,
        GriffinProposer.propose,
        GriffinModel.forward,
    )

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return model_forward(self, *args, **kwargs)

    def proposed(self: Any, **step: Any) -> Any:
        # vLLM's loop counts on in it
        length = int(step["common_attn_metadata"].max_seq_len)
        found = propose(self, **step)
        drafts.append((length, max(map(len, found), default=0)))
        return found

    def seen(self: Any, input_ids: torch.Tensor, at: torch.Tensor, hidden_states: torch.Tensor) -> Any:
        positions.append(int(at.max()))
        return head_forward(self, input_ids, at, hidden_states)

    head = tiny.write_uncertain_head(tmp_path / "head", tiny.CONFIG)
    parameters = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (36, 70)]
    with engine(model=target, spec_model=f"griffin:{head}", spec_tokens=K, max_model_len=96) as llm:
        monkeypatch.setattr(GPUModelRunner, "_model_forward", counted)
        monkeypatch.setattr(GriffinProposer, "propose", proposed)
        monkeypatch.setattr(GriffinModel, "forward", seen)
        answers = llm.generate(["a" * 60, "hello"], parameters, use_tqdm=False)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [36, 70]
    assert len(drafts) == len(steps)
    assert max(positions) < 96
    near = [(length, most) for length, most in drafts if length > 96 - K + 1]
    assert near
    assert all(most <= 96 - length + 1 for length, most in near)
    # the other request goes on alone as it was drafted for before
    assert drafts[-2][1] == K


def test_of_two_tokens_for_one_place_in_the_cache_the_later_one_is_written() -> None:
    from griffin_vllm.serving.postponed import PostponedWrites

    written: list[list[int]] = []
    postponed = PostponedWrites(lambda ids, slots: written.extend([ids.tolist(), slots.tolist()]))
    # a request ends, and its block goes to another one that was waiting for a place
    for ids, slots in (([1, 2], [4, 9]), ([3], [5]), ([5, 6], [4, 10])):
        postponed.add(torch.tensor(ids), torch.tensor(slots))
    postponed.write()
    assert written == [[2, 3, 5, 6], [9, 5, 4, 10]]


def test_a_step_without_drafts_is_sampled_as_without_a_speculator(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams
    from vllm.v1.sample import rejection_sampler

    def long_way(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing was drafted")

    monkeypatch.setattr(rejection_sampler, "rejection_sample", long_way)
    speculation = {
        "method": "griffin",
        "model": str(tiny.write_head(tmp_path / "head")),
        "num_speculative_tokens": K,
        "num_speculative_tokens_per_batch_size": [(1, 16, 0)],
    }
    parameters = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, logprobs=3, repetition_penalty=1.3
    )
    found = []
    for options in ({}, {"speculative_config": speculation}):
        with engine(model=target, **options) as llm:
            answers = llm.generate(["hello world", "how are you?"], parameters)
        found.append([(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in answers])
    for plain, ours in zip(*found, strict=True):
        assert ours[0] == plain[0]
        for left, right in zip(plain[1], ours[1], strict=True):
            assert {t: x.rank for t, x in left.items()} == {t: x.rank for t, x in right.items()}
            assert [x.logprob for x in left.values()] == pytest.approx([x.logprob for x in right.values()])


@pytest.mark.parametrize("drafts", [[[], []], [[8, 8], [8]]], ids=["no drafts", "drafts given up"])
def test_a_thinking_budget_ends_the_thoughts_of_its_own_request(drafts: list[list[int]]) -> None:
    budgets = pytest.importorskip("vllm.v1.sample.thinking_budget_state")
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    from griffin_vllm.serving import hooks

    hooks.check_fits()
    start, end, thought, likely = 5, 2, 7, 8
    answers = [[thought], [start, thought, thought]]
    tokens = SimpleNamespace(reasoning_start_token_ids=[start], reasoning_end_token_ids=[end])
    cpu, empty = torch.device("cpu"), torch.empty(0)
    holder = budgets.ThinkingBudgetStateHolder(tokens, 2, K, cpu, False)
    second = (1, SamplingParams(thinking_token_budget=1), [1], answers[1])
    holder.sync_batch(BatchUpdate(batch_size=2, removed=[], added=[second], moved=[]))
    metadata = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=empty,
        presence_penalties=empty,
        repetition_penalties=empty,
        output_token_ids=answers,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        # what makes our sampler give the drafts up
        logprob_token_ids={0: [1]} if any(drafts) else None,
        spec_token_ids=drafts,
        thinking_budget_state_holder=holder,
    )
    logits = torch.zeros(sum(len(row) + 1 for row in drafts), 10)
    logits[:, likely] = 1
    sampler = RejectionSampler(Sampler())
    sampler.serves_griffin = True
    output = sampler(SpecDecodeMetadata.make_dummy(drafts, device=cpu), None, logits, metadata)
    assert output.sampled_token_ids.tolist() == [[likely], [end]]


def test_a_kv_connector_saves_the_heads_layer_of_steps_without_drafts_too(
    target: str, tmp_path: Path
) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "ExampleConnector" not in KVConnectorFactory._registry:
        pytest.skip("this vLLM has no ExampleConnector")
    speculation = {
        "method": "griffin",
        "model": str(tiny.write_head(tmp_path / "head")),
        "num_speculative_tokens_per_batch_size": [(1, 16, 0)],
    }
    connector = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(tmp_path / "store")},
    )
    with engine(model=target, speculative_config=speculation, kv_transfer_config=connector) as llm:
        # the second time the prompt's cache is loaded
        first, second = ask(llm, LONG), ask(llm, LONG)
    assert first == second
    layers = {path.stem for path in (tmp_path / "store").rglob("*.safetensors")}
    assert sum("layers.2." in layer for layer in layers) == 1 < len(layers)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_drafts_after_steps_without_are_those_of_a_cache_that_was_written_at_once(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix_caching: bool
) -> None:
    from vllm import SamplingParams

    from griffin_vllm.serving.proposer import GriffinProposer

    postpones = GriffinProposer._only_decodes
    config = tiny.CONFIG.model_copy(update={"draft_stop_probability": 0.0})
    # its attention has a say in its drafts
    head = tiny.write_uncertain_head(tmp_path / "head", config)
    # the short ones' blocks are handed on while the long one goes on
    parameters = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for tokens in (120, 20, 20, 30)
    ]
    texts = ["hello world", "how are you?", "and you?", "42"]

    def answers(llm: LLM) -> list[list[int]]:
        outputs = llm.generate(texts, parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    with engine(model=target, max_num_seqs=2) as llm:
        plain = answers(llm)
    found = []
    for postponed in (True, False):
        if not postponed:
            monkeypatch.setattr(GriffinProposer, "_only_decodes", lambda *_: False)
        else:
            monkeypatch.setattr(GriffinProposer, "_only_decodes", postpones)
        with engine(
            model=target,
            enable_prefix_caching=prefix_caching,
            max_num_seqs=2,
            speculative_config={
                "method": "griffin",
                "model": str(head),
                "num_speculative_tokens": K,
                "num_speculative_tokens_per_batch_size": [(1, 1, K), (2, 16, 0)],
            },
        ) as llm:
            found.append((answers(llm), spec_counters(llm)))
    assert found[0] == found[1]
    assert found[0][0] == plain
    # the long one is alone for a while
    assert found[0][1]["num_accepted_tokens"] > 0


LIMIT = 60
SHORT, LONG = "hello world", "a long text, longer than the limit of the head from its beginning on"


@pytest.mark.parametrize("stop_probability", [0.0, 0.6])
def test_requests_past_the_heads_limit_get_no_drafts_and_others_beside_them_do(
    target: str, tmp_path: Path, drafted: list[tuple[int, int]], stop_probability: float
) -> None:
    config = tiny.CONFIG.model_copy(
        update={"draft_context_limit": LIMIT, "draft_stop_probability": stop_probability}
    )
    head = tiny.write_head(tmp_path / "head", config)
    with engine(model=target) as llm:
        expected = ask(llm, SHORT, LONG)
    with engine(model=target, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
        assert ask(llm, SHORT, LONG) == expected
        together = list(drafted)
        drafted.clear()
        assert ask(llm, LONG) == expected[1:]
        assert spec_counters(llm)["num_accepted_tokens"] > 0
    assert {drafts for context, drafts in together if context > LIMIT + 1} == {0}
    near = [drafts for context, drafts in together if context <= LIMIT - K]
    assert near
    assert min(near) > 0
    assert {drafts for _, drafts in drafted} == {0}


def test_a_maximum_length_of_the_drafts_own_is_a_limit_of_each_request(
    target: str, tmp_path: Path, drafted: list[tuple[int, int]]
) -> None:
    head = tiny.write_head(tmp_path / "head", tiny.CONFIG)
    speculation = {"num_speculative_tokens": K, "max_model_len": LIMIT}
    with engine(model=target, spec_model=f"griffin:{head}", speculative_config=speculation) as llm:
        ask(llm, SHORT, LONG)
    assert {drafts for context, drafts in drafted if context > LIMIT + 1} == {0}
    assert min(drafts for context, drafts in drafted if context <= LIMIT - K) > 0


def test_a_batch_past_the_heads_limit_runs_no_draft_step(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from griffin_vllm.serving.model import GriffinForCausalLM
    from griffin_vllm.serving.postponed import PostponedWrites

    calls: list[tuple[int, bool]] = []
    forward = GriffinForCausalLM.forward

    def counted(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((len(input_ids), self.writes_cache_only))
        return forward(self, input_ids, *args, **kwargs)

    postponed: list[int] = []

    def noted(_: Any, tokens: torch.Tensor, *__: torch.Tensor) -> None:
        postponed.append(len(tokens))

    head = tiny.write_head(tmp_path / "head", tiny.CONFIG.model_copy(update={"draft_context_limit": LIMIT}))
    monkeypatch.setattr(GriffinForCausalLM, "forward", counted)
    monkeypatch.setattr(PostponedWrites, "add", noted)
    with engine(model=target, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
        calls.clear()
        ask(llm, LONG, LONG)
    # two requests, one token each a step: nothing was drafted, so nothing is verified
    assert calls == [(2 * len(LONG), True)]
    assert postponed == [2] * 39


@pytest.mark.parametrize(("lengths", "expected"), [([70, 80], 0), ([50, 80], 7), ([50, 55], 7)])
def test_drafts_keep_their_shape_for_a_scheduler_that_does_not_wait_mocked_as_cpu_has_none(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], expected: int
) -> None:
    from vllm.v1.spec_decode.eagle import EagleProposer

    from griffin_vllm.serving.postponed import PostponedWrites
    from griffin_vllm.serving.proposer import GriffinProposer

    def draft(self: Any, num_speculative_tokens: int, **kwargs: Any) -> torch.Tensor:
        return torch.full((2, num_speculative_tokens), 7)

    monkeypatch.setattr(EagleProposer, "propose", draft)
    proposer: Any = object.__new__(GriffinProposer)
    proposer.context_limit, proposer.device, proposer.model = LIMIT, torch.device("cpu"), None
    proposer.steps_may_vary, proposer.scheduler_waits, proposer.lookup_min = True, False, 0
    proposer.stop_probability = 0.0
    proposer.may_postpone, proposer.has_connector = False, False
    proposer.runner = proposer.draft_model_config = SimpleNamespace(max_model_len=1000)
    proposer.postponed = PostponedWrites(lambda *_: None)
    metadata = SimpleNamespace(
        num_reqs=2, max_seq_len=max(lengths), seq_lens_cpu_upper_bound=torch.tensor([*lengths, 0])
    )
    two = torch.zeros(2, dtype=torch.int64)
    drafts = proposer.propose(
        num_speculative_tokens=K,
        target_token_ids=two,
        target_positions=two,
        target_hidden_states=torch.zeros(2, tiny.HIDDEN_SIZE),
        next_token_ids=two,
        token_indices_to_sample=None,
        common_attn_metadata=metadata,
        sampling_metadata=None,
    )
    assert torch.equal(drafts, torch.full((2, K), expected))


def test_a_context_limit_is_not_lost_in_silence_on_the_v2_runner_of_a_mocked_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from griffin_vllm.serving import fixed_depth

    warnings: list[str] = []
    monkeypatch.setattr(fixed_depth, "reasons", lambda _: [])
    monkeypatch.setattr(fixed_depth.logger, "warning", lambda text, *values: warnings.append(text % values))
    for v2, limit in ((False, LIMIT), (True, None), (True, LIMIT)):
        head = SimpleNamespace(draft_stop_probability=0.0, prompt_lookup_min=0, draft_context_limit=limit)
        speculation = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=head))
        fixed_depth.warn(SimpleNamespace(use_v2_model_runner=v2, speculative_config=speculation))
    [warning] = warnings
    assert f"beyond {LIMIT} tokens of context" in warning


def test_what_has_all_rounds_draft_alike_is_named_mocked_as_cpu_has_none() -> None:
    from vllm.config import CUDAGraphMode

    from griffin_vllm.serving import fixed_depth

    def config(graphs: CUDAGraphMode, waits: bool, v2: bool) -> Any:
        return SimpleNamespace(
            use_v2_model_runner=v2,
            parallel_config=SimpleNamespace(data_parallel_size=1, tensor_parallel_size=1),
            scheduler_config=SimpleNamespace(async_scheduling=not waits),
            compilation_config=SimpleNamespace(cudagraph_mode=graphs),
        )

    assert fixed_depth.reasons(config(CUDAGraphMode.NONE, waits=True, v2=False)) == []
    assert fixed_depth.reasons(config(CUDAGraphMode.PIECEWISE, waits=False, v2=True)) == [
        "vLLM's V2 model runner",
        "asynchronous scheduling",
        "CUDA graphs",
    ]


def test_a_head_that_would_vary_its_drafts_says_so_where_it_cannot_mocked_as_cpu_always_can(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafted: list[tuple[int, int]]
) -> None:
    from griffin_vllm.serving import fixed_depth

    warnings: list[str] = []
    monkeypatch.setattr(fixed_depth, "reasons", lambda _: ["CUDA graphs"])
    monkeypatch.setattr(fixed_depth.logger, "warning", lambda text, *values: warnings.append(text % values))
    config = tiny.CONFIG.model_copy(update={"draft_stop_probability": 0.999, "prompt_lookup_min": 1})
    head = tiny.write_head(tmp_path / "head", config)
    with engine(model=target, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
        ask(llm, "hello hello hello")
    assert {drafts for _, drafts in drafted} == {K}
    [warning] = warnings
    assert f"drafts {K} tokens in every round" in warning
    assert "CUDA graphs" in warning
