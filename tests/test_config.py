"""A head's config: both layouts are read, and what is not one is named by file, field and value."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from griffin_vllm.config import HeadConfig
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import MAX_CONFIG_BYTES

REFERENCE: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rope_scaling": None,
}
# None of it is a default.
HEAD = HeadConfig(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
    draft_vocab_size=50,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=4096,
    qkv_bias=True,
    target="org/target",
    target_model_type="llama",
    num_speculative_tokens=3,
    draft_sample_method="probabilistic",
    draft_stop_probability=0.25,
    prompt_lookup_min=2,
    trained_context_length=256,
    draft_context_limit=512,
)


def write(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def test_the_reference_layout_gets_the_references_defaults(tmp_path: Path) -> None:
    config = HeadConfig.read(write(tmp_path, REFERENCE))
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert config.draft_vocab_size == config.vocab_size == 100
    assert config.target is None
    assert not config.qkv_bias


def test_a_qwen2_reference_head_keeps_its_biases_and_rotary_base(tmp_path: Path) -> None:
    raw = REFERENCE | {"model_type": "qwen2", "qkv_bias": True, "rope_theta": 1000000.0}
    config = HeadConfig.read(write(tmp_path, raw))
    assert config.qkv_bias
    assert config.rope_theta == 1000000.0


@pytest.mark.parametrize(
    "rotary",
    [{"rope_scaling": {"rope_type": "default"}}, {"rope_parameters": {"partial_rotary_factor": 1.0}}],
)
def test_rotary_settings_that_ask_for_nothing_are_read(tmp_path: Path, rotary: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(REFERENCE | {"rope_theta": 500.0} | rotary))
    assert HeadConfig.read(path).rope_theta == 500.0


def test_the_served_layout_reads_back_as_it_was_written(tmp_path: Path) -> None:
    assert not [
        name for name, field in HeadConfig.model_fields.items() if getattr(HEAD, name) == field.default
    ]
    assert HeadConfig.read(write(tmp_path, HEAD.to_served())) == HEAD


def test_a_served_head_that_does_not_say_how_to_draft_gets_vllms_ways(tmp_path: Path) -> None:
    names = (
        "target_model_type",
        "draft_context_limit",
        "draft_stop_probability",
        "draft_sample_method",
        "prompt_lookup_min",
    )
    silent = {name: value for name, value in HEAD.to_served().items() if name not in names}
    config = HeadConfig.read(write(tmp_path, silent))
    assert config.target_model_type is None
    assert config.draft_context_limit is None
    assert config.draft_stop_probability == 0
    assert config.draft_sample_method == "greedy"
    assert config.prompt_lookup_min == 0


SERVED = HEAD.to_served()

# What the file holds, then the field, the found value and a word of what is expected in the message.
BAD_CONFIGS: dict[str, tuple[object, str]] = {
    "not JSON": ("{", "is not valid JSON"),
    "not text": ('"\\ud800', "is not valid JSON"),
    "deeply nested": ("[" * 100_000, "is not valid JSON"),
    "a list": ([1], "top level is 'list', expected a JSON object"),
    "empty": ({}, "num_hidden_layers is None, expected 1"),
    "a whole model": (REFERENCE | {"num_hidden_layers": 32}, "num_hidden_layers is 32, expected 1"),
    "another family": (REFERENCE | {"model_type": "gpt2"}, "model_type is 'gpt2', expected one of"),
    "no size": (without(REFERENCE, "hidden_size"), "hidden_size is missing"),
    "size zero": (REFERENCE | {"vocab_size": 0}, "vocab_size is 0, expected greater than 0"),
    "negative size": (REFERENCE | {"hidden_size": -64}, "hidden_size is -64, expected greater than 0"),
    "size as text": (
        REFERENCE | {"intermediate_size": "96"},
        "intermediate_size is '96', expected a valid integer",
    ),
    "size as a fraction": (REFERENCE | {"intermediate_size": 9.5}, "intermediate_size is 9.5"),
    "size as a truth value": (REFERENCE | {"num_attention_heads": True}, "num_attention_heads is True"),
    "heads do not divide the width": (
        REFERENCE | {"num_attention_heads": 3},
        "hidden_size is 64, expected a multiple of num_attention_heads=3",
    ),
    "KV heads do not divide the heads": (
        REFERENCE | {"num_key_value_heads": 3},
        "num_key_value_heads is 3, expected a divisor of num_attention_heads=4",
    ),
    "odd head_dim": (REFERENCE | {"head_dim": 15}, "head_dim is 15, expected an even number"),
    "another activation": (REFERENCE | {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    "scaled rotary": (REFERENCE | {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {"),
    "a rotary base by layer type": (
        REFERENCE | {"rope_parameters": {"full_attention": {"rope_theta": 500.0}}},
        "rope_parameters is {'full_attention': {'rope_theta': 500.0}}, expected an object of the one layer's values",
    ),
    "scaled rotary, new style": (
        REFERENCE | {"rope_parameters": {"rope_type": "yarn"}},
        "rope_scaling is 'yarn', expected null",
    ),
    "scaled rotary, old key in the new place": (
        REFERENCE | {"rope_parameters": {"type": "dynamic"}},
        "rope_scaling is 'dynamic', expected null",
    ),
    "rotary of a part of each head": (
        REFERENCE | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5, expected 1",
    ),
    "rotary base as text": (REFERENCE | {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    "infinite rotary base": (REFERENCE | {"rope_theta": float("inf")}, "rope_theta is inf"),
    "eps is not a number": (REFERENCE | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "Medusa": ({"medusa_num_heads": 5, "medusa_num_layers": 1}, "medusa_num_heads is 5"),
    "EAGLE-3 in speculators' format": (
        SERVED | {"speculators_model_type": "eagle3"},
        "speculators_model_type is 'eagle3', expected 'griffin'",
    ),
    "served without sizes": (
        without(SERVED, "transformer_layer_config"),
        "transformer_layer_config is None",
    ),
    "served without provenance": (without(SERVED, "speculators_config"), "speculators_config is None"),
    "no context to draft in": (
        SERVED | {"draft_context_limit": 0},
        "draft_context_limit is 0, expected greater than 0",
    ),
    "no way of drafting": (
        SERVED | {"draft_sample_method": "beam"},
        "draft_sample_method is 'beam', expected 'greedy' or 'probabilistic'",
    ),
    "recommended K of zero": (
        SERVED
        | {
            "speculators_config": SERVED["speculators_config"]
            | {"proposal_methods": [{"speculative_tokens": 0}]}
        },
        "num_speculative_tokens is 0, expected greater than 0",
    ),
    "draft vocabulary larger than the target's": (
        SERVED | {"draft_vocab_size": 101},
        "draft_vocab_size is 101, expected at most vocab_size=100",
    ),
    "empty draft vocabulary": (
        SERVED | {"draft_vocab_size": 0},
        "draft_vocab_size is 0, expected greater than 0",
    ),
    "target of the wrong kind": (
        SERVED | {"speculators_config": SERVED["speculators_config"] | {"verifier": {"name_or_path": ["a"]}}},
        "target is ['a'], expected a valid string",
    ),
    "a huge value": (REFERENCE | {"hidden_size": "x" * 500_000}, "hidden_size is 'xxx"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_refused_in_one_short_line(tmp_path: Path, name: str) -> None:
    content, expected = BAD_CONFIGS[name]
    path = write(tmp_path, content)
    with pytest.raises(GriffinError) as refusal:
        HeadConfig.read(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400


def test_broken_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(GriffinError, match="is not valid JSON"):
        HeadConfig.read(path)


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(GriffinError, match=f"expected at most {MAX_CONFIG_BYTES} bytes"):
        HeadConfig.read(path)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "symlink loop", "missing"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "symlink loop":
        path.symlink_to(path)
    with pytest.raises(GriffinError, match=r"config\.json: is missing or not a regular file"):
        HeadConfig.read(path)
