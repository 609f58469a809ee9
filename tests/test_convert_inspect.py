"""``griffin convert`` and ``griffin inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from griffin_vllm.checkpoint import open_head, tensor_shapes
from griffin_vllm.cli import app
from griffin_vllm.config import HeadConfig
from tests.full_disk import full_disk

CONFIG = HeadConfig(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=96,
    draft_vocab_size=96,
    qkv_bias=True,
)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A head as published for Qwen2: pickled half-precision weights with qkv biases and the embeddings."""
    folder = tmp_path / "published"
    folder.mkdir()
    shapes = {**tensor_shapes(CONFIG), "embed_tokens.weight": (96, 64)}
    torch.save(
        {name: torch.randn(shape, dtype=torch.float16) for name, shape in shapes.items()},
        folder / "pytorch_model.bin",
    )
    (folder / "config.json").write_text(json.dumps(CONFIG.layer_config("qwen2")))
    return folder


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_convert_keeps_every_number_and_names_the_target(published: Path, tmp_path: Path) -> None:
    status, _ = run("convert", published, tmp_path / "out", "--target", "org/target")
    assert status == 0
    head = open_head(tmp_path / "out")
    assert head.is_served_layout
    assert head.config == CONFIG.model_copy(update={"target": "org/target"})
    before = torch.load(published / "pytorch_model.bin", weights_only=True)
    after = load_file(head.weights)
    assert set(before) - set(after) == {"embed_tokens.weight"}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_inspect_tells_what_a_head_is(published: Path) -> None:
    status, output = run("inspect", published, "--json")
    facts = json.loads(output)
    assert status == 0
    assert facts["layout"] == "reference"
    assert facts["qkv_bias"] is True
    assert facts["parameters"] == sum(torch.Size(shape).numel() for shape in tensor_shapes(CONFIG).values())


@pytest.mark.parametrize(("hidden_size", "status"), [(64, 0), (128, 1)])
def test_inspect_tells_whether_a_head_fits(
    published: Path, tmp_path: Path, hidden_size: int, status: int
) -> None:
    sizes = {"model_type": "qwen2", "hidden_size": hidden_size, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    found, output = run("inspect", f"griffin:{published}", "--target", tmp_path, "--json")
    assert found == status
    assert json.loads(output)["fits"] is (status == 0)


def test_inspect_of_something_else_is_one_line_and_status_2(tmp_path: Path) -> None:
    status, output = run("inspect", tmp_path)
    assert status == 2
    assert "has no model.safetensors or pytorch_model.bin" in output


def test_a_destination_that_cannot_be_written_is_one_line_and_status_2(
    published: Path, tmp_path: Path
) -> None:
    status, output = run("convert", published, published / "config.json" / "out")
    assert status == 2
    assert output == f"error: {published / 'config.json' / 'out'}: cannot be written (File exists)\n"
    with full_disk():
        status, output = run("convert", published, tmp_path / "out")
    assert status == 2
    assert output.startswith(f"error: {tmp_path / 'out'}: cannot be written (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published"]
