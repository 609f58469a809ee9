"""A head that drafts a part of the target's vocabulary: same answers, and the drafts of that part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.spec_decode.eagle import EagleProposer

from griffin_vllm.convert import convert
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.model import DraftVocabulary, GriffinForCausalLM
from tests.serving import tiny
from tests.serving.engines import engine, runner_of, spec_counters
from tests.serving.test_lossless import Models, generate, prompts, sampling
from tests.serving.test_reference_vectors import draft

V = tiny.CONFIG.vocab_size
# Not a multiple of what vLLM pads vocabularies to, and unevenly spread over two ranks' halves.
VOCABULARY = torch.tensor([0, *range(1, 30, 2), *range(30, 60), *range(61, V, 3)])
K = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    target, whole = tiny.write_target(folder / "target"), tiny.write_head(folder / "whole")
    convert(whole, folder / "head", draft_vocabulary=VOCABULARY)
    return Models(str(target), str(folder / "head"))


def speculating(models: Models, **arguments: Any) -> dict[str, Any]:
    return {"model": models.target, "spec_model": f"griffin:{models.head}", "spec_tokens": K, **arguments}


def test_greedy_answers_are_plain_vllms_without_logits_of_the_whole_vocabulary(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = prompts(8)
    with engine(model=models.target) as llm:
        expected = generate(llm, texts, sampling())

    def refuse(*_: Any) -> None:
        raise AssertionError("logits of the whole vocabulary")

    monkeypatch.setattr(GriffinForCausalLM, "compute_logits", refuse)
    for method in ("greedy", "probabilistic"):
        speculation = {"draft_sample_method": method}
        with engine(**speculating(models, speculative_config=speculation)) as llm:
            assert generate(llm, texts, sampling()) == expected
            counters = spec_counters(llm)
        assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]


def test_greedy_answers_are_plain_vllms_on_two_ranks(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(4)
    with engine(model=models.target) as llm:
        expected = generate(llm, texts, sampling())
    with engine(**speculating(models)) as llm:
        generate(llm, texts, sampling())
        on_one_rank = spec_counters(llm)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(**speculating(models, tensor_parallel_size=2)) as llm:
        assert generate(llm, texts, sampling()) == expected
        assert spec_counters(llm) == on_one_rank


def test_drafts_are_those_of_the_whole_vocabularys_logits_where_only_the_part_counts(models: Models) -> None:
    torch.manual_seed(0)
    features, tokens = torch.randn(4, 16, tiny.HIDDEN_SIZE), torch.randint(0, V, (4, 16))
    with engine(**speculating(models, max_num_batched_tokens=512, block_size=32)) as llm:
        runner = runner_of(llm)
        lm_head = runner.model.lm_head.weight[:V]
        steps, drafted = draft(runner, features, tokens, K)
        wide = runner.drafter.model.compute_logits(steps[1].predict[:4])
        with pytest.raises(GriffinError, match="lm_head is 'SimpleNamespace', expected no quantization"):
            runner.drafter.model.lm_head = SimpleNamespace(quant_method=SimpleNamespace())
    last = [steps[0].predict.view(4, 16, -1)[:, -1], *(step.predict[:4] for step in steps[1:])]
    logits = torch.stack(last, dim=1) @ lm_head.T
    outside = torch.ones(V, dtype=torch.bool)
    outside[VOCABULARY] = False
    assert outside[logits.argmax(-1)].any(), "the whole vocabulary would have drafted the same"
    part = logits.masked_fill(outside, float("-inf"))
    assert drafted.tolist() == part.argmax(-1).tolist()
    torch.testing.assert_close(wide, part[:, 1], atol=1e-4, rtol=1e-4)


def test_sampled_drafts_are_drawn_inside_of_the_vocabulary_and_have_probability_zero_outside(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_from, sample = set(), EagleProposer._sample_from_logits

    def noted(self: Any, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        drawn_from.add(logits.shape[1])
        return sample(self, logits, sampling_metadata)

    monkeypatch.setattr(EagleProposer, "_sample_from_logits", noted)
    with engine(**speculating(models, speculative_config={"draft_sample_method": "probabilistic"})) as llm:
        drafter, seen = runner_of(llm).drafter, []
        propose = drafter.propose

        def keep(*arguments: Any, **named: Any) -> torch.Tensor:
            drafted = propose(*arguments, **named)
            seen.append((drafted, drafter.take_last_draft_probs()))
            return drafted

        drafter.propose = keep
        generate(llm, prompts(4), sampling(temperature=1.0, max_tokens=8))
    assert drawn_from == {len(VOCABULARY)}
    for drafted, probabilities in seen:
        assert probabilities.shape == (*drafted.shape, V)
        torch.testing.assert_close(probabilities[..., VOCABULARY].sum(-1), torch.ones(drafted.shape))
        assert torch.isin(drafted, VOCABULARY).all()


def test_a_target_whose_lm_head_has_been_packed_is_refused_by_name() -> None:
    vocabulary = DraftVocabulary.__new__(DraftVocabulary)
    packed = SimpleNamespace(quant_method=UnquantizedEmbeddingMethod(), weight=torch.empty(0))
    with pytest.raises(
        GriffinError, match="lm_head is 'packed by UnquantizedEmbeddingMethod', expected rows"
    ):
        vocabulary.take_rows(packed)


def test_drafts_in_bfloat16_stay_inside_of_the_vocabulary_and_are_accepted_at_every_depth(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from griffin_vllm.serving.proposer import GriffinProposer

    config = json.loads((Path(models.head) / "config.json").read_text())
    head = shutil.copytree(models.head, tmp_path / "head")
    settings = {"draft_stop_probability": 0.2, "prompt_lookup_min": 2}
    (head / "config.json").write_text(json.dumps(config | settings))
    speculation = {"method": "griffin", "model": str(head)} | {
        "num_speculative_tokens_per_batch_size": [(1, 1, K), (2, 8, 0)]
    }
    drafted: set[int] = set()
    propose = GriffinProposer.propose

    def noted(self: GriffinProposer, **step: Any) -> Any:
        drafts = propose(self, **step)
        by_head = [
            want for want, passage in zip(drafts, self.chains.passages, strict=True) if not passage.tokens
        ]
        drafted.update(int(token) for row in by_head for token in row)
        return drafts

    monkeypatch.setattr(GriffinProposer, "propose", noted)
    with engine(model=models.target, dtype="bfloat16", speculative_config=speculation) as llm:
        # together nothing is drafted, then one is left, with a cache that was written by the way
        tokens = [sampling(max_tokens=30), sampling(max_tokens=60)]
        answers = llm.generate(prompts(2), tokens, use_tqdm=False)
        counters = spec_counters(llm)
    assert [len(one.outputs[0].token_ids) for one in answers] == [30, 60]
    assert drafted <= set(VOCABULARY.tolist())
    assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]


def test_a_whole_vocabulary_head_keeps_the_targets_own_lm_head(models: Models, tmp_path: Path) -> None:
    head = tiny.write_head(tmp_path / "head")
    with engine(model=models.target, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
        runner = runner_of(llm)
        assert runner.drafter.model.lm_head is runner.model.lm_head
