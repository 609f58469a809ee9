"""``griffin convert`` and ``griffin inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from griffin_vllm.checkpoint import (
    draft_vocabulary,
    draft_vocabulary_tensors,
    load_tensors,
    open_head,
    save_head,
    tensor_shapes,
)
from griffin_vllm.cli import app
from griffin_vllm.config import HeadConfig
from griffin_vllm.convert import convert
from griffin_vllm.training.data import prepare
from tests.full_disk import full_disk
from tests.training.chat_targets import byte_level, write_target

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


def test_a_model_card_stays_with_its_head_and_tells_how_it_was_trained(
    published: Path, tmp_path: Path
) -> None:
    card = (
        "# A head\n\n| | |\n| --- | --- |\n| stages | 3 draft steps |\n| data | answers |\n\n| not | this |\n"
    )
    (published / "README.md").write_text(card)
    assert run("convert", published, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "README.md").read_text() == card
    _, output = run("inspect", tmp_path / "out", "--json")
    assert json.loads(output)["training"] == {"stages": "3 draft steps", "data": "answers"}
    assert "card: stages             3 draft steps\n" in run("inspect", tmp_path / "out")[1]
    converted = convert(published, tmp_path / "fewer", draft_vocabulary=torch.arange(8))
    assert "reduced the draft vocabulary to 8 of 96 tokens" in (converted.folder / "README.md").read_text()


def test_convert_names_the_family_of_a_target_that_is_here_and_keeps_it(
    published: Path, tmp_path: Path
) -> None:
    for family in ("qwen2", "llama"):
        (tmp_path / family).mkdir()
        sizes = {"model_type": family, "hidden_size": 64, "vocab_size": 96}
        (tmp_path / family / "config.json").write_text(json.dumps(sizes))
    assert run("convert", published, tmp_path / "out", "--target", tmp_path / "qwen2")[0] == 0
    for target in ("org/target", "a/b/c"):
        assert run("convert", tmp_path / "out", tmp_path / "again", "--target", target)[0] == 0
        assert open_head(tmp_path / "again").config.target_model_type == "qwen2"
    status, output = run("convert", tmp_path / "out", tmp_path / "other", "--target", tmp_path / "llama")
    assert status == 2
    assert "config.json: target_model_type is 'qwen2', expected 'llama' (the target's model_type)" in output


def test_convert_refuses_a_target_of_other_sizes(published: Path, tmp_path: Path) -> None:
    for field, value in (("hidden_size", 64), ("vocab_size", 96)):
        sizes = {"hidden_size": 64, "vocab_size": 96} | {field: 128}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes}))
        status, output = run("convert", published, tmp_path / "out", "--target", tmp_path)
        assert status == 2
        assert f"config.json: {field} is {value}, expected 128 (the target's)" in output
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2", "hidden_size": 64, "vocab_size": 96},
            "model_type is 'gpt2', expected a text model",
        ),
        ({"model_type": "llama", "hidden_size": 64}, "config.json has no 'vocab_size', so it is not a model"),
    ],
)
def test_convert_refuses_a_target_that_no_head_can_serve(
    published: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, output = run("convert", published, tmp_path / "out", "--target", tmp_path)
    assert status == 2
    assert message in output
    assert not (tmp_path / "out").exists()


def test_a_target_of_no_possible_name_or_with_a_text_config_that_is_none_is_one_line(
    published: Path, tmp_path: Path
) -> None:
    sizes = {"model_type": "llama", "hidden_size": 64, "vocab_size": 96, "text_config": None}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    status, output = run("inspect", published, "--target", "x" * 300)
    assert (status, output.count("\n")) == (2, 1)
    assert "is no folder and not on the Hub" in output
    assert run("convert", published, tmp_path / "out", "--target", "x" * 300)[0] == 0
    assert run("convert", published, tmp_path / "out", "--target", tmp_path)[0] == 0
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"text_config": [1]}))
    status, output = run("inspect", published, "--target", tmp_path)
    assert status == 2
    assert "text_config is [1], expected an object" in output


def test_a_destination_that_cannot_be_looked_up_is_said_in_one_line(published: Path) -> None:
    status, output = run("convert", published, "x" * 300)
    assert status == 2
    assert "cannot be looked up (File name too long)" in output


def test_convert_replaces_a_head_and_nothing_else(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", published, out)[0] == run("convert", published, out)[0] == 0
    (out / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for destination in (out, file, tmp_path):
        status, output = run("convert", published, destination)
        assert status == 2
        assert "griffin convert: DST is " in output
    assert "out with notes.txt', expected a new folder" in run("convert", published, out)[1]
    assert (out / "notes.txt").read_text() == file.read_text() == "mine"
    assert open_head(published)


def test_a_target_of_another_family_does_not_fit(published: Path, tmp_path: Path) -> None:
    sizes = {"model_type": "qwen2", "hidden_size": 64, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    for family, fits in (("qwen2", True), ("llama", False)):
        config = CONFIG.model_copy(update={"target_model_type": family}).to_served()
        (published / "config.json").write_text(json.dumps(config))
        status, output = run("inspect", published, "--target", tmp_path, "--json")
        assert (status == 0) is json.loads(output)["fits"] is fits


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


ANSWER = "Paris, Paris, Paris; or Lyon."


@pytest.fixture
def chat_target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "chat")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "Zzz"}, {"role": "assistant", "content": ANSWER}]
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture
def chat_head(tmp_path: Path, chat_target: Path) -> Path:
    """A whole-vocabulary head that names its target."""
    size = json.loads((chat_target / "config.json").read_text())["vocab_size"]
    config = CONFIG.model_copy(
        update={"vocab_size": size, "draft_vocab_size": size, "target": str(chat_target)}
    )
    tensors = {name: torch.randn(shape) for name, shape in tensor_shapes(config).items()}
    save_head(tmp_path / "chat-head", config.to_served(), tensors)
    return tmp_path / "chat-head"


@pytest.mark.parametrize("prepared", [False, True])
def test_convert_chooses_the_tokens_that_answers_use(
    chat_head: Path, chat_target: Path, corpus: Path, tmp_path: Path, prepared: bool
) -> None:
    if prepared:
        prepare(str(chat_target), [str(corpus)], tmp_path / "data", validation_share=0.0)
        corpus = tmp_path / "data"
    status, output = run(
        "convert", f"griffin:{chat_head}", tmp_path / "out", "--draft-vocab", 40, "--corpus", corpus
    )
    assert status == 0
    assert "40 tokens cover 100.00% of the answers" in output
    head = open_head(tmp_path / "out")
    assert head.config.draft_vocab_size == 40
    chosen = draft_vocabulary(head)
    assert chosen is not None
    tokenizer = byte_level("")
    assert {*tokenizer.all_special_ids, *tokenizer.encode(ANSWER)} <= set(chosen.tolist())
    before, after = load_tensors(chat_head / "model.safetensors"), load_tensors(head.weights)
    assert after.keys() - before.keys() == {"d2t", "t2d"}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_smaller_draft_vocabulary_keeps_the_most_frequent_tokens(
    chat_head: Path, corpus: Path, tmp_path: Path
) -> None:
    tokenizer = byte_level("")
    special = len(tokenizer.all_special_ids)
    status, output = run(
        "convert", chat_head, tmp_path / "out", "--draft-vocab", special + 1, "--corpus", corpus
    )
    assert status == 0
    chosen = draft_vocabulary(open_head(tmp_path / "out"))
    answer = tokenizer.encode(ANSWER)
    commonest = max(answer, key=answer.count)
    assert chosen is not None
    assert chosen.tolist() == sorted({commonest, *tokenizer.all_special_ids})
    share = (answer.count(commonest) + 1) / (len(answer) + 1)
    assert f"cover {share:.2%} of the answers" in output


def test_inspect_shows_the_draft_vocabulary(chat_head: Path, corpus: Path, tmp_path: Path) -> None:
    run("convert", chat_head, tmp_path / "out", "--draft-vocab", 40, "--corpus", corpus)
    whole, reduced = (
        json.loads(run("inspect", folder, "--json")[1]) for folder in (chat_head, tmp_path / "out")
    )
    assert whole["draft_vocab_size"] == whole["vocab_size"] == reduced["vocab_size"]
    assert reduced["draft_vocab_size"] == 40
    assert reduced["parameters"] == whole["parameters"]


def test_inspect_refuses_a_draft_vocabulary_outside_the_targets(chat_head: Path, tmp_path: Path) -> None:
    head = open_head(chat_head)
    size = head.config.vocab_size
    tensors = load_tensors(head.weights) | draft_vocabulary_tensors(torch.tensor([1, 2]), size)
    tensors["d2t"] = torch.tensor([0, size])
    reduced = head.config.model_copy(update={"draft_vocab_size": 2})
    save_head(tmp_path / "bad", reduced.to_served(), tensors)
    status, output = run("inspect", tmp_path / "bad")
    assert status == 2
    assert f"a target id in d2t is {size + 1}" in output


@pytest.mark.parametrize(
    ("size", "message"), [(100_000, "size is 100000"), (40, "hidden_size is 64, expected 32")]
)
def test_convert_reads_no_corpus_for_a_vocabulary_or_a_head_that_cannot_be(
    chat_head: Path, chat_target: Path, tmp_path: Path, size: int, message: str
) -> None:
    if size == 40:
        config = json.loads((chat_target / "config.json").read_text())
        (chat_target / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    status, output = run(
        "convert", chat_head, tmp_path / "out", "--draft-vocab", size, "--corpus", tmp_path / "none.jsonl"
    )
    assert status == 2
    assert message in output


@pytest.mark.parametrize("size", [3, 100_000])
def test_convert_refuses_draft_vocabularies_that_cannot_be(
    chat_head: Path, corpus: Path, tmp_path: Path, size: int
) -> None:
    status, output = run("convert", chat_head, tmp_path / "out", "--draft-vocab", size, "--corpus", corpus)
    assert status == 2
    assert f"size is {size}, expected more than 4 (special tokens) and less than" in output
    assert not (tmp_path / "out").exists()


def test_convert_says_what_a_draft_vocabulary_needs(published: Path, corpus: Path, tmp_path: Path) -> None:
    status, output = run("convert", published, tmp_path / "out", "--draft-vocab", 40)
    assert status == 2
    assert "--draft-vocab and --corpus go together" in output
    status, output = run("convert", published, tmp_path / "out", "--draft-vocab", 40, "--corpus", corpus)
    assert status == 2
    assert "names no target" in output
