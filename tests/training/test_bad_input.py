"""What a model person can get wrong ends in exit status 2 and one line, before the target's weights load."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from griffin_vllm.checkpoint import save_head, tensor_shapes
from griffin_vllm.cli import app
from griffin_vllm.config import HeadConfig
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.conversations import Conversation, Skipped, read_file
from griffin_vllm.training.data import TokenDataset
from tests.full_disk import full_disk
from tests.training.tiny import write_data, write_target

SECONDS = 10
HEAD = HeadConfig(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=1,
    draft_vocab_size=1,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``target`` (no weights: none may load), ``data`` made for it, and ``talks.jsonl``."""
    folder = tmp_path_factory.mktemp("made")
    target = write_target(folder / "target")
    write_data(folder / "data", target)
    shutil.move(folder / "data.jsonl", folder / "talks.jsonl")
    (target / "model.safetensors").unlink()
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil; the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def refusal(*arguments: str) -> str:
    """The one line with which a command of ``griffin`` refuses."""
    start = time.monotonic()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert time.monotonic() - start < SECONDS
    assert result.stdout == ""
    # where a progress bar had begun it leaves an empty line
    line = result.stderr.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    return line.removeprefix("error: ")


def write(name: str, content: str | bytes) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def remove(*names: str) -> None:
    for name in names:
        Path(name).unlink()


def talk(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n"


# What is spoilt, and the message; `data prepare --target target --out out talks.jsonl` follows.
PREPARE: dict[str, tuple[Callable[[], object], str]] = {
    "no file": (lambda: Path("talks.jsonl").unlink(), r"talks\.jsonl: there is no such file or folder"),
    "empty file": (lambda: write("talks.jsonl", ""), r"talks\.jsonl: no usable conversation \(no records\)"),
    "no records": (lambda: write("talks.jsonl", "[]"), r"talks\.jsonl: no usable conversation"),
    "no assistant turns": (
        lambda: write("talks.jsonl", talk(("user", "Hello?")) * 3),
        r"talks\.jsonl: no usable conversation \(no assistant turn: 3\)",
    ),
    "broken UTF-8": (
        lambda: write("talks.jsonl", b'{"messages": "\xff"}\n'),
        r"talks\.jsonl: no usable conversation \(broken UTF-8: 1\)",
    ),
    "not JSON": (lambda: write("talks.jsonl", "Hello"), r"no usable conversation \(not JSON: 1\)"),
    "damaged archive": (lambda: write("talks.jsonl", b"\x1f\x8bxx"), "compressed file is damaged or ends"),
    "no target": (lambda: shutil.rmtree("target"), "target: no tokenizer and config of a target could be"),
    "target without a tokenizer": (
        lambda: remove("target/tokenizer.json", "target/tokenizer_config.json"),
        "target: no tokenizer and config of a target could be loaded",
    ),
    "target with a damaged tokenizer": (
        lambda: write("target/tokenizer.json", "{"),
        "target: no tokenizer and config of a target could be loaded",
    ),
    "target without a chat template": (
        lambda: Path("target/chat_template.jinja").unlink(),
        "target: its tokenizer has no chat template",
    ),
    **{
        f"a generation_config.json that holds {content}": (
            partial(write, "target/generation_config.json", content),
            message,
        )
        for content, message in (
            ("[]", r"target/generation_config\.json: cannot be read \("),
            ("{", r"target/generation_config\.json: cannot be read \("),
            (
                '{"eos_token_id": "x"}',
                r"generation_config\.json: eos_token_id is 'x', expected a token id, or a",
            ),
            (
                '{"eos_token_id": [null]}',
                r"generation_config\.json: eos_token_id is \[None\], expected a token id",
            ),
            ('{"eos_token_id": -1}', r"generation_config\.json: eos_token_id is -1, expected a token id"),
        )
    },
    "output that is a file": (lambda: write("out", "mine"), "--out is 'out', expected a new folder, or one"),
    "output of something else": (
        lambda: write("out/notes", "mine"),
        "--out is 'out', expected a new folder, or one with nothing but a token dataset",
    ),
}


@pytest.mark.parametrize("name", PREPARE)
def test_data_that_cannot_be_prepared(here: Path, name: str) -> None:
    spoil, message = PREPARE[name]
    spoil()
    line = refusal("data", "prepare", "--target", "target", "--out", "out", "talks.jsonl")
    assert re.search(message, line), line
    assert not Path("out/manifest.json").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--loops", "keep", "--loops is 'keep', expected one of"),
        ("--max-length", "0", "--max-length is 0, expected at least 2"),
        ("--validation", "1", "--validation is 1.0, expected from 0 to below 1"),
        ("--loop-threshold", "60", "--loop-threshold is 60.0, expected from 0 to 1"),
        ("--loop-threshold", "nan", "--loop-threshold is nan, expected from 0 to 1"),
        ("--out", "talks.jsonl/out", "talks.jsonl/out: cannot be written (File exists)"),
        ("--exclude", "nowhere.json", "nowhere.json: there is no such file or folder"),
        ("--exclude", "target/config.json", "target/config.json: names no conversation to exclude"),
    ],
)
def test_options_of_prepare_that_cannot_be(here: Path, option: str, value: str, message: str) -> None:
    command = ("data", "prepare", "--target", "target", "--out", "out", "talks.jsonl", option, value)
    assert message in refusal(*command)


def test_a_full_disk_while_data_is_prepared(here: Path) -> None:
    with full_disk(bytes_a_file=200):
        line = refusal("data", "prepare", "--target", "target", "--out", "data", "talks.jsonl")
    assert line == "data: cannot be written (File too large)"
    assert len(TokenDataset(Path("data"), "train")) > 0
    assert not list(here.glob(".data.*"))


# One precision for all tests of a process: accelerate keeps it in a global.
RUN = {"target": "target", "data": "data", "output": "run", "precision": "fp32"}


def configure(**changes: Any) -> None:
    write("run.yaml", yaml.safe_dump(RUN | changes))


def damage_json(path: str, **fields: Any) -> None:
    write(path, json.dumps(json.loads(Path(path).read_text()) | fields))


def empty_split(split: str, **changes: Any) -> None:
    configure(**changes)
    for name, kept in {"tokens": 0, "mask": 0, "offsets": 1, "loops": 0}.items():
        path = Path(f"data/{split}.{name}.npy")
        np.save(path, np.load(path)[:kept])
    splits = json.loads(Path("data/manifest.json").read_text())["splits"]
    damage_json("data/manifest.json", splits=splits | {split: dict.fromkeys(splits[split], 0)})


def all_loop(**changes: Any) -> None:
    configure(**changes)
    np.lib.format.open_memmap("data/train.loops.npy", "r+").fill(True)


def other_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("target")
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained("target")


def write_head(nan: bool = False, and_set: dict[str, int] | None = None, **sizes: int) -> None:
    vocab = json.loads(Path("target/config.json").read_text())["vocab_size"]
    config = HEAD.model_copy(update={"vocab_size": vocab, "draft_vocab_size": vocab} | sizes)
    tensors = {name: torch.zeros(shape) for name, shape in tensor_shapes(config).items()}
    if nan:
        tensors["fc.fc.bias"].fill_(torch.nan)
    save_head(Path("start"), config.to_served(), tensors)
    configure(init_from="start", **(and_set or {}))


def write_griffin_head_for_eagle() -> None:
    write_head()
    configure(init_from="start", head="eagle")


def write_run(config: str) -> None:
    """An output folder with a checkpoint."""
    write("run/config.json", config)
    Path("run/checkpoints/step-00000001").mkdir(parents=True)


# What is spoilt, and the message; `train run.yaml` follows.
TRAIN: dict[str, tuple[Callable[[], object], str]] = {
    "no file": (
        lambda: Path("run.yaml").unlink(),
        r"run\.yaml: cannot be read \(No such file or directory\)",
    ),
    "not YAML": (
        lambda: write("run.yaml", "target: t\ndata: [\n"),
        r"run\.yaml: line 3: is not valid YAML",
    ),
    "a tab": (lambda: write("run.yaml", "target: t\n\tdata: d"), r"run\.yaml: line 2: is not valid YAML"),
    "not text": (lambda: write("run.yaml", "a: \0"), r"run\.yaml: is not valid YAML"),
    "not UTF-8": (lambda: write("run.yaml", b"a: \xff"), r"run\.yaml: is not UTF-8 text"),
    "a number that is none": (
        lambda: write("run.yaml", "a: !!int many"),
        r"run\.yaml: is not valid YAML \(invalid literal",
    ),
    "nested without end": (lambda: write("run.yaml", "[" * 5000), r"run\.yaml: is not valid YAML"),
    "a list": (lambda: write("run.yaml", "- a\n"), r"run\.yaml: top level is 'list', expected settings"),
    "a bomb": (
        lambda: write(
            "run.yaml",
            "a0: &a0 [x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
            + "seed: *a39\n",
        ),
        r"run\.yaml: unknown option 'a0'",
    ),
    "an unknown option": (
        lambda: configure(learning_rat=1),
        r"run\.yaml: unknown option 'learning_rat'; did you mean learning_rate\?",
    ),
    "an unknown option of a stage": (
        lambda: configure(stages=[{"draft_step": 1}]),
        r"run\.yaml: unknown option 'stages\.0\.draft_step'; did you mean draft_steps\?",
    ),
    "an option that is a number": (lambda: write("run.yaml", "7: 7"), r"run\.yaml: unknown option '7'"),
    "a required option missing": (
        lambda: write("run.yaml", "data: d\noutput: o\n"),
        r"run\.yaml: target is missing",
    ),
    "a value of another kind": (
        lambda: configure(seed="many"),
        r"run\.yaml: seed is 'many', expected a valid integer",
    ),
    "a negative seed": (lambda: configure(seed=-1), r"run\.yaml: seed is -1, expected"),
    "epochs without end": (
        lambda: configure(stages=[{"draft_steps": 1, "epochs": float("inf")}]),
        r"run\.yaml: stages\.0\.epochs is inf, expected",
    ),
    "an unknown method": (lambda: configure(method="medusa"), r"run\.yaml: method is 'medusa', expected"),
    "several steps of EAGLE": (
        lambda: configure(method="eagle", stages=[{"draft_steps": 2}]),
        "stages is 'more than one draft step'",
    ),
    "decay rates of AdamW that are none": (
        lambda: configure(betas=[1.5, 2]),
        r"run\.yaml: betas\.0 is 1\.5, expected less than 1$",
    ),
    "a decay rate too many": (lambda: configure(betas=[0.9, 0.9, 0.9]), r"run\.yaml: betas"),
    "an unknown preset": (lambda: configure(preset="large"), "preset: name is 'large', expected one of"),
    "no data": (lambda: shutil.rmtree("data"), r"data: has no manifest\.json; a token dataset is written by"),
    "data of another kind": (
        lambda: damage_json("data/manifest.json", format=2),
        r"data/manifest\.json: format is 2, expected 1$",
    ),
    "a manifest that is not JSON": (
        lambda: write("data/manifest.json", "{"),
        r"data/manifest\.json: is not valid JSON",
    ),
    "data cut off": (
        lambda: write("data/train.tokens.npy", Path("data/train.tokens.npy").read_bytes()[:300]),
        r"data/train\.tokens\.npy: cannot be read",
    ),
    "data of objects": (
        lambda: np.save("data/train.tokens.npy", np.array([None] * 5)),
        r"data/train\.tokens\.npy: cannot be read \(Array can't be memory-mapped: Python objects",
    ),
    "no sample to train on": (
        lambda: empty_split("train"),
        r"data: has no sample to train on \(loops: keep\)",
    ),
    "no sample but looping ones, which are dropped": (
        lambda: all_loop(loops="drop"),
        r"data: has no sample to train on \(loops: drop\)",
    ),
    "token ids beyond the vocabulary": (
        lambda: np.lib.format.open_memmap("data/train.tokens.npy", "r+").fill(65535),
        r"data/train\.tokens\.npy: a token id is 65535, expected below \d+",
    ),
    "no target": (lambda: shutil.rmtree("target"), r"target: has no readable config\.json of a target"),
    "another tokenizer": (
        other_tokenizer,
        r"data/manifest\.json: tokenizer_sha256 is '\w+', expected '\w+'; that of the target at hand; prepare",
    ),
    "another chat template": (
        lambda: write("target/chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}"),
        r"data/manifest\.json: template_sha256 is",
    ),
    "another vocabulary": (
        lambda: damage_json("target/config.json", vocab_size=7),
        r"data/manifest\.json: vocab_size is \d+, expected 7",
    ),
    "target without weights": (lambda: None, r"target: cannot be loaded as a target \("),
    "target with damaged weights": (
        lambda: write("target/model.safetensors", b"half"),
        r"target: cannot be loaded as a target \(",
    ),
    "KV heads that do not divide": (
        lambda: configure(num_key_value_heads=3),
        "settings: num_key_value_heads is 3, expected a divisor of num_attention_heads=4",
    ),
    "xformers where it cannot be": (
        lambda: configure(attention="xformers", features="features"),
        r"attention: (xformers is not installed|device is 'cpu')",
    ),
    "no head to continue from": (
        lambda: configure(init_from="nowhere"),
        "griffin:nowhere: no bundled head, folder or Hub id of that name",
    ),
    "a head of another kind to continue from": (
        write_griffin_head_for_eagle,
        "start/model.safetensors: has no fc.weight, so it is not an EAGLE head of vLLM's; it looks like a GRIFFIN head",
    ),
    "a head of another size to continue from": (
        lambda: write_head(hidden_size=128),
        "hidden_size is 128, expected 64 \\(the target's\\)",
    ),
    "another size than that of the head to continue from": (
        lambda: write_head(and_set={"intermediate_size": 32}),
        r"settings: intermediate_size is 32, expected null, or \d+ as start has it",
    ),
    "a head with NaN to continue from": (lambda: write_head(nan=True), r"tensor fc\.fc\.bias is 'NaN or inf"),
    "output below a file": (
        lambda: configure(output="talks.jsonl/run"),
        r"talks.jsonl/run: cannot be written \(Not a directory\)",
    ),
    "output of another run": (
        lambda: write_run(json.dumps(RUN | {"data": "other"})),
        r"run/config\.json: data is 'other', expected 'data'; name another output folder",
    ),
    "output with a damaged config": (lambda: write_run("{"), r"run/config\.json: is not valid JSON"),
    **{
        f"a target whose {name} is {value!r}": (
            partial(damage_json, "target/config.json", **{name: value}),
            message,
        )
        for name, value, message in (
            (
                "hidden_size",
                "64",
                r"target: has no readable config\.json .*'hidden_size': TypeError: .*got str",
            ),
            ("max_position_embeddings", None, r"target: has no readable config\.json .*expected int"),
            ("rope_parameters", "x", r"target: has no readable config\.json .*rope_parameters"),
            ("quantization_config", "gptq", r"target: has no readable config\.json"),
            ("num_attention_heads", 0, r"target: has no readable config\.json .*by zero"),
            ("num_key_value_heads", 0, r"target: num_key_value_heads is 0, expected greater than 0"),
        )
    },
}


@pytest.mark.parametrize("name", TRAIN)
def test_runs_that_cannot_start(here: Path, name: str) -> None:
    spoil, message = TRAIN[name]
    configure()
    spoil()
    line = refusal("train", "run.yaml")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rte", "1"], "unknown option 'learning_rte'; did you mean learning_rate?"),
        (["--stages.0.epoch=1"], "unknown option 'stages.0.epoch'; did you mean epochs?"),
        (["--stages.9.epochs", "1"], "--stages.9.epochs: is not among the settings"),
        (["--stages.x", "1"], "--stages.x: is not among the settings"),
        (["--seed.x", "1"], "--seed.x: is not among the settings"),
        (["--seed", "["], "--seed: line 1: is not valid YAML"),
        (["--seed"], "--seed has no value"),
        (["seed", "1"], "'seed' is not an option; write --name value"),
    ],
)
def test_command_line_settings_that_cannot_be(here: Path, arguments: list[str], message: str) -> None:
    configure(seed=0, stages=[{"draft_steps": 1}])
    assert message in refusal("train", "run.yaml", *arguments)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(
    max_examples=300,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(changes=st.dictionaries(st.sampled_from([*TrainConfig.model_fields, "preset"]), JSON_VALUES))
def test_no_settings_raise_anything_but_our_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(RUN | changes))
    try:
        TrainConfig.load(path)
    except GriffinError as error:
        assert "\n" not in str(error)  # noqa: PT017 - success is fine too


@FUZZ
@given(content=st.binary(max_size=60) | st.text(alphabet="ab01:-{}[]&*!|>'\"\n\t #,?%@", max_size=60))
def test_no_yaml_raises_anything_but_our_error(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GriffinError):
        TrainConfig.load(path)


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from(["format", "vocab_size", "splits", "sources", "skipped", "loops"]) | st.text(max_size=5),
        JSON_VALUES
        | st.fixed_dictionaries(
            {"train": st.fixed_dictionaries(dict.fromkeys(
                ("samples", "tokens", "answer_tokens", "looping_samples"), st.integers(-2, 2**70)
            ))}
        ),
    )
)  # fmt: skip
def test_no_manifest_raises_anything_but_our_error(
    made: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "data"
    if not folder.exists():
        shutil.copytree(made / "data", folder)
    manifest = json.loads((made / "data" / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    try:
        TokenDataset(folder, "train")
    except GriffinError as error:
        assert "\n" not in str(error)  # noqa: PT017 - success is fine too


@FUZZ
@given(
    content=st.binary(max_size=80)
    | st.lists(
        JSON_VALUES
        | st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(("id", "conversations", "messages", "turns", "prompt"), JSON_VALUES),
        )
        | st.fixed_dictionaries(
            {
                "messages": st.lists(
                    st.fixed_dictionaries(
                        {"role": st.sampled_from(["user", "assistant", "system"]) | JSON_VALUES},
                        optional=dict.fromkeys(("content", "token_ids", "finish_reason"), JSON_VALUES),
                    )
                )
            }
        )
    ).map(lambda records: "\n".join(map(json.dumps, records)).encode())
)
def test_no_file_of_conversations_raises_anything(content: bytes) -> None:
    assert all(isinstance(found, Conversation | Skipped) for found in read_file(io.BytesIO(content), "file"))
