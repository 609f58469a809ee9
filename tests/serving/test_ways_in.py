"""All ways of asking for a GRIFFIN head mean the same; what is not GRIFFIN stays as it is."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from packaging.version import Version
from safetensors.torch import save_file
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from griffin_vllm.config import ARCHITECTURE
from griffin_vllm.convert import convert
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving import hooks, speculative_config, touch_point
from tests.serving import tiny

K = 2


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def head(target: Path) -> Path:
    return tiny.write_head(target.parent / "head", target=target)


def configured(**arguments: Any) -> dict[str, Any]:
    """What vLLM would run, as far as speculation goes."""
    config = EngineArgs(max_model_len=256, **arguments).create_engine_config()
    speculative = config.speculative_config
    assert speculative is not None
    return {
        "target": config.model_config.model,
        "method": speculative.method,
        "head": speculative.model,
        "architectures": speculative.draft_model_config.architectures,
        "k": speculative.num_speculative_tokens,
        "draft_sample_method": speculative.draft_sample_method,
        "schedule": speculative.num_speculative_tokens_per_batch_size,
    }


@pytest.fixture
def expected(target: Path, head: Path) -> dict[str, Any]:
    return {
        "target": str(target),
        "method": "eagle",
        "head": str(head),
        "architectures": [ARCHITECTURE],
        "k": K,
        "draft_sample_method": "greedy",
        "schedule": None,
    }


def parse(*arguments: str) -> dict[str, Any]:
    from dataclasses import fields

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args([*arguments, "--max-model-len", "256"]))
    names = ("model", "speculative_config", "spec_method", "spec_model", "spec_tokens")
    return {field.name: getattr(args, field.name) for field in fields(args) if field.name in names}


def test_python_keywords(target: Path, head: Path, expected: dict[str, Any]) -> None:
    assert configured(model=str(target), spec_model=f"griffin:{head}", spec_tokens=K) == expected
    for model in (str(head), f"griffin:{head}"):
        speculation = {"method": "griffin", "model": model, "num_speculative_tokens": K}
        assert configured(model=str(target), speculative_config=speculation) == expected
    speculation = {"model": f"griffin:{head}", "num-speculative-tokens": K}
    assert configured(model=str(target), speculative_config=speculation) == expected
    assert (
        configured(model=str(target), spec_method="griffin", spec_model=str(head), spec_tokens=K) == expected
    )


def test_command_line_flags(target: Path, head: Path, expected: dict[str, Any]) -> None:
    model = ("--model", str(target))
    for flags in (
        ("--speculative-model", f"griffin:{head}", "--num-speculative-tokens", str(K)),
        ("--spec-model", f"griffin:{head}", "--spec-tokens", str(K)),
        (
            "--speculative-config",
            json.dumps({"method": "griffin", "model": str(head), "num_speculative_tokens": K}),
        ),
        ("--speculative-config.model", f"griffin:{head}", "--spec-tokens", str(K)),
    ):
        assert configured(**parse(*model, *flags)) == expected


def test_a_head_alone_brings_its_target(head: Path, expected: dict[str, Any]) -> None:
    recommended = {"k": tiny.CONFIG.num_speculative_tokens}
    assert configured(model=str(head)) == expected | recommended
    assert configured(model=str(head), spec_tokens=K) == expected


@pytest.mark.skipif(
    Version(vllm.__version__) < Version("0.29"), reason="vLLM 0.28 puts the head's own config in its place"
)
def test_a_speculative_config_holds_for_a_head_alone(head: Path, expected: dict[str, Any]) -> None:
    assert configured(model=str(head), speculative_config={"num_speculative_tokens": K}) == expected


def test_without_k_the_head_recommends_it_and_a_cpu_drafts_less_for_several_requests(
    target: Path, head: Path, expected: dict[str, Any]
) -> None:
    recommended = tiny.CONFIG.num_speculative_tokens
    assert configured(model=str(target), spec_model=f"griffin:{head}") == expected | {
        "k": recommended,
        "schedule": [(1, 1, recommended), (2, 2, 2), (3, 4, 1), (5, 5, 0)],
    }
    # for every load where that is what the operator wants
    everywhere = {"num_speculative_tokens_per_batch_size": [[1, 1, K]]}
    found = configured(model=str(target), spec_model=f"griffin:{head}", speculative_config=everywhere)
    assert found == expected | {"schedule": [(1, 1, K)]}


def test_on_a_mocked_gpu_the_recommended_k_holds_at_every_load(
    target: Path, head: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculative_config, "current_platform", types.SimpleNamespace(is_cpu=lambda: False))
    found = configured(model=str(target), spec_model=f"griffin:{head}")
    assert found == expected | {"k": tiny.CONFIG.num_speculative_tokens}


def test_other_speculative_keys_are_passed_on(target: Path, head: Path, expected: dict[str, Any]) -> None:
    speculation = {"draft_sample_method": "probabilistic", "parallel_drafting": False}
    found = configured(
        model=str(target), spec_model=f"griffin:{head}", spec_tokens=K, speculative_config=speculation
    )
    assert found == expected | {"draft_sample_method": "probabilistic"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_cache_dtype", "fp8"),
        ("quantization", "fp8"),
        ("attention_backend", "CPU_ATTN"),
        ("disable_eagle_block_drop", True),
        ("draft_load_config", {"load_format": "dummy"}),
    ],
)
def test_what_vllm_does_with_a_draft_model_it_does_with_a_head(
    target: Path, head: Path, key: str, value: Any
) -> None:
    arguments = EngineArgs(
        model=str(target), max_model_len=256, spec_model=f"griffin:{head}", speculative_config={key: value}
    )
    found = getattr(arguments.create_engine_config().speculative_config, key)
    if key == "draft_load_config":
        found, value = found.load_format, "dummy"
    assert getattr(found, "name", found) == value


@pytest.mark.parametrize(
    ("load_format", "expected"),
    [("auto", None), ("safetensors", None), ("sharded_state", "auto"), ("pt", "auto")],
)
def test_a_head_is_loaded_as_it_is_stored_whatever_its_target_is_stored_as(
    target: Path, head: Path, load_format: str, expected: str | None
) -> None:
    arguments = EngineArgs(
        model=str(target), max_model_len=256, load_format=load_format, spec_model=f"griffin:{head}"
    )
    found = arguments.create_engine_config().speculative_config.draft_load_config
    assert (found and found.load_format) == expected


def test_a_target_in_mistrals_own_format_is_of_the_mistral_family(head: Path, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    tiny.target_config().save_pretrained(folder)
    tiny.write_tokenizer(folder)
    sizes = tiny.target_config()
    params = {
        "dim": sizes.hidden_size,
        "n_layers": sizes.num_hidden_layers,
        "head_dim": sizes.head_dim,
        "hidden_dim": sizes.intermediate_size,
        "n_heads": sizes.num_attention_heads,
        "n_kv_heads": sizes.num_key_value_heads,
        "norm_eps": sizes.rms_norm_eps,
        "vocab_size": sizes.vocab_size,
    }
    (folder / "params.json").write_text(json.dumps(params))
    save_file({}, folder / "consolidated.safetensors")
    mistral = tiny.write_head(
        tmp_path / "head", tiny.CONFIG.model_copy(update={"target_model_type": "mistral"})
    )
    found = configured(model=str(folder), tokenizer_mode="hf", spec_model=f"griffin:{mistral}", spec_tokens=K)
    assert found["architectures"] == [ARCHITECTURE]


def test_heads_of_other_sizes_have_compiled_graphs_of_their_own(
    target: Path, head: Path, tmp_path: Path
) -> None:
    wider = tiny.write_head(
        tmp_path / "wider", tiny.CONFIG.model_copy(update={"intermediate_size": 128}), target
    )

    def name_of_graphs(head: Path) -> str:
        arguments = EngineArgs(model=str(target), max_model_len=256, spec_model=f"griffin:{head}")
        return str(arguments.create_engine_config().speculative_config.compute_hash())

    assert name_of_graphs(head) == name_of_graphs(head) != name_of_graphs(wider)


def test_a_head_says_how_it_likes_to_draft_and_the_operator_may_say_otherwise(
    target: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    config = tiny.CONFIG.model_copy(update={"draft_sample_method": "probabilistic"})
    head = tiny.write_head(tmp_path / "sampling-head", config, target)
    asked: dict[str, Any] = {"model": str(target), "spec_model": f"griffin:{head}", "spec_tokens": K}
    expected = expected | {"head": str(head)}
    assert configured(**asked) == expected | {"draft_sample_method": "probabilistic"}
    assert configured(**asked, speculative_config={"draft_sample_method": "greedy"}) == expected


@pytest.mark.parametrize(
    ("dtype", "native", "warned"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_a_cpu_that_emulates_bfloat16_is_warned_of(
    target: Path, head: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, native: bool, warned: int
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(speculative_config, "multiplies_bf16", lambda device: native)
    monkeypatch.setattr(speculative_config.logger, "warning", warnings.append)
    configured(model=str(target), spec_model=f"griffin:{head}", dtype=dtype)
    assert len(warnings) == warned
    assert all("--dtype float32" in warning for warning in warnings)


def test_the_config_survives_the_way_to_the_workers(target: Path, head: Path) -> None:
    config = EngineArgs(model=str(target), spec_model=f"griffin:{head}").create_engine_config()
    again = pickle.loads(pickle.dumps(config))
    draft = again.speculative_config.draft_model_config
    assert draft.architectures == [ARCHITECTURE]
    assert draft.hf_config.rope_parameters["rope_theta"] == tiny.CONFIG.rope_theta
    assert draft.get_head_size() == tiny.CONFIG.head_dim


def test_a_head_drafts_wherever_its_target_goes_unless_the_operator_says_otherwise(
    target: Path, tmp_path: Path
) -> None:
    short = tiny.CONFIG.model_copy(update={"max_position_embeddings": 64})
    head = tiny.write_head(tmp_path / "head", short)

    def drafts_up_to(**speculation: Any) -> int:
        config = EngineArgs(
            model=str(target), max_model_len=256, spec_model=f"griffin:{head}", speculative_config=speculation
        ).create_engine_config()
        return config.speculative_config.draft_model_config.max_model_len

    assert drafts_up_to() == 256
    assert drafts_up_to(max_model_len=32) == 32


@pytest.mark.parametrize("sample_method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("draft_vocabulary", [None, 9])
def test_greedy_drafts_of_a_reduced_vocabulary_are_left_to_the_model(
    target: Path, head: Path, tmp_path: Path, sample_method: str, draft_vocabulary: int | None
) -> None:
    import torch

    if draft_vocabulary:
        head = convert(head, tmp_path / "head", draft_vocabulary=torch.arange(draft_vocabulary)).folder
    config = EngineArgs(
        model=str(target),
        max_model_len=256,
        spec_model=f"griffin:{head}",
        speculative_config={"draft_sample_method": sample_method},
    ).create_engine_config()
    # vLLM's V2 runner refuses it for sampled drafts
    wanted = bool(draft_vocabulary) and sample_method == "greedy"
    assert config.speculative_config.use_local_argmax_reduction == wanted


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_reference_layout_is_converted_once_and_again_when_its_weights_change(
    target: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    tensors = {
        name: torch.randn(shape, dtype=torch.float16)
        for name, shape in tiny.tensor_shapes(tiny.CONFIG).items()
    }
    source = tmp_path / "source"
    tiny.write_reference_layout(source, tiny.CONFIG, tensors | {"embed_tokens.weight": torch.randn(96, 64)})
    if suffix == ".safetensors":
        (source / "pytorch_model.bin").unlink()
        save_file(tensors, source / "model.safetensors")

    def served() -> Path:
        return Path(configured(model=str(target), spec_model=f"griffin:{source}")["head"])

    first = served()
    written = (first / "model.safetensors").stat()
    assert served() == first
    assert (first / "model.safetensors").stat() == written
    assert first.parent == tmp_path / "cache/griffin"
    stored = load_file(first / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())

    tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    if suffix == ".safetensors":
        save_file(tensors, source / "model.safetensors")
    else:
        torch.save(tensors, source / "pytorch_model.bin")
    stored = load_file(served() / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())

    named = convert(source, tmp_path / "converted", target=str(target))
    assert "embed_tokens.weight" not in load_file(named.weights)
    assert configured(model=str(named.folder))["target"] == str(target)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
        {"spec_method": "ngram", "spec_tokens": 3},
    ],
)
def test_what_is_not_griffin_is_as_without_the_plugin(target: Path, arguments: dict[str, Any]) -> None:
    unhooked = EngineArgs.create_speculative_config.__wrapped__

    def speculative_config() -> Any:
        return EngineArgs(model=str(target), **arguments).create_engine_config().speculative_config

    hooked = speculative_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineArgs, "create_speculative_config", unhooked)
        assert repr(speculative_config()) == repr(hooked)


def test_contradictions_about_another_method_are_vllms_to_refuse(target: Path) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    with pytest.raises(ValueError, match=r"spec.method") as refusal:
        EngineArgs(model=str(target), spec_method="ngram", speculative_config=ngram).create_engine_config()
    assert not isinstance(refusal.value, GriffinError)


def test_a_model_without_the_prefix_goes_to_vllm() -> None:
    assert parse("--speculative-model", "org/draft")["spec_model"] == "org/draft"


def test_help_shows_the_flags() -> None:
    help_text = subprocess.run(
        ["vllm", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=_environment(),
    ).stdout
    assert "--speculative-model" in help_text
    assert "--num-speculative-tokens" in help_text


def test_vllm_plugins_can_leave_it_out(target: Path, head: Path) -> None:
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"EngineArgs(model={str(target)!r}, spec_model='griffin:{head}', spec_tokens=2).create_engine_config()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=_environment(VLLM_PLUGINS=""),
    )
    assert run.returncode != 0
    assert "griffin_vllm" not in run.stderr


def test_registering_again_changes_nothing() -> None:
    before = (
        EngineArgs.create_speculative_config,
        EngineArgs.add_cli_args,
        SpeculativeConfig.compute_hash,
        list(sys.meta_path),
    )
    hooks.register()
    assert before == (
        EngineArgs.create_speculative_config,
        EngineArgs.add_cli_args,
        SpeculativeConfig.compute_hash,
        list(sys.meta_path),
    )


def test_no_module_is_touched_on_import_for_two_points() -> None:
    modules = [point.module for point in hooks.TOUCH_POINTS if point.on_import]
    assert len(set(modules)) == len(modules)


def test_registering_imports_no_worker_code() -> None:
    code = (
        "import sys, vllm.engine.arg_utils; from griffin_vllm.serving.hooks import register;"
        "before = set(sys.modules); register();"
        "slow = ('vllm.v1.', 'vllm.model_executor.models.llama', 'griffin_vllm.serving.model');"
        "slow = [name for name in set(sys.modules) - before if name.startswith(slow)]; assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=_environment())


def test_a_vllm_that_does_not_fit_is_refused_only_when_griffin_is_asked_for(
    target: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(_: Any) -> None:
        raise touch_point.DoesNotFitError("has no parameter vllm_config")

    monkeypatch.setattr(touch_point, "misfits", {})
    monkeypatch.setattr(
        hooks, "TOUCH_POINTS", (touch_point.TouchPoint("vllm.config", "Thing.new", "a test", touch),)
    )
    hooks.register()
    EngineArgs(model=str(target)).create_engine_config()
    with pytest.raises(
        GriffinError, match=r"does not fit vLLM .*: vllm\.config\.Thing\.new \(has no parameter"
    ):
        configured(model=str(target), spec_model=f"griffin:{head}")


@pytest.mark.parametrize("version", ["0.99.0", "dev", "0.1.dev1+g0123456"])
def test_an_unknown_vllm_is_tried_with_a_warning_that_names_both_versions(
    target: Path, head: Path, expected: dict[str, Any], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setattr(touch_point, "log_once", said.append)
    hooks.register()
    [line] = said
    assert re.search(rf"made for vLLM .*0\.28.*, this is {re.escape(version)}; continuing anyway", line)
    assert configured(model=str(target), spec_model=f"griffin:{head}", spec_tokens=K) == expected


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ("EngineArgs.gone", "has no attribute 'gone'"),
        ("EngineArgs.add_cli_args(parser, spoon)", "EngineArgs.add_cli_args has no parameter spoon"),
        ("logger(message)", "logger is no function"),
    ],
)
def test_a_vllm_that_lacks_what_a_touch_point_needs_is_not_touched_there(
    need: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[Any] = []
    point = touch_point.TouchPoint("vllm.engine.arg_utils", "EngineArgs.x", "a test", touched.append, (need,))
    monkeypatch.setattr(touch_point, "misfits", {})
    monkeypatch.setattr(hooks, "TOUCH_POINTS", (point,))
    hooks.register()
    assert not touched
    with pytest.raises(GriffinError, match=rf"vllm\.engine\.arg_utils\.EngineArgs\.x \(.*{message}\)"):
        hooks.check_fits()


@pytest.mark.parametrize(
    ("changes", "relied_on", "message"),
    [
        ({"module": "vllm.v1.spec_decode.gone"}, (), r"No module named 'vllm\.v1\.spec_decode\.gone'"),
        ({"needs": ("EagleProposer.propose(spoon)",)}, (), "EagleProposer.propose has no parameter spoon"),
        ({}, ("vllm.v1.spec_decode.eagle:EagleProposer.gone",), "has no attribute 'gone'"),
        ({}, ("vllm.gone:Thing",), r"vllm\.gone \(No module named"),
        ({}, ("griffin_vllm.config:gone",), r"griffin_vllm\.config \(.*no attribute 'gone'"),
    ],
)
def test_misfit_of_a_worker_module_is_refused(
    target: Path,
    head: Path,
    changes: dict[str, Any],
    relied_on: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [
        dataclasses.replace(point, **changes if point.module == "vllm.v1.spec_decode.eagle" else {})
        for point in hooks.TOUCH_POINTS
    ]
    monkeypatch.setattr(touch_point, "misfits", {})
    monkeypatch.setattr(hooks, "TOUCH_POINTS", tuple(points))
    monkeypatch.setattr(hooks, "RELIED_ON", (*hooks.RELIED_ON, *relied_on))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    hooks.register()
    EngineArgs(model=str(target)).create_engine_config()
    with pytest.raises(GriffinError, match=rf"does not fit vLLM .*: [^;]*{message}[^;]*$"):
        configured(model=str(target), spec_model=f"griffin:{head}")


def test_a_vllm_that_lacks_what_the_config_needs_still_starts_without_griffin(
    target: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "griffin_vllm.serving.speculative_config")
    monkeypatch.setitem(sys.modules, "vllm.v1.spec_decode.dynamic.utils", None)
    ngram = {"method": "ngram", "num_speculative_tokens": 2}
    for other in ({}, {"speculative_config": ngram}):
        EngineArgs(model=str(target), max_model_len=256, **other).create_engine_config()
    with pytest.raises(GriffinError, match=r"does not fit vLLM .*speculative_config"):
        configured(model=str(target), spec_model=f"griffin:{head}")


def test_a_module_that_was_only_looked_for_is_still_touched_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "looked_for.py").write_text("there = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    touched: list[Any] = []
    point = touch_point.TouchPoint("looked_for", "there", "a test", touched.append, on_import=True)
    monkeypatch.setattr(sys, "meta_path", [touch_point.OnImport(point), *sys.meta_path])
    assert importlib.util.find_spec("looked_for")
    assert not touched
    module = importlib.import_module("looked_for")
    monkeypatch.delitem(sys.modules, "looked_for")
    importlib.import_module("looked_for")
    assert touched == [module]


def test_flags_that_a_vllm_has_by_itself_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class EngineArguments:
        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser.add_argument("--speculative-model", dest="its_own")
            return parser

    arg_utils = types.ModuleType("arg_utils")
    arg_utils.EngineArgs = EngineArguments  # type: ignore[attr-defined]
    said: list[str] = []
    monkeypatch.setattr(touch_point, "log_once", said.append)
    hooks._offer_flags(arg_utils)
    parser = EngineArguments.add_cli_args(argparse.ArgumentParser())
    parsed = parser.parse_args(["--speculative-model", "a", "--num-speculative-tokens", "3"])
    assert vars(parsed) == {"its_own": "a", "spec_tokens": 3}
    [line] = said
    assert re.match(
        "--speculative-model is not griffin-vllm's here; ask with --spec-model griffin:HEAD", line
    )


def test_what_is_set_on_self_is_found_in_a_class_and_its_bases() -> None:
    class Base:
        def __init__(self) -> None:
            self.there = 1

    module = types.ModuleType("module")
    module.Thing = type("Thing", (Base,), {})  # type: ignore[attr-defined]
    touch_point.expect(module, "Thing.there")
    with pytest.raises(AttributeError, match="has no attribute 'gone'"):
        touch_point.expect(module, "Thing.gone")


def test_a_class_that_another_plugin_has_wrapped_still_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.__init__

    def wrapped(self: Scheduler, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "__init__", wrapped)
    hooks.check_fits()


@pytest.mark.parametrize("version", ["0.27.9", "0.28.0rc1"])
def test_a_vllm_that_is_too_old_is_refused_only_when_griffin_is_asked_for(
    target: Path, head: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setattr(touch_point, "misfits", {})
    hooks.register()
    EngineArgs(model=str(target)).create_engine_config()
    with pytest.raises(
        GriffinError, match=rf"\(for vLLM .*0\.28.*\) does not fit vLLM {version}: it is too old$"
    ):
        configured(model=str(target), spec_model=f"griffin:{head}")


def _environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VLLM_LOGGING_LEVEL": "ERROR", **more}
