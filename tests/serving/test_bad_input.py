"""Bad input ends in one clear line (file, field, found, expected) before any model loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from griffin_vllm.errors import GriffinError
from tests.serving import tiny

D = tiny.HIDDEN_SIZE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.write_target(folder / "target")
    tiny.write_head(folder / "head")
    return folder


@pytest.fixture
def head(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "head", tmp_path / "head"))


def configure(models: Path, **arguments: Any) -> None:
    defaults: dict[str, Any] = {"model": str(models / "target"), "max_model_len": 256}
    EngineArgs(**(defaults | arguments)).create_engine_config()


def edit_config(head: Path, **changes: Any) -> None:
    path = head / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        where = config if name in config else config["transformer_layer_config"]
        where[name] = value
    path.write_text(json.dumps(config))


def edit_tensors(head: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = head / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def write_tensors(head: Path, **shapes: tuple[int, ...]) -> None:
    tensors = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, head / "model.safetensors")


def truncate(head: Path) -> None:
    path = head / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def point_at_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


HEADS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "no bundled head, folder or Hub id"),
    "empty folder": (
        empty,
        "has no model.safetensors or pytorch_model.bin",
    ),
    "no weights": (lambda h: (h / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (lambda h: (h / "config.json").unlink(), r"config\.json: is missing"),
    "config is not JSON": (lambda h: (h / "config.json").write_text("{"), "is not valid JSON"),
    "truncated safetensors": (truncate, "is not a readable safetensors file"),
    "tensor missing": (
        lambda h: edit_tensors(h, lambda t: t.pop("fc.fc.bias")),
        r"tensor fc\.fc\.bias is missing, expected shape \(64,\)",
    ),
    "tensor too many": (
        lambda h: edit_tensors(h, lambda t: t.update(more=torch.zeros(1))),
        r"tensors is \['more'\]",
    ),
    "tensor of the wrong shape": (
        lambda h: edit_tensors(h, lambda t: t.update({"fc.fc.bias": torch.zeros(D + 1)})),
        r"tensor fc\.fc\.bias is \(65,\), expected shape \(64,\)",
    ),
    "tensor of the wrong dtype": (
        lambda h: edit_tensors(h, lambda t: t.update({"fc.fc.bias": torch.zeros(D, dtype=torch.int32)})),
        r"dtype of fc\.fc\.bias is 'I32', expected floats",
    ),
    "NaN": (
        lambda h: edit_tensors(h, lambda t: t["fc.fc.bias"].fill_(float("nan"))),
        r"tensor fc\.fc\.bias is 'NaN or infinite', expected finite numbers",
    ),
    "EAGLE head": (lambda h: write_tensors(h, fc__weight=(D, 2 * D)), "looks like an EAGLE or HASS head"),
    "EAGLE-3 head": (
        lambda h: write_tensors(h, midlayer__hidden_norm__weight=(D,)),
        "looks like an EAGLE-3 head",
    ),
    "Medusa heads": (lambda h: write_tensors(h, medusa_head__weight=(D, D)), "looks like Medusa heads"),
    "heads do not divide": (
        lambda h: edit_config(h, num_key_value_heads=3),
        "num_key_value_heads is 3, expected a divisor of num_attention_heads=2",
    ),
    "scaled rotary": (
        lambda h: edit_config(h, rope_parameters={"rope_type": "linear", "factor": 2.0}),
        "rope_scaling is 'linear', expected null",
    ),
    "draft vocabulary too large": (
        lambda h: edit_config(h, draft_vocab_size=97),
        "draft_vocab_size is 97, expected at most vocab_size=96",
    ),
    "symlink loop": (
        point_at_itself,
        "no bundled head, folder or Hub id|cannot be read",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_broken_heads_are_refused(models: Path, head: Path, name: str) -> None:
    spoil, message = HEADS[name]
    spoil(head)
    with pytest.raises(GriffinError, match=message) as error:
        configure(models, spec_model=f"griffin:{head}")
    assert "\n" not in str(error.value)


def test_heads_of_other_sizes_are_refused(models: Path, tmp_path: Path) -> None:
    wide = tiny.CONFIG.model_copy(update={"hidden_size": 128})
    tiny.write_head(tmp_path / "wide", wide)
    with pytest.raises(GriffinError, match=r"hidden_size is 128, expected 64 \(the target's\)"):
        configure(models, spec_model=f"griffin:{tmp_path / 'wide'}")
    wordy = tiny.CONFIG.model_copy(update={"vocab_size": 97, "draft_vocab_size": 97})
    tiny.write_head(tmp_path / "wordy", wordy)
    with pytest.raises(GriffinError, match=r"vocab_size is 97, expected 96 \(the target's\)"):
        configure(models, spec_model=f"griffin:{tmp_path / 'wordy'}")


def test_code_in_a_pickle_does_not_run(models: Path, head: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (head / "model.safetensors").unlink()
    torch.save({"fc.fc.bias": Payload()}, head / "pytorch_model.bin")
    with pytest.raises(GriffinError, match=r"pytorch_model\.bin: is not a plain PyTorch weights file"):
        configure(models, spec_model=f"griffin:{head}")
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_head_does_not_run(models: Path, head: Path, tmp_path: Path) -> None:
    (head / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    config = json.loads((head / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (head / "config.json").write_text(json.dumps(config))
    configure(models, spec_model=f"griffin:{head}", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("method", ["eagle", "draft_model", None])
def test_a_griffin_head_under_another_method_is_refused(models: Path, method: str | None) -> None:
    with pytest.raises(GriffinError, match=r"is a GRIFFIN head, given with .*; use griffin:"):
        configure(models, spec_method=method, spec_model=str(models / "head"), spec_tokens=2)


NAMES = {
    "griffin:": "no head named after 'griffin:'",
    "griffin:no-such-head": "griffin:no-such-head: no bundled head, folder or Hub id of that name",
    "griffin:../../../etc": "no bundled head|is not a folder|has no model.safetensors",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_nowhere_are_refused(models: Path, name: str) -> None:
    with pytest.raises(GriffinError, match=NAMES[name]):
        configure(models, spec_model=name)


def test_the_hub_offline_is_said_in_one_line(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GriffinError, match="griffin:org/none: is neither a folder here nor a repository"):
        configure(models, spec_model="griffin:org/none")


@pytest.mark.parametrize("k", [0, -1, 129, 10**9, 2.5, "three", True])
def test_numbers_of_draft_tokens_that_cannot_be(models: Path, k: Any) -> None:
    speculation = {"method": "griffin", "model": str(models / "head"), "num_speculative_tokens": k}
    expected = rf"num_speculative_tokens is {re.escape(repr(k))}, expected a whole number from 1 to 128"
    with pytest.raises(GriffinError, match=expected):
        configure(models, speculative_config=speculation)


KEYS: dict[str, tuple[Any, str]] = {
    "rejection_sample_method": ("block", "'block', expected 'standard'"),
    "synthetic_acceptance_length": (2.0, "expected 'standard'"),
    "use_heterogeneous_vocab": (True, "shares its target's vocabulary"),
    "parallel_drafting": (True, "drafts one token after the other"),
    "moe_backend": ("triton", "has no experts"),
    "tensor_parallel_size": (2, "runs on the target's ranks"),
    "draft_tensor_parallel_size": (2, r"is 2, expected 1 \(the target's\)"),
    "code_revision": ("main", "brings no code"),
    "revision": ("main", r"revision is 'main', expected none \(the head is"),
    "prompt_lookup_max": (4, "belongs to another method"),
    "suffix_decoding_max_tree_depth": (3, "belongs to another method"),
    "dspark_draft_topk": (3, "belongs to another method"),
    "speculative_token_tree": ("[(0,)]", "is not a key of this vLLM"),
    "draft_sample_metod": ("greedy", "did you mean draft_sample_method"),
}


@pytest.mark.parametrize("key", KEYS)
def test_speculative_keys_that_would_be_ignored_or_crash(models: Path, key: str) -> None:
    value, message = KEYS[key]
    with pytest.raises(GriffinError, match=message):
        configure(models, spec_model=f"griffin:{models / 'head'}", speculative_config={key: value})


def test_contradicting_ways_are_refused(models: Path) -> None:
    head = str(models / "head")
    with pytest.raises(GriffinError, match="give one of them"):
        configure(
            models, spec_model=f"griffin:{head}", speculative_config={"method": "griffin", "model": head}
        )
    with pytest.raises(GriffinError, match="method is 'eagle', expected 'griffin'"):
        configure(models, spec_model=f"griffin:{head}", spec_method="eagle")
    with pytest.raises(GriffinError, match="num_speculative_tokens is 4: give one of them"):
        configure(
            models,
            spec_tokens=2,
            speculative_config={"method": "griffin", "model": head, "num_speculative_tokens": 4},
        )
    with pytest.raises(GriffinError, match="model is None, expected a head"):
        configure(models, speculative_config={"method": "griffin"})


def test_deployments_that_are_not_supported(models: Path, tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match="pipeline_parallel_size is 2, expected 1"):
        configure(
            models,
            spec_model=f"griffin:{models / 'head'}",
            pipeline_parallel_size=2,
            distributed_executor_backend="mp",
        )
    odd = tiny.CONFIG.model_copy(update={"num_attention_heads": 3, "num_key_value_heads": 3})
    tiny.write_head(tmp_path / "odd", odd)
    with pytest.raises(
        GriffinError, match="num_attention_heads is 3, expected a number that tensor_parallel_size=2"
    ):
        configure(models, spec_model=f"griffin:{tmp_path / 'odd'}", tensor_parallel_size=2)


def test_targets_of_other_families_are_refused(models: Path, tmp_path: Path) -> None:
    from transformers import Gemma2Config

    Gemma2Config(
        architectures=["Gemma2ForCausalLM"],
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    ).save_pretrained(tmp_path)
    with pytest.raises(
        GriffinError, match="model_type is 'gemma2', expected a text model of one of the families"
    ):
        configure(
            models, model=str(tmp_path), spec_model=f"griffin:{models / 'head'}", skip_tokenizer_init=True
        )


def test_a_head_that_names_no_target_cannot_be_served_alone(models: Path) -> None:
    with pytest.raises(GriffinError, match="names no target"):
        configure(models, model=str(models / "head"))


def test_vllm_serve_ends_with_the_one_clear_line(models: Path) -> None:
    head = models / "nowhere"
    flags = ("--speculative-model", f"griffin:{head}")
    run = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(models / "target"), *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert f"griffin:{head}: no bundled head, folder or Hub id of that name" in last
    assert "Loading" not in run.stdout + run.stderr
