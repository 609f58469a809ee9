"""Sampling at temperature 1 on CPU: the mend of vLLM's kernel, and what it makes true of the answers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from griffin_vllm.checkpoint import save_head, tensor_shapes
from griffin_vllm.config import HeadConfig
from griffin_vllm.convert import convert

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler

from griffin_vllm.serving import cpu_sampling
from tests.serving.engines import engine

if TYPE_CHECKING:
    from vllm import LLM

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU backend", allow_module_level=True)

VOCAB = 8
SAMPLES = 20_000
PROMPT = [1, 2, 3, 4]
# An honest sampler fails a comparison once in 10,000; a wrong one gives p-values that underflow.
SIGNIFICANCE = 1e-4
FILTERS: dict[str, dict[str, Any]] = {"none": {}, "top_k and top_p": {"top_k": 5, "top_p": 0.9}}

Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def vllm_kernel() -> Callable[..., Any]:
    """vLLM's own ``_expand_kernel_impl``, with the C++ kernels loaded."""
    current_platform.import_kernels()
    kernel = cpu_triton_utils._expand_kernel_impl
    return getattr(kernel, "mends", kernel)


def test_the_probe_finds_the_defect_of_vllm(vllm_kernel: Callable[..., Any]) -> None:
    assert cpu_sampling.is_defective(vllm_kernel)


def test_the_probe_passes_a_kernel_that_writes_its_output() -> None:
    assert not cpu_sampling.is_defective(cpu_sampling.expand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_expand_repeats_and_replaces_in_every_dtype(dtype: torch.dtype) -> None:
    output = torch.full((4,), -1, dtype=dtype)
    values = torch.tensor([7, 0, 0, 9], dtype=dtype)
    cpu_sampling.expand(output, values, torch.tensor([2, 2, 3, 4], dtype=torch.int32), 0, 1)
    assert output.tolist() == [7, 7, 1, 9]


def test_a_sound_kernel_stays_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = mock.Mock(side_effect=cpu_sampling.expand, __name__="sound")
    monkeypatch.setattr(cpu_triton_utils, "_expand_kernel_impl", sound)
    monkeypatch.delattr(sound, "mends")
    cpu_sampling.mend()
    output = torch.zeros(2)
    cpu_triton_utils._expand_kernel_impl(output, torch.tensor([3.0]), torch.tensor([2]), 0, 1)
    assert output.tolist() == [3.0, 3.0]
    assert sound.call_args.args[0] is output


def test_mending_twice_wraps_once(monkeypatch: pytest.MonkeyPatch, vllm_kernel: Callable[..., Any]) -> None:
    monkeypatch.setattr(cpu_triton_utils, "_expand_kernel_impl", vllm_kernel)
    cpu_sampling.mend()
    mended = cpu_triton_utils._expand_kernel_impl
    cpu_sampling.mend()
    assert cpu_triton_utils._expand_kernel_impl is mended
    assert mended.mends is vllm_kernel


def test_a_vllm_without_that_kernel_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu_triton_utils, "_expand_kernel_impl")
    cpu_sampling.mend()
    assert not hasattr(cpu_triton_utils, "_expand_kernel_impl")


def top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Like vLLM 0.32's, whose ``k.max()`` fails where there is no row."""
    keep = logits.topk(int(k.max()), dim=-1).indices
    return torch.full_like(logits, -torch.inf).scatter(1, keep, logits.gather(1, keep))


def test_mended_top_k_takes_no_rows_and_is_vllms_own_otherwise() -> None:
    module = SimpleNamespace(apply_top_k_only=top_k_only)
    cpu_sampling.mend_top_k(module)
    mended = module.apply_top_k_only
    assert mended.mends is top_k_only
    assert mended(torch.empty(0, 3), torch.empty(0, dtype=torch.int32)).shape == (0, 3)
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert mended(logits, torch.tensor([2])).tolist() == [[-torch.inf, 3.0, 2.0]]
    cpu_sampling.mend_top_k(module)
    assert module.apply_top_k_only is mended


def test_a_top_k_that_takes_no_rows_stays_in_use() -> None:
    def sound(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return logits

    module = SimpleNamespace(apply_top_k_only=sound)
    cpu_sampling.mend_top_k(module)
    assert module.apply_top_k_only is sound


class FuncWrapper:
    """vLLM's stand-in for a Triton kernel on CPU."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func


def test_mended_launchers_hand_named_arguments_to_the_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def a_kernel(output: int, values: int, BLOCK: int) -> None:
        raise AssertionError("the Triton kernel")

    def postprocess(self: Any) -> None:
        cpu_kernel = FuncWrapper(lambda *arguments: calls.append(arguments))
        monkeypatch.setattr(rejection_sampler, "a_kernel", cpu_kernel, raising=False)

    launcher, unrelated = SimpleNamespace(kernel=a_kernel), SimpleNamespace(kernel=len)
    monkeypatch.setattr(rejection_sampler, "a_launcher", launcher, raising=False)
    monkeypatch.setattr(rejection_sampler, "another_launcher", unrelated, raising=False)
    runner = type("CPUModelRunner", (), {"_postprocess_triton": postprocess})
    module = SimpleNamespace(CPUModelRunner=runner, cpu_tl=SimpleNamespace(_FuncWrapper=FuncWrapper))
    cpu_sampling.mend_launchers(module)
    mended = vars(runner)["_postprocess_triton"]
    cpu_sampling.mend_launchers(module)
    assert vars(runner)["_postprocess_triton"] is mended
    runner()._postprocess_triton()
    launcher.kernel[(1,)](BLOCK=3, values=2, output=1)
    assert calls == [(1, 2, 3)]
    assert unrelated.kernel is len


def test_a_runner_that_replaces_no_kernels_is_left_alone() -> None:
    runner = type("CPUModelRunner", (), {})
    cpu_sampling.mend_launchers(SimpleNamespace(CPUModelRunner=runner))
    assert not hasattr(runner, "_postprocess_triton")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head") / "griffin"
    config = HeadConfig(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        draft_vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    save_head(
        folder,
        config.to_served(),
        {name: 0.1 * torch.randn(shape) for name, shape in tensor_shapes(config).items()},
    )
    return folder


@pytest.fixture(scope="module")
def without_speculation(target: Path) -> dict[str, Counter[Tokens]]:
    with sampling_engine(target, seed=1) as llm:
        return {name: draw(llm, filters) for name, filters in FILTERS.items()}


@pytest.fixture(scope="module")
def reduced_head(tmp_path_factory: pytest.TempPathFactory, head: Path) -> Path:
    folder = tmp_path_factory.mktemp("reduced") / "griffin"
    convert(head, folder, draft_vocabulary=torch.tensor([0, 2, 3, 6]))
    return folder


@pytest.fixture(scope="module")
def stopping_head(tmp_path_factory: pytest.TempPathFactory, head: Path) -> Path:
    """Ends some requests' chains after one token of two: its top probabilities are 0.40 to 0.56."""
    folder = tmp_path_factory.mktemp("stopping") / "griffin"
    shutil.copytree(head, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"draft_stop_probability": 0.45}))
    return folder


@pytest.fixture(scope="module")
def reduced_stopping_head(tmp_path_factory: pytest.TempPathFactory, stopping_head: Path) -> Path:
    folder = tmp_path_factory.mktemp("both") / "griffin"
    convert(stopping_head, folder, draft_vocabulary=torch.tensor([0, 2, 3, 6]))
    return folder


@pytest.fixture(
    scope="module",
    params=[
        "greedy",
        "greedy, looked up",
        "probabilistic",
        "probabilistic, half of the vocabulary",
        "probabilistic, stopping early",
        "probabilistic, looked up",
        "probabilistic, all of it",
    ],
)
def speculating(
    request: pytest.FixtureRequest,
    target: Path,
    head: Path,
    reduced_head: Path,
    stopping_head: Path,
    reduced_stopping_head: Path,
    without_speculation: dict[str, Counter[Tokens]],  # its engine is gone before the next one starts
) -> Iterator[LLM]:
    method, _, variant = request.param.partition(", ")
    with sampling_engine(
        target,
        {
            "half of the vocabulary": reduced_head,
            "stopping early": stopping_head,
            "all of it": reduced_stopping_head,
        }.get(variant, head),
        draft_sample_method=method,
        prompt_lookup_min=1 if variant in ("looked up", "all of it") else 0,
    ) as llm:
        yield llm


@pytest.mark.parametrize("filters", FILTERS)
def test_three_tokens_are_distributed_as_without_speculation(
    speculating: LLM, without_speculation: dict[str, Counter[Tokens]], filters: str
) -> None:
    drawn = draw(speculating, FILTERS[filters])
    assert p_value(without_speculation[filters], drawn) > SIGNIFICANCE


@pytest.mark.parametrize("speculating", ["probabilistic, stopping early"], indirect=True)
def test_that_comparison_has_drafts_of_different_lengths_in_one_batch(
    speculating: LLM, drafted: list[tuple[int, int]]
) -> None:
    draw(speculating, FILTERS["none"], samples=100)
    assert {length for context, length in drafted if context == len(PROMPT) + 1} == {1, 2}


@pytest.mark.parametrize("speculating", ["greedy"], indirect=True)
def test_the_same_comparison_catches_a_sampler_that_accepts_every_draft(
    speculating: LLM, without_speculation: dict[str, Counter[Tokens]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(num_tokens: int, *_: Any) -> torch.Tensor:
        return torch.zeros(num_tokens, dtype=torch.float64)

    monkeypatch.setattr(rejection_sampler, "generate_uniform_probs", zeros)
    assert p_value(without_speculation["none"], draw(speculating, FILTERS["none"])) < SIGNIFICANCE


def test_the_same_comparison_fails_without_the_mend(
    target: Path,
    head: Path,
    without_speculation: dict[str, Counter[Tokens]],
    monkeypatch: pytest.MonkeyPatch,
    vllm_kernel: Callable[..., Any],
) -> None:
    monkeypatch.setattr(cpu_triton_utils, "_expand_kernel_impl", vllm_kernel)
    if hasattr(cpu_triton_utils, "expand_kernel"):
        monkeypatch.setattr(cpu_triton_utils.expand_kernel, "func", vllm_kernel)
    with sampling_engine(target, head) as llm:
        assert p_value(without_speculation["none"], draw(llm, FILTERS["none"])) < SIGNIFICANCE


@contextmanager
def sampling_engine(
    target: Path, head: Path | None = None, seed: int = 2, **speculation: Any
) -> Iterator[LLM]:
    """An engine that is quick with thousands of short requests."""
    arguments: dict[str, Any] = {}
    if head is not None:
        arguments["speculative_config"] = {
            "method": "griffin",
            "model": str(head),
            "num_speculative_tokens": 2,
            **speculation,
        }
    threads = torch.get_num_threads()
    with engine(
        model=str(target),
        skip_tokenizer_init=True,
        seed=seed,
        max_model_len=32,
        max_num_seqs=1024,
        max_num_batched_tokens=16384,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 29,
        disable_log_stats=True,
        **arguments,
    ) as llm:
        torch.set_num_threads(1)  # more would only wait for each other on a model this small
        yield llm
    torch.set_num_threads(threads)


def draw(llm: LLM, filters: dict[str, Any], samples: int = SAMPLES) -> Counter[Tokens]:
    """How often each beginning of three tokens comes out, for one prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=3, ignore_eos=True, detokenize=False, **filters)
    answers = llm.generate([{"prompt_token_ids": PROMPT}] * samples, params, use_tqdm=False)
    return Counter(tuple(answer.outputs[0].token_ids) for answer in answers)


def p_value(a: Counter[Tokens], b: Counter[Tokens]) -> float:
    """Chi-square test that two samples have one distribution; rare outcomes are pooled into one cell."""
    from scipy.stats import chi2_contingency

    assert a.total() >= SAMPLES
    assert b.total() >= SAMPLES
    common = [tokens for tokens in a | b if a[tokens] + b[tokens] >= 20]
    table = [[sample[tokens] for tokens in common] for sample in (a, b)]
    for row, sample in zip(table, (a, b), strict=True):
        row.append(sample.total() - sum(row))
    if table[0][-1] + table[1][-1] == 0:
        table = [row[:-1] for row in table]
    return float(chi2_contingency(table).pvalue)
