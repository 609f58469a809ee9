"""The targets that a head can have: one of every supported family, quantised, with a LoRA adapter; and others."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from griffin_vllm.checkpoint import load_tensors, open_head
from griffin_vllm.config import TARGET_FAMILIES
from griffin_vllm.describe import misfit
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.attention import choose_attention
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import prepare
from griffin_vllm.training.head import GriffinHead, Streams
from griffin_vllm.training.loop import Trainer
from griffin_vllm.training.losses import Classes
from griffin_vllm.training.target import Target, target_config
from tests.serving import tiny
from tests.serving.engines import engine, runner_of, spec_counters
from tests.training.chat_targets import write_target as write_tokenizer

if TYPE_CHECKING:
    from vllm import LLM

K = 3
# vLLM's CPU attention takes head dims from 32 up.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA_3_ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
}
# A cap that low bends the logits of a random model, too.
GEMMA_2_CAP = 3.0
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2, vicuna": ("llama", {"num_key_value_heads": 2}),
    "llama 3": ("llama", {"rope_parameters": LLAMA_3_ROTARY}),
    "llama 3.2, tied": ("llama", {"rope_parameters": LLAMA_3_ROTARY, "tie_word_embeddings": True}),
    # longer than the prompt whose features are compared: a served head inherits the window, a trained one has none
    "mistral": ("mistral", {"sliding_window": 48}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", GEMMA | {"final_logit_softcapping": GEMMA_2_CAP}),
    "gemma3": ("gemma3_text", GEMMA),
}
PROMPT_LENGTHS = (24, 40, 7)
ANSWER_LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_target(folder: Path, tokenizer: Path, model_type: str, changes: dict[str, Any]) -> Path:
    """A random model of the family; it likes to repeat tokens, so that some drafts are right."""
    shutil.copytree(tokenizer, folder)
    size = len(AutoTokenizer.from_pretrained(tokenizer))
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "vocab_size": size, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    embeddings = model.get_input_embeddings().weight.data
    if not model_type.startswith("gemma"):
        embeddings *= SIZES["hidden_size"] ** 0.5
    if not config.tie_word_embeddings:
        model.lm_head.weight.data += embeddings
    model.save_pretrained(folder)
    return folder


def trainer(target: Path, folder: Path, **changes: Any) -> Trainer:
    """A run of a few steps on random tokens."""
    values: dict[str, Any] = {
        "target": str(target),
        "data": str(write_data(folder / "data", target)),
        "output": str(folder / "run"),
        "stages": [{"draft_steps": 2, "epochs": 1}],
        "batch_tokens": 256,
        "soft_target_tokens": 16,
        "precision": "fp32",
        "validation_samples": 2,
        "num_speculative_tokens": K,
        **changes,
    }
    trainer = Trainer(TrainConfig.check(values, Path("settings.yaml")))
    assert len(trainer.plan) > 1
    return trainer


def write_data(folder: Path, target: Path) -> Path:
    folder.mkdir(parents=True)
    source, size = random.Random(0), AutoConfig.from_pretrained(target).vocab_size
    lines = []
    for number in range(12):
        tokens = source.choices(range(size), k=40)
        turns = [
            {"from": "human", "value": f"What is {number}?"},
            {"from": "gpt", "value": "?", "token_ids": tokens, "finish_reason": "length"},
        ]
        lines.append(json.dumps({"id": f"talk{number}", "conversations": turns}) + "\n")
    (folder / "talks.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare(str(target), [str(folder / "talks.jsonl")], folder / "tokens", validation_share=0.3)
    return folder / "tokens"


def generate(llm: Any, **arguments: Any) -> list[list[int]]:
    """Greedy answers to a few random prompts; the engine has no tokenizer."""
    from vllm import SamplingParams

    source, vocabulary = random.Random(1), range(llm.model_config.get_vocab_size())
    asked = [{"prompt_token_ids": source.choices(vocabulary, k=length)} for length in PROMPT_LENGTHS]
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_LENGTH, ignore_eos=True, detokenize=False)
    outputs = llm.generate(asked, greedy, use_tqdm=False, **arguments)
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_drafts_were_right_and_wrong(llm: Any) -> None:
    counters = spec_counters(llm)
    assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]


@contextmanager
def speculating(target: Path, head: Path) -> Iterator[LLM]:
    """An engine with ``head`` that has given the answers of one without, some drafts right and some wrong."""
    common = {"model": str(target), "skip_tokenizer_init": True}
    with engine(**common) as llm:
        expected = generate(llm)
    with engine(**common, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
        assert generate(llm) == expected
        assert_drafts_were_right_and_wrong(llm)
        yield llm


def test_every_family_that_is_said_to_work_is_in_the_table() -> None:
    assert {model_type for model_type, _ in TARGETS.values()} == set(TARGET_FAMILIES)


@pytest.mark.parametrize("name", TARGETS)
def test_trained_head_is_served_with_plain_answers(name: str, tokenizer: Path, tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", tokenizer, *TARGETS[name])
    head = trainer(target, tmp_path).run()
    with speculating(target, head) as llm:
        assert_served_is_trained(llm, target, head)


def assert_served_is_trained(llm: Any, target_folder: Path, head_folder: Path) -> None:
    """In a prompt's pass vLLM gives the drafter the features that the trainer computes, and the drafter returns
    what the trainer's head returns; logits included, of the target and of the head."""
    from vllm import SamplingParams

    calls: list[tuple[torch.Tensor, ...]] = []

    def keep(
        _module: Any, _arguments: Any, given: dict[str, Any], returned: tuple[torch.Tensor, ...]
    ) -> None:
        # copies: vLLM uses the same buffers in the next call
        calls.append(tuple(x.clone() for x in (given["input_ids"], given["hidden_states"], *returned)))

    prompt = torch.arange(PROMPT_LENGTHS[0]) * 7 + 5
    runner = runner_of(llm)
    drafter = runner.drafter.model
    hook = drafter.register_forward_hook(keep, with_kwargs=True)
    one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate({"prompt_token_ids": prompt.tolist()}, one, use_tqdm=False)
    hook.remove()
    tokens, features, predict, regress = calls[0]

    target = Target(target_folder, torch.device("cpu"), torch.float32)
    stored = open_head(head_folder)
    head = GriffinHead(stored.config, choose_attention("auto", torch.device("cpu")))
    head.load_state_dict({name: tensor.float() for name, tensor in load_tensors(stored.weights).items()})
    logits = Classes.all(target.shared.lm_head, target.shared.logit_softcap).logits
    with torch.inference_mode():
        expected = target.hidden_states(prompt[None])
        of_head = head(target.shared.embed_tokens[tokens][None], expected, Streams())
        for found, wanted in (
            (features, expected[0]),
            (runner.model.compute_logits(features), logits(expected[0])),
            (predict, of_head[0][0]),
            (regress, of_head[1][0]),
            (drafter.compute_logits(predict), logits(of_head[0][0])),
        ):
            torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_head_that_only_keeps_its_cache_leaves_that_of_a_hybrid_target_alone(
    tokenizer: Path, tmp_path: Path, prefix_caching: bool
) -> None:
    from vllm import SamplingParams

    target = write_target(tmp_path / "target", tokenizer, *TARGETS["gemma3"])
    head = trainer(target, tmp_path).run()
    no_drafts = {
        "method": "griffin",
        "model": str(head),
        "num_speculative_tokens": K,
        "num_speculative_tokens_per_batch_size": [(1, 16, 0)],
    }
    source = random.Random(2)
    asked = [{"prompt_token_ids": source.choices(range(200), k=source.randint(5, 60))} for _ in range(12)]
    # requests that end early give their blocks to those that were waiting
    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=source.randint(5, 60),
            ignore_eos=True,
            detokenize=False,
            # what a random model is likely to say depends little on what it remembers
            logprobs=0,
        )
        for _ in asked
    ]
    likelihoods = []
    for speculation in ({}, {"speculative_config": no_drafts}):
        with engine(
            model=str(target),
            skip_tokenizer_init=True,
            max_num_seqs=2,
            enable_prefix_caching=prefix_caching,
            **speculation,
        ) as llm:
            outputs = llm.generate(asked, parameters, use_tqdm=False)
            likelihoods.append([output.outputs[0].cumulative_logprob for output in outputs])
    assert likelihoods[1] == pytest.approx(likelihoods[0], abs=1e-3)


def test_reduced_draft_vocabulary_takes_its_rows_from_embeddings_where_there_is_no_lm_head(
    tokenizer: Path, tmp_path: Path
) -> None:
    target = write_target(tmp_path / "target", tokenizer, *TARGETS["gemma2"])
    head = trainer(target, tmp_path, draft_vocab=200).run()
    with speculating(target, head) as llm:
        rows = runner_of(llm).drafter.model.output_embeddings
        assert rows.num_embeddings == 200


def test_features_from_disk_keep_the_soft_cap_of_the_target_in_the_loop(
    tokenizer: Path, tmp_path: Path
) -> None:
    target = write_target(tmp_path / "target", tokenizer, *TARGETS["gemma2"])
    loop = trainer(target, tmp_path / "loop")
    disk = trainer(target, tmp_path / "disk", features=str(tmp_path / "features"))
    assert disk.shared.logit_softcap == loop.shared.logit_softcap == GEMMA_2_CAP
    found, expected = (
        one.train_source.features([0], [one.train_data[0][0]])[0][1].probabilities for one in (disk, loop)
    )
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_quantised_target_has_plain_answers_with_the_head_of_the_model_that_was_quantised(
    tokenizer: Path, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsLinearMethod,
    )

    target = write_target(tmp_path / "target", tokenizer, *TARGETS["llama 3"])
    head = trainer(target, tmp_path).run()
    quantised = quantise(target, tmp_path / "quantised")
    with pytest.raises(GriffinError, match="quantization_config is 'compressed-tensors', expected none"):
        target_config(quantised)
    with speculating(quantised, head) as llm:
        of_target, of_head = (
            [
                isinstance(module.quant_method, CompressedTensorsLinearMethod)
                for module in linear_layers(model)
            ]
            for model in (runner_of(llm).model.model.layers, runner_of(llm).drafter.model.model)
        )
    assert all(of_target)
    assert not any(of_head)


def linear_layers(model: torch.nn.Module) -> list[Any]:
    from vllm.model_executor.layers.linear import LinearBase

    return [module for module in model.modules() if isinstance(module, LinearBase)]


def quantise(target: Path, folder: Path) -> Path:
    """``target`` with int8 weights, one scale a row, and activations of int8 (compressed-tensors W8A8)."""
    shutil.copytree(target, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors |= {name: (tensor / scale).round().to(torch.int8), f"{name}_scale": scale}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight_bits | {"strategy": "channel", "dynamic": False},
                "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_target_with_a_lora_adapter_has_the_plain_answers_of_that_adapter(
    tokenizer: Path, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    target = write_target(tmp_path / "target", tokenizer, *TARGETS["llama 3"])
    head = trainer(target, tmp_path).run()
    adapter = LoRARequest("adapter", 1, str(write_adapter(tmp_path / "adapter", target)))
    common = {"model": str(target), "skip_tokenizer_init": True, "enable_lora": True, "max_lora_rank": 8}
    with engine(**common) as llm:
        adapted, plain = generate(llm, lora_request=adapter), generate(llm)
        assert all(one != other for one, other in zip(adapted, plain, strict=True))
    with engine(**common, spec_model=f"griffin:{head}", spec_tokens=K) as llm:
        assert generate(llm, lora_request=adapter) == adapted
        assert generate(llm) == plain
        assert_drafts_were_right_and_wrong(llm)


def write_adapter(folder: Path, target: Path) -> Path:
    """An adapter of attention, embeddings and ``lm_head`` that changes every answer."""
    config = AutoConfig.from_pretrained(target)
    d, rank = config.hidden_size, 4
    kv = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": d, "k_proj": kv, "v_proj": kv, "o_proj": d}
    pairs = {
        f"model.layers.{layer}.self_attn.{name}": (("lora_A.weight", d), ("lora_B.weight", size))
        for layer in range(config.num_hidden_layers)
        for name, size in attention.items()
    }
    pairs["model.embed_tokens"] = (("lora_embedding_A", config.vocab_size), ("lora_embedding_B", d))
    pairs["lm_head"] = (("lora_A.weight", d), ("lora_B.weight", config.vocab_size))
    torch.manual_seed(2)
    tensors = {}
    for module, ((a, inputs), (b, outputs)) in pairs.items():
        tensors[f"base_model.model.{module}.{a}"] = 0.3 * torch.randn(rank, inputs)
        tensors[f"base_model.model.{module}.{b}"] = 0.3 * torch.randn(outputs, rank)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [*attention, "embed_tokens", "lm_head"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


TEXT = {**SIZES, "vocab_size": tiny.CONFIG.vocab_size}
MESSAGE = "model_type is '{}', expected a text model of one of the families gemma2, "


def test_target_whose_logits_are_scaled_is_refused_by_server_trainer_and_inspection(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    head, target = tiny.write_head(tmp_path / "head"), tmp_path / "target"
    config = AutoConfig.for_model("granite", **TEXT, logits_scaling=8.0, architectures=["GraniteForCausalLM"])
    config.save_pretrained(target)
    arguments = EngineArgs(model=str(target), spec_model=f"griffin:{head}", skip_tokenizer_init=True)
    with pytest.raises(GriffinError, match=MESSAGE.format("granite")):
        arguments.create_engine_config()
    with pytest.raises(GriffinError, match=MESSAGE.format("granite")):
        target_config(target)
    assert MESSAGE.format("granite") in str(misfit(open_head(head), str(target)))


@pytest.mark.parametrize(("model_type", "text_type"), [("gemma3", "gemma3_text"), ("llava", "llama")])
def test_multimodal_target_is_refused_by_trainer_inspection_and_server_with_a_stand_in_for_its_model_config(
    model_type: str, text_type: str, tmp_path: Path
) -> None:
    """vLLM itself cannot look at multimodal models without torchvision, which its CPU build does without."""
    from vllm.config import ParallelConfig

    from griffin_vllm.serving.speculative_config import resolve

    head, target = tiny.write_head(tmp_path / "head"), tmp_path / "target"
    config = AutoConfig.for_model(model_type, text_config={**TEXT, "model_type": text_type})
    config.save_pretrained(target)
    text = config.text_config
    served = SimpleNamespace(
        hf_config=config, get_hidden_size=lambda: text.hidden_size, get_vocab_size=lambda: text.vocab_size
    )
    with pytest.raises(GriffinError, match=MESSAGE.format(model_type)):
        resolve(None, None, f"griffin:{head}", None, cast(Any, served), ParallelConfig())
    with pytest.raises(GriffinError, match=MESSAGE.format(model_type)):
        target_config(target)
    assert MESSAGE.format(model_type) in str(misfit(open_head(head), str(target)))
