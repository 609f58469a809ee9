"""Sampling at temperature 1 on CPU: the mend of vLLM's kernel, and what it makes true of the answers."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from griffin_vllm.checkpoint import save_head, tensor_shapes
from griffin_vllm.config import HeadConfig

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils

from griffin_vllm.serving import cpu_sampling

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU backend", allow_module_level=True)

VOCAB = 8
SAMPLES = 20_000
# An honest sampler fails a comparison once in 10,000; a wrong one gives p-values that underflow.
SIGNIFICANCE = 1e-4
UNFILTERED: dict[str, Any] = {}
FILTERED: dict[str, Any] = {"top_k": 5, "top_p": 0.9}

Tokens = tuple[int, ...]
Draw = Callable[..., "Counter[Tokens]"]


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
        {name: 0.2 * torch.randn(shape) for name, shape in tensor_shapes(config).items()},
    )
    return folder


@pytest.fixture(scope="module")
def plain(target: Path) -> Iterator[Draw]:
    yield from _engine(target, seed=1)


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def speculating(request: pytest.FixtureRequest, target: Path, head: Path) -> Iterator[Draw]:
    yield from _engine(target, seed=2, speculative_config=_speculation(head, request.param))


@pytest.fixture(scope="module")
def unmended(target: Path, head: Path) -> Iterator[Draw]:
    yield from _engine(target, seed=2, mended=False, speculative_config=_speculation(head, "greedy"))


@pytest.fixture(scope="module")
def without_speculation(plain: Draw) -> dict[str, Counter[Tokens]]:
    return {"unfiltered": plain(UNFILTERED), "filtered": plain(FILTERED)}


@pytest.mark.parametrize("name", ["unfiltered", "filtered"])
def test_three_tokens_are_distributed_as_without_speculation(
    speculating: Draw, without_speculation: dict[str, Counter[Tokens]], name: str
) -> None:
    drawn = speculating(FILTERED if name == "filtered" else UNFILTERED)
    assert p_value(without_speculation[name], drawn) > SIGNIFICANCE


@pytest.mark.parametrize("speculating", ["greedy"], indirect=True)
def test_the_same_comparison_catches_a_sampler_that_accepts_every_draft(
    speculating: Draw, without_speculation: dict[str, Counter[Tokens]]
) -> None:
    drawn = speculating(UNFILTERED, accept_all=True)
    assert p_value(without_speculation["unfiltered"], drawn) < SIGNIFICANCE


def test_the_same_comparison_fails_without_the_mend(
    unmended: Draw, without_speculation: dict[str, Counter[Tokens]]
) -> None:
    assert p_value(without_speculation["unfiltered"], unmended(UNFILTERED)) < SIGNIFICANCE


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


def _speculation(head: Path, draft_sample_method: str) -> dict[str, Any]:
    return {
        "method": "griffin",
        "model": str(head),
        "num_speculative_tokens": 2,
        "draft_sample_method": draft_sample_method,
    }


# An engine lives in a process of its own, and within it in one process (vLLM's switch for that), so that a
# test can put a wrong sampler in its place.
_llm: Any = None


def _engine(target: Path, **options: Any) -> Iterator[Draw]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_start, initargs=(str(target), options)) as process:
        yield lambda *args, **kwargs: process.submit(_draw, *args, **kwargs).result(timeout=240)


def _start(target: str, options: dict[str, Any]) -> None:
    import os

    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # One thread: more only wait for each other on a model this small.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if not options.pop("mended", True):
        cpu_sampling.mend = lambda: None
    from vllm import LLM

    global _llm
    _llm = LLM(
        model=target,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=32,
        max_num_seqs=1024,
        max_num_batched_tokens=16384,
        enable_prefix_caching=False,
        **options,
    )


def _draw(sampling: dict[str, Any], accept_all: bool = False) -> Counter[Tokens]:
    from vllm import SamplingParams
    from vllm.v1.sample import rejection_sampler

    def zeros(num_tokens: int, *_: Any) -> torch.Tensor:
        return torch.zeros(num_tokens, dtype=torch.float64)

    uniform = zeros if accept_all else rejection_sampler.generate_uniform_probs
    params = SamplingParams(temperature=1.0, max_tokens=3, ignore_eos=True, detokenize=False, **sampling)
    with mock.patch.object(rejection_sampler, "generate_uniform_probs", uniform):
        answers = _llm.generate([{"prompt_token_ids": [1, 2, 3, 4]}] * SAMPLES, params, use_tqdm=False)
    return Counter(tuple(answer.outputs[0].token_ids) for answer in answers)
