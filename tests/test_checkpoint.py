"""Heads on disk: what is not a sound GRIFFIN head is refused before anything loads, and nothing it brings runs."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from griffin_vllm.checkpoint import (
    CONFIG_FILE,
    PICKLE_FILE,
    SAFETENSORS_FILE,
    check_values,
    draft_vocabulary,
    draft_vocabulary_tensors,
    find_head,
    load_tensors,
    open_head,
    save_head,
    tensor_shapes,
)
from griffin_vllm.config import HeadConfig
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import atomic_folder

CONFIG = HeadConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=20,
    draft_vocab_size=20,
)
Tensors = dict[str, torch.Tensor]


def random_tensors(config: HeadConfig = CONFIG) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}


def write_head(folder: Path, tensors: Tensors | None = None, config: Any = None) -> Path:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(config or CONFIG.layer_config("llama")))
    save_file(random_tensors() if tensors is None else tensors, folder / SAFETENSORS_FILE)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(GriffinError) as caught:
        check_values(open_head(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_head_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    save_head(tmp_path / "head", CONFIG.to_served(), random_tensors(), card="# a head")
    head = open_head(tmp_path / "head")
    assert head.config == CONFIG
    assert head.is_served_layout
    stored = load_tensors(head.weights)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == tensor_shapes(CONFIG)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    check_values(head)


def test_whoever_may_read_a_saved_heads_config_may_read_its_weights(tmp_path: Path) -> None:
    save_head(tmp_path / "head", CONFIG.to_served(), random_tensors())
    modes = {file.stat().st_mode for file in (tmp_path / "head").iterdir()}
    assert modes == {(tmp_path / "head" / CONFIG_FILE).stat().st_mode}


@pytest.mark.parametrize("file", [SAFETENSORS_FILE, PICKLE_FILE])
def test_both_weight_formats_of_the_reference_layout_are_opened(tmp_path: Path, file: str) -> None:
    folder = write_head(tmp_path / "head")
    if file == PICKLE_FILE:
        (folder / SAFETENSORS_FILE).unlink()
        torch.save(random_tensors(), folder / PICKLE_FILE)
    head = open_head(folder)
    assert head.weights.name == file
    assert not head.is_served_layout
    assert load_tensors(head.weights).keys() == random_tensors().keys()
    check_values(head)


# The tensor that is put in (or taken out: None), and what the message says of it.
BAD_TENSORS: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "missing": (
        "layers.0.mlp.down_proj.weight",
        None,
        "tensor layers.0.mlp.down_proj.weight is missing, expected shape (64, 48)",
    ),
    "extra": ("layers.1.mlp.up_proj.weight", torch.ones(1), "tensors is ['layers.1.mlp.up_proj"),
    "unasked bias": (
        "layers.0.self_attn.q_proj.bias",
        torch.ones(32),
        "'layers.0.self_attn.q_proj.bias'",
    ),
    "wrong shape": ("fc.fc.bias", torch.ones(31), "tensor fc.fc.bias is (31,), expected shape (32,)"),
    "integers": (
        "fc.fc.bias",
        torch.ones(32, dtype=torch.int64),
        "dtype of fc.fc.bias is 'I64', expected floats",
    ),
    "eight bits": (
        "fc.fc.bias",
        torch.ones(32).to(torch.float8_e4m3fn),
        "dtype of fc.fc.bias is 'F8_E4M3', expected floats",
    ),
    "NaN": (
        "fc.fc.bias",
        torch.full((32,), torch.nan),
        "tensor fc.fc.bias is 'NaN or infinite', expected finite",
    ),
    "embeddings of another target": (
        "embed_tokens.weight",
        torch.ones(21, 32),
        "tensor embed_tokens.weight is (21, 32), expected shape (20, 32)",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_bad_tensor_is_named_with_what_was_expected(tmp_path: Path, name: str) -> None:
    tensor_name, tensor, expected = BAD_TENSORS[name]
    tensors = random_tensors()
    tensors.pop(tensor_name, None)
    if tensor is not None:
        tensors[tensor_name] = tensor
    message = refusal(write_head(tmp_path / "head", tensors))
    assert message.startswith(f"{tmp_path / 'head' / SAFETENSORS_FILE}: ")
    assert expected in message


OTHER_SPECULATORS = {
    "EAGLE or HASS": ["fc.weight", "layers.0.mlp.up_proj.weight"],
    "EAGLE-3": ["fc.weight", "midlayer.hidden_norm.weight", "d2t"],
    "Medusa": ["0.0.linear.weight", "0.1.weight"],
}


@pytest.mark.parametrize("kind", OTHER_SPECULATORS)
def test_another_speculators_head_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    message = refusal(
        write_head(tmp_path / "head", {name: torch.ones(1) for name in OTHER_SPECULATORS[kind]})
    )
    assert "is not a GRIFFIN head" in message
    assert kind in message


SMALL_VOCABULARY = CONFIG.model_copy(update={"draft_vocab_size": 3})
VOCABULARY = torch.tensor([0, 5, 19])


def write_small_vocabulary(folder: Path, **changes: torch.Tensor) -> Path:
    tensors = random_tensors(SMALL_VOCABULARY) | draft_vocabulary_tensors(VOCABULARY, 20) | changes
    return write_head(folder, tensors, SMALL_VOCABULARY.to_served())


def test_a_draft_vocabulary_is_read_as_target_ids(tmp_path: Path) -> None:
    head = open_head(write_small_vocabulary(tmp_path / "head"))
    found = draft_vocabulary(head)
    assert found is not None
    assert torch.equal(found, VOCABULARY)
    assert draft_vocabulary(open_head(write_head(tmp_path / "full"))) is None


BAD_VOCABULARIES = {
    "above the target's": ({"d2t": torch.tensor([0, 4, 18])}, "a target id in d2t is 20, expected 0 to 19"),
    "below zero": ({"d2t": torch.tensor([-1, 4, 5])}, "a target id in d2t is -1, expected 0 to 19"),
    "named twice": (
        {"d2t": torch.tensor([1, 0, 5])},
        "the target id of draft id 1 in d2t is 1, expected more than 1, that of draft id 0",
    ),
    "not in order": (
        {"d2t": torch.tensor([0, 6, 1])},
        "the target id of draft id 2 in d2t is 3, expected more than 7, that of draft id 1",
    ),
    "mask of other tokens": (
        {"t2d": torch.zeros(20, dtype=torch.bool)},
        "t2d at target id 0 is False, expected what d2t says",
    ),
    "fractions": ({"d2t": torch.zeros(3)}, "dtype of d2t is 'F32', expected integers"),
    "mask of numbers": (
        {"t2d": torch.zeros(20, dtype=torch.int64)},
        "dtype of t2d is 'I64', expected booleans",
    ),
    "too few": ({"d2t": torch.zeros(2, dtype=torch.int64)}, "tensor d2t is (2,), expected shape (3,)"),
    "mask too long": ({"t2d": torch.zeros(21).bool()}, "tensor t2d is (21,), expected shape (20,)"),
}


@pytest.mark.parametrize("name", BAD_VOCABULARIES)
def test_a_draft_vocabulary_that_is_no_part_of_the_targets_is_refused(tmp_path: Path, name: str) -> None:
    changes, expected = BAD_VOCABULARIES[name]
    assert expected in refusal(write_small_vocabulary(tmp_path / "head", **changes))


def test_a_folder_is_told_what_it_lacks(tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head")
    assert "is not a folder" in refusal(tmp_path / "missing")
    assert "is not a folder" in refusal(folder / CONFIG_FILE)
    (folder / CONFIG_FILE).unlink()
    assert "config.json: is missing" in refusal(folder)
    (folder / SAFETENSORS_FILE).unlink()
    assert f"has no {SAFETENSORS_FILE} or {PICKLE_FILE}" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
@pytest.mark.parametrize("file", [SAFETENSORS_FILE, PICKLE_FILE])
def test_truncated_weights_are_refused(tmp_path: Path, file: str, kept: int) -> None:
    folder = write_head(tmp_path / "head")
    if file == PICKLE_FILE:
        (folder / SAFETENSORS_FILE).unlink()
        torch.save(random_tensors(), folder / PICKLE_FILE)
    weights = folder / file
    weights.write_bytes(weights.read_bytes()[:kept])
    assert str(weights) in refusal(folder)


class RunsOnLoad:
    """Unpickling this creates the folder ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("archive", [True, False], ids=["torch archive", "bare pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, archive: bool) -> None:
    folder, marker = write_head(tmp_path / "head"), tmp_path / "marker"
    (folder / SAFETENSORS_FILE).unlink()
    state = random_tensors() | {"extra": RunsOnLoad(marker)}
    if archive:
        torch.save(state, folder / PICKLE_FILE)
    else:
        (folder / PICKLE_FILE).write_bytes(pickle.dumps(RunsOnLoad(marker)))
    assert "code in a pickle is never run" in refusal(folder)
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(1)}, torch.ones(2)])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    folder = write_head(tmp_path / "head")
    (folder / SAFETENSORS_FILE).unlink()
    torch.save(content, folder / PICKLE_FILE)
    assert "expected a state dict" in refusal(folder)


def test_code_named_by_auto_map_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    config = CONFIG.layer_config("llama") | {
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    }
    folder = write_head(tmp_path / "head", config=config)
    (folder / "code.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    assert open_head(folder).config == CONFIG
    assert not marker.exists()


def test_symlink_loops_and_devices_in_a_head_folder_are_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "is not a folder" in refusal(loop)
    folder = write_head(tmp_path / "head")
    (folder / SAFETENSORS_FILE).unlink()
    (folder / SAFETENSORS_FILE).symlink_to(folder / SAFETENSORS_FILE)
    assert "has no model.safetensors" in refusal(folder)
    (folder / SAFETENSORS_FILE).unlink()
    (folder / SAFETENSORS_FILE).symlink_to("/dev/zero")
    assert "has no model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["", "  ", "no-such-head", "../../no/such/folder", "/no/such/folder", "a/../../b", "x" * 5000, "a\0b"],
)
def test_a_name_that_finds_nothing_is_refused(name: str) -> None:
    with pytest.raises(GriffinError) as caught:
        find_head(name)
    assert "griffin:" in str(caught.value)


def test_a_folder_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    save_head(tmp_path / "head", CONFIG.to_served(), random_tensors())
    before = (tmp_path / "head" / SAFETENSORS_FILE).read_bytes()

    def fail_half_way() -> None:
        with atomic_folder(tmp_path / "head") as staging:
            (staging / SAFETENSORS_FILE).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert (tmp_path / "head" / SAFETENSORS_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_folder_that_another_process_has_made_meanwhile_is_kept(tmp_path: Path) -> None:
    head = tmp_path / "head"
    with atomic_folder(head, keeps=True) as staging:
        (staging / "file").write_text("late")
        head.mkdir()
        (head / "file").write_text("first")
    assert (head / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["head"]
    with atomic_folder(tmp_path / "new", keeps=True) as staging:
        (staging / "file").write_text("alone")
    assert (tmp_path / "new" / "file").read_text() == "alone"


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_head(tmp_path / "head", CONFIG.to_served(), random_tensors())
    before = (tmp_path / "head" / SAFETENSORS_FILE).read_bytes()
    replace = os.replace

    def refuse_the_new_one(source: Path, destination: Path) -> None:
        if destination == tmp_path / "head" and ".old." not in str(source):
            raise OSError("no room")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse_the_new_one)
    with pytest.raises(GriffinError, match=r"head: cannot be written \(no room\)"):
        save_head(tmp_path / "head", CONFIG.to_served(), random_tensors())
    assert (tmp_path / "head" / SAFETENSORS_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
# Real keys with arbitrary values reach further into the reader than arbitrary keys do.
CONFIGS = st.builds(
    lambda base, changes: base | changes,
    st.sampled_from([{}, CONFIG.layer_config("llama"), CONFIG.to_served()]),
    st.dictionaries(
        st.sampled_from(
            [*CONFIG.layer_config("llama"), *CONFIG.to_served(), "rope_scaling", "rope_theta", "hidden_act"]
        ),
        JSON_VALUES,
        max_size=3,
    ),
)
HEADERS = st.one_of(
    JSON_VALUES,
    st.dictionaries(
        st.sampled_from([*tensor_shapes(CONFIG), "__metadata__", "embed_tokens.weight"])
        | st.text(max_size=5),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F4", "F64", "?"]) | JSON_VALUES,
                "shape": st.lists(st.integers(-1, 2**63), max_size=3) | JSON_VALUES,
                "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | JSON_VALUES,
            }
        )
        | JSON_VALUES,
        max_size=4,
    ),
)
FUZZ = settings(
    max_examples=300,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


def only_griffin_errors(folder: Path) -> None:
    """Open a head; whatever is wrong with it, the error is ours and memory stays bounded (1 GiB more)."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        open_head(folder)
    except GriffinError as error:
        assert "\n" not in str(error)  # noqa: PT017 - success is fine too
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@FUZZ
@given(config=CONFIGS)
def test_no_config_raises_anything_but_our_error(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tmp_path / "head"
    if not folder.exists():
        write_head(folder)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    only_griffin_errors(folder)


@FUZZ
@given(header=HEADERS, claimed=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=64))
def test_no_safetensors_header_raises_anything_but_our_error(
    tmp_path: Path, header: object, claimed: int | None, data: bytes
) -> None:
    folder = tmp_path / "head"
    if not folder.exists():
        write_head(folder)
    raw = json.dumps(header).encode()
    size = len(raw) if claimed is None else claimed
    (folder / SAFETENSORS_FILE).write_bytes(struct.pack("<Q", size) + raw + data)
    only_griffin_errors(folder)
