"""Bad input ends in one clear line (file, field, found, expected) before any model loads.

Tables of what an operator can get wrong go through the real command, ``vllm serve``, and assert its exit
status, its last line and the seconds that it took; the target's folder holds no weights that could load.
Variants of one case go through ``EngineArgs``, which that command calls.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from vllm.config import ModelConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs

from griffin_vllm.convert import convert
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.speculative_config import resolve
from tests.serving import tiny
from tests.serving.vllm_command import VllmCommand, vllm_command

D = tiny.HIDDEN_SIZE
SECONDS = 10


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    target = tiny.write_target(folder / "target")
    shutil.copy(target / "model.safetensors", folder / "target.safetensors")
    (target / "model.safetensors").unlink()
    tiny.write_head(folder / "head")
    three = {"num_attention_heads": 3, "num_key_value_heads": 3}
    tiny.write_head(folder / "three", tiny.CONFIG.model_copy(update=three))
    return folder


@pytest.fixture(scope="module")
def vllm() -> Iterator[VllmCommand]:
    with vllm_command() as command:
        yield command


def refusal(
    vllm: VllmCommand,
    models: Path,
    *flags: str,
    status: int = 1,
    before: str = "",
    target: Path | None = None,
) -> str:
    """The one line with which ``vllm serve`` refuses, soon and before a process for a model is started."""
    start = time.monotonic()
    run = vllm.run("serve", str(target or models / "target"), "--max-model-len", "256", *flags, before=before)
    assert run.status == status, run.output
    assert time.monotonic() - start < SECONDS
    assert "EngineCore" not in run.output
    return run.last_line


@pytest.fixture
def head(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "head", tmp_path / "head"))


def configure(models: Path, **arguments: Any) -> Any:
    """vLLM's speculative config."""
    defaults: dict[str, Any] = {"model": str(models / "target"), "max_model_len": 256}
    return EngineArgs(**(defaults | arguments)).create_engine_config().speculative_config


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


def edit_draft_vocabulary(head: Path, offsets: list[int]) -> None:
    edit_config(head, draft_vocab_size=len(offsets))
    edit_tensors(head, lambda t: t.update(d2t=torch.tensor(offsets), t2d=torch.zeros(96, dtype=torch.bool)))


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
    "another width than the target's": (
        lambda h: tiny.write_head(h, tiny.CONFIG.model_copy(update={"hidden_size": 128})),
        r"config\.json: hidden_size is 128, expected 64 \(the target's\)",
    ),
    "another vocabulary than the target's": (
        lambda h: tiny.write_head(
            h, tiny.CONFIG.model_copy(update={"vocab_size": 97, "draft_vocab_size": 97})
        ),
        r"config\.json: vocab_size is 97, expected 96 \(the target's\)",
    ),
    "another target family of the same sizes": (
        lambda h: edit_config(h, target_model_type="qwen2"),
        r"config\.json: target_model_type is 'qwen2', expected 'llama' \(the target's model_type\)",
    ),
    "draft vocabulary too large": (
        lambda h: edit_config(h, draft_vocab_size=97),
        "draft_vocab_size is 97, expected at most vocab_size=96",
    ),
    "draft vocabulary without its map": (
        lambda h: edit_config(h, draft_vocab_size=3),
        r"tensor d2t is missing, expected shape \(3,\)",
    ),
    "draft vocabulary outside the target's": (
        lambda h: edit_draft_vocabulary(h, [0, 1, 94]),
        "a target id in d2t is 96, expected 0 to 95",
    ),
    "symlink loop": (
        point_at_itself,
        "no bundled head, folder or Hub id|cannot be read",
    ),
    "weights are a symlink loop": (
        lambda h: link(h / "model.safetensors", h / "model.safetensors"),
        "has no model.safetensors",
    ),
    "weights are a device": (
        lambda h: link(h / "model.safetensors", Path("/dev/zero")),
        "has no model.safetensors",
    ),
    "config is a device": (
        lambda h: link(h / "config.json", Path("/dev/zero")),
        r"config\.json: is missing or not a regular file",
    ),
    "index that leads out of the folder": (
        lambda h: (h / "model.safetensors").rename(h / "model.safetensors.index.json"),
        "has no model.safetensors",
    ),
    "pickle that runs code": (
        lambda h: write_pickle(h, {"fc.fc.bias": MakesAFolder(h / "ran")}),
        r"pytorch_model\.bin: is not a plain PyTorch weights file; code in a pickle is never run",
    ),
    "pickle that claims more than it holds": (
        lambda h: write_pickle(h, {"fc.mlp.up_proj.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}),
        r"a tensor's shape is \{'fc\.mlp\.up_proj\.weight': \(1048576, 1048576\)\}, expected as many",
    ),
    "a whole model": (
        lambda h: shutil.copy(h.parent / "target.safetensors", h / "model.safetensors"),
        "is not a GRIFFIN head; it looks like a whole model",
    ),
    "EAGLE-3 head with its own config": (
        lambda h: write_eagle3(h),
        r"model\.safetensors: has no fc\.mlp\.up_proj\.weight.* looks like an EAGLE-3 head",
    ),
    "EAGLE-3 head in speculators' format": (
        lambda h: edit_config(h, speculators_model_type="eagle3"),
        "speculators_model_type is 'eagle3', expected 'griffin'",
    ),
    "width that the heads do not divide": (
        lambda h: edit_config(h, num_attention_heads=3, head_dim=None),
        "hidden_size is 64, expected a multiple of num_attention_heads=3",
    ),
    "recommended K that cannot be": (
        lambda h: edit_config(
            h,
            speculators_config={
                "verifier": {"name_or_path": None},
                "proposal_methods": [{"speculative_tokens": 10**9}],
            },
        ),
        r"config\.json: num_speculative_tokens is 1000000000, expected a whole number from 1 to 128",
    ),
}


def link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


class MakesAFolder:
    """Unpickling this creates ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def write_pickle(head: Path, state: dict[str, Any]) -> None:
    (head / "model.safetensors").unlink()
    torch.save(state, head / "pytorch_model.bin")


def write_eagle3(head: Path) -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0}
    config = tiny.CONFIG.layer_config("llama") | {"rope_parameters": None, "rope_scaling": scaled}
    (head / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLMEagle3"]}))
    write_tensors(head, fc__weight=(D, 3 * D), midlayer__hidden_norm__weight=(D,), d2t=(9,))


@pytest.mark.parametrize("name", HEADS)
def test_broken_heads_are_refused(vllm: VllmCommand, models: Path, head: Path, name: str) -> None:
    spoil, message = HEADS[name]
    shutil.copy(models / "target.safetensors", head.parent)
    spoil(head)
    line = refusal(vllm, models, "--speculative-model", f"griffin:{head}")
    assert re.match(f"griffin_vllm.errors.GriffinError: .*({message})", line), line
    assert not (head / "ran").exists()


BUNDLED = "smollm2-135m-instruct"
# What is asked for ({models} is a folder with `head` and `target`), and the line that refuses it.
REQUESTS: dict[str, tuple[list[str], str]] = {
    "nothing after griffin:": (
        ["--speculative-model", "griffin:"],
        "no head named after 'griffin:': give a bundled name",
    ),
    "a bundled name misspelt": (
        ["--speculative-model", f"griffin:{BUNDLED.replace('i', 'y')}"],
        f"no bundled head, folder or Hub id of that name; did you mean griffin:{BUNDLED}\\?",
    ),
    "a folder that is not there": (
        ["--speculative-model", "griffin:{models}/nowhere"],
        "no bundled head, folder or Hub id of that name; bundled heads: ",
    ),
    "a name that leads elsewhere": (
        ["--speculative-model", "griffin:../../../../../../../../etc"],
        "has no model.safetensors or pytorch_model.bin",
    ),
    "a revision that leads elsewhere": (
        ["--speculative-model", "griffin:org/name@../../../x"],
        "no bundled head, folder or Hub id of that name",
    ),
    "a Hub id, offline": (
        ["--speculative-model", "griffin:org/none"],
        "griffin:org/none: is neither a folder here nor a repository that the Hugging Face Hub gave out",
    ),
    "K = 0": (
        ["--speculative-model", "griffin:{models}/head", "--num-speculative-tokens", "0"],
        "num_speculative_tokens is 0, expected a whole number from 1 to 128",
    ),
    "negative K": (
        ["--speculative-model", "griffin:{models}/head", "--spec-tokens", "-3"],
        "num_speculative_tokens is -3, expected a whole number from 1 to 128",
    ),
    "huge K": (
        ["--speculative-model", "griffin:{models}/head", "--num-speculative-tokens", "999999999999"],
        "num_speculative_tokens is 999999999999, expected a whole number from 1 to 128",
    ),
    "K that is a word": (
        ["--speculative-config", '{{"model": "griffin:{models}/head", "num_speculative_tokens": "many"}}'],
        "num_speculative_tokens is 'many', expected a whole number from 1 to 128",
    ),
    "K = NaN": (
        ["--speculative-config", '{{"model": "griffin:{models}/head", "num_speculative_tokens": NaN}}'],
        "num_speculative_tokens is nan, expected a whole number from 1 to 128",
    ),
    "a schedule that begins at two requests": (
        [
            "--speculative-model=griffin:{models}/head",
            "--speculative-config.num_speculative_tokens_per_batch_size=[[2,4,1]]",
        ],
        r"num_speculative_tokens_per_batch_size is \[\[2, 4, 1\]\], expected .*: The first .* must start at 1",
    ),
    "a head by two ways": (
        ["--speculative-model", "griffin:{models}/head", "--speculative-config", '{{"model": "other"}}'],
        r"--speculative-model \(or --spec-model\) is 'griffin:.*' and .* model is 'other': give one of them",
    ),
    "another method": (
        ["--speculative-model", "griffin:{models}/head", "--spec-method", "eagle"],
        "method is 'eagle', expected 'griffin'",
    ),
    "a GRIFFIN head given as eagle": (
        ["--spec-method", "eagle", "--spec-model", "{models}/head", "--spec-tokens", "2"],
        "is a GRIFFIN head, given with method 'eagle'; use griffin:",
    ),
    "the method without a head": (
        ["--speculative-config.method", "griffin"],
        "model is None, expected a head",
    ),
    "a head that is a number": (
        ["--speculative-config", '{{"method": "griffin", "model": 7}}'],
        "model is 7, expected a head",
    ),
    "pipeline parallelism": (
        ["--speculative-model=griffin:{models}/head", "--pipeline-parallel-size=2"],
        "pipeline_parallel_size is 2, expected 1",
    ),
    "ranks that the head's sizes cannot be split among": (
        ["--speculative-model", "griffin:{models}/three", "--tensor-parallel-size", "2"],
        "num_attention_heads is 3, expected a number that tensor_parallel_size=2 divides",
    ),
    "prompts that are no tokens": (
        ["--speculative-model", "griffin:{models}/head", "--enable-prompt-embeds"],
        "enable_prompt_embeds is True, expected False",
    ),
    "a pooling model": (
        ["--speculative-model", "griffin:{models}/head", "--runner", "pooling"],
        "runner is 'pooling', expected 'generate'",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_cannot_be_are_refused(vllm: VllmCommand, models: Path, name: str) -> None:
    flags, message = REQUESTS[name]
    line = refusal(vllm, models, *(flag.format(models=models) for flag in flags))
    assert re.match(f"griffin_vllm.errors.GriffinError: .*{message}", line), line


def test_a_number_of_draft_tokens_that_is_no_number_is_a_usage_error(vllm: VllmCommand, models: Path) -> None:
    flags = ("--speculative-model", f"griffin:{models / 'head'}", "--num-speculative-tokens", "nan")
    line = refusal(vllm, models, *flags, status=2)
    assert line.endswith("argument --num-speculative-tokens: invalid int value: 'nan'")


RENAMED = """
import dataclasses
from griffin_vllm.serving import hooks
hooks.TOUCH_POINTS = tuple(
    dataclasses.replace(point, module=point.module.replace("spec_decode.eagle", "spec_decode.gone"))
    for point in hooks.TOUCH_POINTS
)
"""
VLLMS: dict[str, tuple[str, str]] = {
    "too old": ("import vllm; vllm.__version__ = '0.27.1'", r"does not fit vLLM 0\.27\.1: it is too old"),
    "without a module that only workers import": (
        RENAMED,
        r"does not fit vLLM .*: vllm\.v1\.spec_decode\.gone\.EagleProposer.* \(No module named",
    ),
}


@pytest.mark.parametrize("name", VLLMS)
def test_vllms_that_do_not_fit_are_refused(vllm: VllmCommand, models: Path, name: str) -> None:
    change, message = VLLMS[name]
    line = refusal(vllm, models, "--speculative-model", f"griffin:{models / 'head'}", before=change)
    assert re.match(f"griffin_vllm.errors.GriffinError: griffin-vllm .for vLLM .*{message}", line), line


def test_code_beside_a_head_does_not_run(models: Path, head: Path, tmp_path: Path) -> None:
    (head / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    config = json.loads((head / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (head / "config.json").write_text(json.dumps(config))
    served = configure(models, spec_model=f"griffin:{head}", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()
    assert not hasattr(served.draft_model_config.hf_config, "auto_map")


BESIDE: dict[str, Callable[[Path], object]] = {
    "other weights": lambda h: save_file({"fc.fc.bias": torch.zeros(D)}, h / "other.safetensors"),
    "an index that leads out of the folder": lambda h: (h / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"fc.fc.bias": "../../other.safetensors"}})
    ),
    "a quantisation": lambda h: edit_config(h, quantization_config={"quant_method": "fp8"}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_nothing_but_what_was_checked_is_served(
    models: Path, head: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    BESIDE[name](head)
    served = configure(models, spec_model=f"griffin:{head}")
    folder = Path(served.model)
    assert folder.parent == tmp_path / "cache" / "griffin"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").samefile(head / "model.safetensors")
    assert served.draft_model_config.quantization is None


def test_a_cache_that_cannot_be_written_is_said_in_one_line(
    models: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    BESIDE["other weights"](head)
    with pytest.raises(GriffinError, match=r"griffin/head-\w+: cannot be written \(Not a directory\)"):
        configure(models, spec_model=f"griffin:{head}")


@pytest.mark.parametrize("method", ["eagle", "draft_model", None])
def test_a_griffin_head_under_another_method_is_refused(models: Path, method: str | None) -> None:
    with pytest.raises(GriffinError, match=r"is a GRIFFIN head, given with .*; use griffin:"):
        configure(models, spec_method=method, spec_model=str(models / "head"), spec_tokens=2)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_published_head_under_another_method_is_refused(models: Path, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "head"
    tensors = load_file(models / "head" / "model.safetensors")
    tiny.write_reference_layout(folder, tiny.CONFIG, tensors)
    (pickle,) = folder.glob("*.bin")
    if file == "model.safetensors":
        pickle.unlink()
        save_file(tensors, folder / file)
    with pytest.raises(GriffinError, match=r"is a GRIFFIN head, given with .*; use griffin:"):
        configure(models, spec_method="eagle", spec_model=str(folder), spec_tokens=2)


def test_a_griffin_head_that_only_vllms_config_shows_is_refused_under_another_method_mocked_as_the_hub_is_out_of_reach(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("griffin_vllm.serving.speculative_config.is_griffin_head", lambda _: False)
    with pytest.raises(GriffinError, match=r"head: is a GRIFFIN head; give it as griffin:.*head or with"):
        configure(models, spec_method="eagle", spec_model=str(models / "head"), spec_tokens=2)


def test_a_schedule_that_asks_for_too_much_is_blamed_for_it(models: Path) -> None:
    given = {SCHEDULE: [[1, 4, 200]]}
    with pytest.raises(GriffinError, match=r"^speculative_config: num_speculative_tokens is 200, expected"):
        configure(models, spec_model=f"griffin:{models / 'head'}", speculative_config=given)


@pytest.mark.parametrize("k", [0, 129, 2.5, float("inf"), "three", True, [3]])
def test_numbers_of_draft_tokens_that_cannot_be(models: Path, k: Any) -> None:
    speculation = {"method": "griffin", "model": str(models / "head"), "num_speculative_tokens": k}
    expected = rf"num_speculative_tokens is {re.escape(repr(k))}, expected a whole number from 1 to 128"
    with pytest.raises(GriffinError, match=expected):
        configure(models, speculative_config=speculation)


SCHEDULE = "num_speculative_tokens_per_batch_size"


@pytest.mark.parametrize(
    "schedule", [[], 3, [3], [[1, 2]], [[1, 4, 2.5]], [[1, 4, 3], [3, 8, 1]], [[1, 4, -1]]]
)
def test_schedules_that_cannot_be(models: Path, schedule: Any) -> None:
    with pytest.raises(GriffinError, match=f"{SCHEDULE} is {re.escape(repr(schedule))}, expected a list of"):
        configure(models, spec_model=f"griffin:{models / 'head'}", speculative_config={SCHEDULE: schedule})


def test_a_schedule_of_more_drafts_than_k_is_refused_and_k_is_its_most_where_none_is_given(
    models: Path,
) -> None:
    head, more = f"griffin:{models / 'head'}", {SCHEDULE: [(1, 1, 7), (2, 8, 1)]}
    with pytest.raises(
        GriffinError, match=f"{SCHEDULE} is 7, expected at most num_speculative_tokens, which is 5"
    ):
        configure(models, spec_model=head, spec_tokens=5, speculative_config=more)
    assert configure(models, spec_model=head, speculative_config=more).num_speculative_tokens == 7
    nothing = {SCHEDULE: [(1, 8, 0)]}
    assert configure(models, spec_model=head, speculative_config=nothing).num_speculative_tokens == 1


@pytest.mark.parametrize("revision", ["main", "x" * 300])
def test_a_revision_of_what_has_none_is_said_so(models: Path, revision: str) -> None:
    for name in ("griffin:smollm2-135m-instruct", f"griffin:{models / 'head'}"):
        with pytest.raises(GriffinError, match=r"revision is '.*', expected none \(the head is"):
            configure(models, spec_model=name, speculative_config={"revision": revision})


KEYS: dict[str, tuple[Any, str]] = {
    "rejection_sample_method": ("block", "'block', expected rejection_sample_method 'standard' alone"),
    "synthetic_acceptance_length": (
        2.0,
        "synthetic_acceptance_length is 2.0, expected rejection_sample_method",
    ),
    "use_heterogeneous_vocab": (True, "shares its target's vocabulary"),
    "parallel_drafting": (True, "drafts one token after the other"),
    "moe_backend": ("triton", "has no experts"),
    "tensor_parallel_size": (2, "runs on the target's ranks"),
    "draft_tensor_parallel_size": (2, r"is 2, expected 1 \(the target's\)"),
    "code_revision": ("main", "brings no code"),
    "revision": ("main", r"revision is 'main', expected none \(the head is"),
    "prompt_lookup_max": (
        4,
        "prompt_lookup_max does not go with method 'griffin': it belongs to another method",
    ),
    "prompt_lookup_min": (-1, "expected a number of tokens"),
    "suffix_decoding_max_tree_depth": (3, "belongs to another method"),
    "dspark_draft_topk": (3, "belongs to another method"),
    "speculative_token_tree": ("[(0,)]", "is not a key of this vLLM"),
    "draft_sample_metod": (
        "greedy",
        r"draft_sample_metod is not a key of this vLLM; did you mean draft_sample_method\?",
    ),
}


@pytest.mark.parametrize("key", KEYS)
def test_speculative_keys_that_would_be_ignored_or_crash(vllm: VllmCommand, models: Path, key: str) -> None:
    value, message = KEYS[key]
    asked = json.dumps({"model": f"griffin:{models / 'head'}", key: value})
    line = refusal(vllm, models, "--speculative-config", asked)
    assert re.match(f"griffin_vllm.errors.GriffinError: .*{message}", line), line


def test_block_rejection_reaches_vllm_on_a_mocked_gpu(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr("griffin_vllm.serving.speculative_config.current_platform", gpu)
    asked = {"rejection_sample_method": "block"}
    served = configure(models, spec_model=f"griffin:{models / 'head'}", speculative_config=asked)
    assert served.rejection_sample_method == "block"


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


def test_a_target_of_another_family_is_refused(vllm: VllmCommand, models: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=tiny.CONFIG.vocab_size, n_embd=D, n_layer=1, n_head=2)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    line = refusal(vllm, models, "--speculative-model", f"griffin:{models / 'head'}", target=tmp_path)
    expected = (
        "griffin_vllm.errors.GriffinError: target: model_type is 'gpt2', expected a text model of one of"
    )
    assert line.startswith(expected), line


def test_a_reduced_vocabulary_is_refused_for_a_target_that_says_its_lm_head_is_quantised(
    models: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(models / "target", tmp_path / "target"))
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        **{"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        "lm_head": True,
    }
    (target / "config.json").write_text(json.dumps(config))
    convert(models / "head", tmp_path / "head", draft_vocabulary=torch.arange(9))
    configure(models, model=str(target), spec_model=f"griffin:{models / 'head'}")
    with pytest.raises(GriffinError, match=r"target: quantization_config\.lm_head is True, expected false"):
        configure(models, model=str(target), spec_model=f"griffin:{tmp_path / 'head'}")


def test_a_head_that_names_no_target_cannot_be_served_alone(models: Path) -> None:
    with pytest.raises(GriffinError, match="names no target"):
        configure(models, model=str(models / "head"))


@pytest.fixture(scope="module")
def target(models: Path) -> ModelConfig:
    return EngineArgs(model=str(models / "target"), max_model_len=256).create_model_config()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=2000, derandomize=True)
@given(
    speculation=st.dictionaries(
        st.sampled_from(["method", "model", "num_speculative_tokens", "revision", SCHEDULE, *KEYS]),
        JSON_VALUES | st.sampled_from(["griffin", "griffin:", "griffin:x/y", "eagle"]),
    ),
    spec_model=st.none() | st.text().map(lambda name: f"griffin:/{name}"),
    spec_tokens=st.none() | st.integers(),
)
def test_no_speculative_config_raises_anything_but_our_error(
    target: ModelConfig, speculation: dict[str, Any], spec_model: str | None, spec_tokens: int | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        try:
            resolve(speculation, None, spec_model, spec_tokens, target, ParallelConfig())
        except GriffinError as error:
            assert "\n" not in str(error)  # noqa: PT017 - success is fine too
