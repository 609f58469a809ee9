"""Sources of conversations, and the token dataset on disk."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

from griffin_vllm.cli import app
from griffin_vllm.errors import GriffinError
from griffin_vllm.training import conversations
from griffin_vllm.training.chat import ChatTarget
from griffin_vllm.training.conversations import Conversation, Skipped, read_file, read_source
from griffin_vllm.training.data import TokenDataset, length_buckets, prepare, split_of
from griffin_vllm.training.vocabulary import choose
from tests.training import chat_targets
from tests.training.chat_targets import INSTRUCT, byte_level, write_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def sharegpt(record_id: str, *values: str, **answer: Any) -> dict[str, Any]:
    turns = [
        {"from": "gpt", "value": value, **answer} if i % 2 else {"from": "human", "value": value}
        for i, value in enumerate(values)
    ]
    return {"id": record_id, "conversations": turns}


def read(data: bytes) -> list[Conversation | Skipped]:
    return list(read_file(io.BytesIO(data), "file"))


def contents(found: Conversation | Skipped) -> list[tuple[str, str]]:
    assert isinstance(found, Conversation)
    return [(turn.role, turn.content) for turn in found.turns]


def jsonl(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write_jsonl(path: Path, *records: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(jsonl(*records))
    return path


def talks(count: int) -> list[dict[str, Any]]:
    return [sharegpt(f"talk{i:03}_0", f"question {i}", f"answer number {i}") for i in range(count)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("form", ["lines", "array", "pretty array"])
def test_forms_of_a_file_read_alike(form: str, pack: Callable[[bytes], bytes]) -> None:
    records = [
        sharegpt("a", "Hi", "Hello"),
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]},
        {"question_id": 7, "turns": ["one", "two"]},
        {"id": "p", "prompt": "Grüße"},
    ]
    indent = 2 if form == "pretty array" else None
    data = jsonl(*records) if form == "lines" else json.dumps(records, indent=indent).encode()
    found = read(pack(data))
    assert contents(found[0]) == [("user", "Hi"), ("assistant", "Hello")]
    assert contents(found[1]) == [("system", "S"), ("user", "Hi")]
    assert contents(found[2]) == [("user", "one"), ("user", "two")]
    assert contents(found[3]) == [("user", "Grüße")]
    assert (found[0].id, found[3].id) == ("a", "p")


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 10_000), indent=st.sampled_from([None, 2]))
def test_truncated_array_gives_every_record_before_the_cut(cut: int, indent: int | None) -> None:
    records = [
        sharegpt(f"id{i}", 'a "quoted" [question] \\ é' * (i + 1), "an answer" * 40) for i in range(12)
    ]
    data = json.dumps(records, indent=indent).encode()[:cut]
    ends = [json.dumps(records[: n + 1], indent=indent).encode().rstrip(b"]\n") for n in range(12)]
    whole = sum(len(end) <= len(data) for end in ends)
    found = read(data)
    assert [f.id for f in found if isinstance(f, Conversation)] == [f"id{i}" for i in range(whole)]
    assert [f.reason for f in found if isinstance(f, Skipped)] in ([], ["the file ends inside this record"])


def test_array_larger_than_a_chunk_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "_CHUNK", 64)
    records = [sharegpt(f"id{i}", "question é" * i, "answer") for i in range(1, 20)]
    file = io.BytesIO(json.dumps(records, indent=1, ensure_ascii=False).encode())
    stream = read_file(file, "file")
    assert next(stream).id == "id1"
    assert file.tell() < 1000
    assert [f.id for f in stream] == [f"id{i}" for i in range(2, 20)]


def test_reading_goes_on_behind_a_broken_record_of_an_array() -> None:
    good = json.dumps(sharegpt("good", "a", "b"))
    found = read(f'[{good}, {{"id": "bad", "conversations": [,]}}, {good}]'.encode())
    assert [f.id for f in found if isinstance(f, Conversation)] == ["good", "good"]
    assert [f.reason for f in found if isinstance(f, Skipped)] == ["not JSON"]


def test_reading_goes_on_behind_a_broken_record_without_an_id() -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    number = "1" * 5000  # more digits than Python reads
    found = read(f'[{good}, {{"messages": [,]}}, {good}, {{"messages": {number}}}, {good}]'.encode())
    assert sum(isinstance(f, Conversation) for f in found) == 3
    assert [f.reason for f in found if isinstance(f, Skipped)] == ["not JSON", "not JSON"]


def test_reading_goes_on_at_a_record_that_begins_as_the_broken_one() -> None:
    good = json.dumps({"source": "s", **sharegpt("good", "a", "b")})
    found = read(f'[{good}, {{"source": "s", "id": "bad", "conversations": [,]}}, {good}, {good}]'.encode())
    assert sum(isinstance(f, Conversation) for f in found) == 3
    assert [f.reason for f in found if isinstance(f, Skipped)] == ["not JSON"]


@pytest.mark.parametrize(
    ("record", "roles"),
    [
        (
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            ["system", "user", "assistant"],
        ),
        ({"conversations": [], "messages": [{"role": "user", "content": "a"}]}, ["user"]),
    ],
)
def test_turns_are_found_under_their_newer_names_and_behind_an_empty_field(
    record: dict[str, Any], roles: list[str]
) -> None:
    (found,) = read(jsonl(record))
    assert isinstance(found, Conversation)
    assert [turn.role for turn in found.turns] == roles


def test_arrays_one_behind_the_other_are_read_to_the_end() -> None:
    parts = [json.dumps([sharegpt(name, "a", "b")], indent=2) for name in ("one", "two")]
    assert [f.id for f in read("\n".join(parts).encode())] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"id": "x", "conversations": [{"from": "human", "value": "\xff"}]}', "broken UTF-8"),
        (b'{"conversations": [{"from": "human", "value": "\\ud800"}]}', "broken UTF-8"),
        (b"3", "not a JSON object"),
        (b"{}", "none of the fields conversations, messages, turns, prompt"),
        (b'{"conversations": []}', "no turns"),
        (b'{"conversations": null}', "none of the fields conversations, messages, turns, prompt"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "x"}, '
            b'{"role": "assistant", "content": "b"}]}',
            "a turn with an unknown role",
        ),
        (b'{"conversations": [5]}', "a turn is not an object"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "a turn with an unknown role"),
        (b'{"messages": [{"role": "user", "content": null}]}', "a turn without text"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "no user turn to begin with"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "no user turn to begin with"),
        (
            b'{"messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, '
            b'{"role": "assistant", "content": "x"}]}',
            "no user turn to begin with",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"},'
            b' {"role": "assistant", "content": "b", "token_ids": [1.5]}]}',
            "token_ids is not a list of integers",
        ),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_record_is_skipped_with_its_reason_and_the_next_is_read(line: bytes, reason: str) -> None:
    first, second = (
        read(b'{"prompt": "before"}\n' + line + b"\n" + b'{"prompt": "behind"}')[:1],
        read(b'{"prompt": "before"}\n' + line + b"\n" + b'{"prompt": "behind"}')[1:],
    )
    assert contents(first[0]) == [("user", "before")]
    assert isinstance(second[0], Skipped)
    assert (second[0].reason, second[0].record) == (reason, 1)
    assert contents(second[1]) == [("user", "behind")]


def test_gzip_file_that_ends_early_gives_what_was_read() -> None:
    rng = np.random.default_rng(0)
    data = gzip.compress(jsonl(*(sharegpt(f"{i}", rng.bytes(400).hex(), "b") for i in range(5000))))
    *found, last = read(data[: len(data) // 2])
    assert len(found) > 500
    assert all(isinstance(f, Conversation) for f in found)
    assert isinstance(last, Skipped)
    assert "ends early" in last.reason


@pytest.mark.parametrize(("records", "share"), [(800, 0.99), (3000, 0.5), (3000, 0.98)])
def test_all_that_a_damaged_gzip_file_still_holds_is_read(records: int, share: float) -> None:
    rng = np.random.default_rng(0)
    data = gzip.compress(jsonl(*(sharegpt(f"{i}", rng.bytes(100).hex(), "b") for i in range(records))))
    cut = data[: int(len(data) * share)]
    *found, last = read(cut)
    assert len(found) == zlib.decompressobj(31).decompress(cut).count(b"\n")
    assert isinstance(last, Skipped)
    *found, last = read(gzip.compress(jsonl(sharegpt("1", "a", "b"))) + b"rest")
    assert len(found) == 1
    assert isinstance(last, Skipped)


def test_line_that_is_too_long_is_skipped_and_the_next_ones_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "_CHUNK", 64)
    monkeypatch.setattr(conversations, "MAX_RECORD", 1 << 10)
    long, short = sharegpt("long", "a" * 2000, "b"), sharegpt("short", "a" * 900, "b")
    for data in (jsonl(short, long, short), jsonl(short, long, short)[:-1], jsonl(short, short, long)[:-1]):
        found = read(data)
        reasons = [one.reason for one in found if isinstance(one, Skipped)]
        assert reasons == ["a line of more than 0 MiB"]
        assert len(found) == 3


def test_system_and_developer_turns_at_the_beginning_are_one() -> None:
    turns = [("system", "S"), ("developer", "D"), ("user", "a"), ("assistant", "b")]
    (found,) = read(jsonl({"conversation": [{"role": role, "content": text} for role, text in turns]}))
    assert contents(found) == [("system", "S\n\nD"), ("user", "a"), ("assistant", "b")]


def test_conversation_is_cleaned_at_both_ends() -> None:
    (found,) = read(
        jsonl(
            {
                "conversations": [
                    {"from": role, "value": value}
                    for role, value in (
                        ("system", "S"),
                        ("gpt", "fragment"),
                        ("human", "a"),
                        ("bing", "b"),
                        ("human", "c"),
                        ("gpt", " "),
                    )
                ]
            }
        )
    )
    assert contents(found) == [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")]


@pytest.mark.parametrize(
    "unusable",
    [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "x", "token_ids": "x"},
        "no object",
    ],
)
def test_conversation_ends_before_the_first_turn_behind_an_answer_that_cannot_be_used(unusable: Any) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (found,) = read(jsonl({"messages": [*good, unusable, *good]}))
    assert contents(found) == [("user", "a"), ("assistant", "b")]


def test_field_that_is_null_as_arrow_writes_it_counts_as_absent() -> None:
    turn = {"from": None, "value": None, "role": "user", "content": "a", "token_ids": None}
    records = [
        {"id": None, "question_id": "q1", "conversations": None, "messages": [turn]},
        {"conversations": None, "messages": None, "turns": None, "prompt": "b"},
    ]
    one, two = read(jsonl(*records))
    assert contents(one) == [("user", "a")]
    assert one.id == "q1"
    assert contents(two) == [("user", "b")]


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert contents(read(jsonl({"messages": [{"role": "user", "content": parts}]}))[0]) == [("user", "ab")]


def test_fragments_of_a_sharegpt_conversation_are_one_family() -> None:
    found = read(
        jsonl(*({"id": i, "prompt": "x"} for i in ("QWJhYvA_0", "QWJhYvA_17", "mt_bench_81", "example_1")))
    )
    assert [f.family for f in found if isinstance(f, Conversation)] == [
        "QWJhYvA",
        "QWJhYvA",
        "mt_bench_81",
        "example_1",
    ]


@pytest.mark.parametrize("ids", [{}, {"id": ""}, {"id": 7}, {"question_id": "7"}])
def test_records_whose_id_tells_nothing_are_one_family_when_they_begin_alike(ids: dict[str, Any]) -> None:
    one, two, other = read(jsonl(*({**ids, "turns": turns} for turns in (["x"], ["x", "z"], ["y"]))))
    assert isinstance(one, Conversation)
    assert isinstance(two, Conversation)
    assert isinstance(other, Conversation)
    assert len({one.id, two.id, other.id}) == 3
    assert one.family == two.family != other.family


def test_half_a_surrogate_pair_in_an_id_is_not_fatal(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good, bad = json.dumps(talks(1)[0]), json.dumps({"id": "no turns"})
    lines = (line.replace('"id": "', '"id": "\\ud83d') for line in (good, bad))
    file.write_text("\n".join(lines))
    manifest = prepare(str(target), [str(file)], tmp_path / "out", validation_share=0)
    assert (manifest.conversations, sum(manifest.skipped.values())) == (1, 1)


def test_hugging_face_dataset_saved_to_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(i)}]}
        for i in (0, 1)
    ]
    file = write_jsonl(tmp_path / "a.jsonl", *records)
    saved = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    found = list(read_source(str(tmp_path / "saved")))
    assert [contents(f)[1] for f in found] == [("assistant", "0"), ("assistant", "1")]


def test_saved_dataset_of_several_splits_is_read_split_by_split_and_never_as_a_whole(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    folder = str(tmp_path / "saved")
    splits = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(folder)
    assert [contents(found) for found in read_source(folder)] == [[("user", "train")]]
    assert [contents(found) for found in read_source(f"{folder}:test")] == [[("user", "test")]]
    with pytest.raises(GriffinError, match=r"saved: split is 'dev', expected one of \['test', 'train'\]"):
        list(read_source(f"{folder}:dev"))


def test_split_of_a_saved_dataset_must_be_named_where_none_is_called_train_with_a_stand_in_for_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, Any] = {"a": [{"prompt": "of a"}], "b": [{"prompt": "of b"}]}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=lambda folder: saved))
    with pytest.raises(
        GriffinError, match=r"split is 'train', expected one of \['a', 'b'\]; write .*:SPLIT$"
    ):
        list(read_source(str(tmp_path)))
    assert [contents(found) for found in read_source(f"{tmp_path}:b")] == [[("user", "of b")]]


def test_split_of_a_dataset_that_was_saved_without_any_is_refused_with_a_stand_in_for_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = [{"prompt": "a"}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=lambda folder: saved))
    assert [contents(found) for found in read_source(str(tmp_path))] == [[("user", "a")]]
    with pytest.raises(GriffinError, match=r"split is 'test', expected none: .* it was saved without splits"):
        list(read_source(f"{tmp_path}:test"))


@pytest.mark.parametrize(
    ("source", "arguments", "split"),
    [
        ("org/name", ("org/name",), "train"),
        ("org/name:test", ("org/name",), "test"),
        ("org/name:en:test", ("org/name", "en"), "test"),
    ],
)
def test_hub_dataset_of_a_stand_in_for_the_library_is_asked_for_by_configuration_and_split(
    source: str, arguments: tuple[str, ...], split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*asked: str, **options: Any) -> list[dict[str, str]]:
        assert (asked, options) == (arguments, {"split": split, "streaming": True})
        return [{"prompt": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [contents(found) for found in read_source(source)] == [[("user", "a")]]


def test_missing_datasets_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GriffinError, match="pip install datasets"):
        list(read_source(str(tmp_path)))


def test_dataset_holds_what_was_rendered(target: Path, tmp_path: Path) -> None:
    records = talks(200)
    manifest = prepare(
        str(target),
        [str(write_jsonl(tmp_path / "a.jsonl", *records))],
        tmp_path / "out",
        validation_share=0.2,
    )
    tokenizer = AutoTokenizer.from_pretrained(target)
    seen: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        dataset = TokenDataset(tmp_path / "out", split)
        assert len(dataset) == manifest.splits[split].samples
        assert dataset.lengths.dtype == np.int64
        assert dataset.loops.dtype == np.bool_
        dataset.check_target(tokenizer, len(tokenizer))
        seen[split] = []
        for i in range(len(dataset)):
            tokens, mask = dataset[i]
            assert tokens.shape == mask.shape == (dataset.lengths[i],)
            seen[split].append(tokenizer.decode(tokens[mask]))
    assert sorted(seen["train"] + seen["validation"]) == sorted(
        f"answer number {i}<|end|>" for i in range(200)
    )
    assert 20 < len(seen["validation"]) < 60
    assert (manifest.conversations, manifest.sources[0].records, manifest.skipped) == (200, 200, {})
    assert len(manifest.sources[0].sha256 or "") == 64


def test_bad_records_are_counted_and_listed(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"oops\n" * 9 + jsonl(sharegpt("q", "only a question"), *talks(20)))
    manifest = prepare(str(target), [str(file)], tmp_path / "out")
    assert manifest.skipped == {"not JSON": 9, "no assistant turn": 1}
    assert manifest.sources[0].skipped == 10
    assert len(manifest.skipped_examples) == 6
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["record"] for entry in listed] == list(range(10))
    assert listed[9] == {"source": "a.jsonl", "record": 9, "reason": "no assistant turn", "id": "q"}


def test_fragments_never_fall_on_both_sides_of_the_split(target: Path, tmp_path: Path) -> None:
    records = [sharegpt(f"family{f}_{part}", f"q {f}", f"{f}.") for f in range(10) for part in range(6)]
    prepare(
        str(target),
        [str(write_jsonl(tmp_path / "a.jsonl", *records))],
        tmp_path / "out",
        validation_share=0.4,
    )
    sides = []
    for split in ("train", "validation"):
        dataset = TokenDataset(tmp_path / "out", split)
        sides.append({tuple(dataset[i][0].tolist()) for i in range(len(dataset))})
    assert sides[1]
    assert not sides[0] & sides[1]


@given(family=st.text(max_size=20), small=st.floats(0, 0.5), more=st.floats(0, 0.5))
def test_larger_validation_share_only_adds_to_the_validation_split(
    family: str, small: float, more: float
) -> None:
    if split_of(family, small) == "validation":
        assert split_of(family, small + more) == "validation"


def test_long_samples_are_cut_at_whole_tokens_and_end_in_an_answer(target: Path, tmp_path: Path) -> None:
    records = [
        sharegpt("a", "q", "word " * 50, "q" * 50, "no room"),
        sharegpt("b", "q" * 200, "no room either"),
    ]
    manifest = prepare(
        str(target),
        [str(write_jsonl(tmp_path / "a.jsonl", *records))],
        tmp_path / "out",
        max_length=64,
        validation_share=0,
    )
    (tokens, mask), *rest = (
        TokenDataset(tmp_path / "out", "train")[i] for i in range(manifest.splits["train"].samples)
    )
    assert not rest
    assert len(tokens) <= 64
    assert mask[-1]
    assert manifest.truncated_samples == 1
    assert manifest.skipped == {"no answer within 64 tokens": 1}


def test_an_answer_behind_one_that_loops_is_dropped_with_it(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", chat_targets.STRIPS_THINKING)
    talk = sharegpt("loop", "q", "again and again " * 30, "and now?", "A short answer.")
    file = write_jsonl(tmp_path / "a.jsonl", talk, sharegpt("fine", "q", "A short answer."))
    manifest = prepare(str(target), [str(file)], tmp_path / "out", loops="drop", validation_share=0)
    assert (manifest.splits["train"].samples, manifest.skipped) == (1, {"the answer loops": 1})


@pytest.mark.parametrize(("loops", "samples", "flagged"), [("flag", 2, 1), ("drop", 1, 0)])
def test_looping_answers_are_flagged_or_dropped(
    loops: Any, samples: int, flagged: int, target: Path, tmp_path: Path
) -> None:
    ids = list(range(10, 14)) * 30
    records = [sharegpt("loop", "q", "text", token_ids=ids), sharegpt("fine", "q", "A short answer.")]
    file = write_jsonl(tmp_path / "a.jsonl", *records)
    manifest = prepare(str(target), [str(file)], tmp_path / "out", loops=loops, validation_share=0)
    dataset = TokenDataset(tmp_path / "out", "train")
    assert (len(dataset), int(dataset.loops.sum())) == (samples, flagged)
    assert manifest.skipped == ({"the answer loops": 1} if loops == "drop" else {})


@pytest.mark.parametrize("known_by", ["family", "first question", "family of an unusable record"])
def test_excluded_families_are_left_out(known_by: str, target: Path, tmp_path: Path) -> None:
    records = talks(10)
    file = write_jsonl(tmp_path / "a.jsonl", *records)
    heldout = tmp_path / "heldout.json"
    question = records[3]["conversations"][0]["value"]
    excluded = {
        "family": {"id": "talk003_5", "prompt": "x"},
        "family of an unusable record": {"id": "talk003_5"},
        "first question": {"id": 1, "prompt": question},
    }[known_by]
    heldout.write_text(json.dumps([excluded]))
    manifest = prepare(str(target), [str(file)], tmp_path / "out", exclude=[heldout], validation_share=0)
    assert manifest.skipped == {"excluded": 1}
    assert manifest.conversations == 9


@pytest.mark.parametrize("beside", ["notes.txt", "features-00000.safetensors"])
def test_a_folder_with_more_than_a_dataset_is_never_replaced(
    beside: str, target: Path, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", *talks(3))
    out = tmp_path / "out"
    prepare(str(target), [str(file)], out, validation_share=0)
    prepare(str(target), [str(file)], out, validation_share=0)
    (out / beside).write_text("mine")
    with pytest.raises(GriffinError, match=r"--out is .* expected a new folder"):
        prepare(str(target), [str(file)], out, validation_share=0)
    assert (out / beside).read_text() == "mine"


def test_a_token_that_the_target_has_no_row_for_costs_its_record_only(tmp_path: Path) -> None:
    folder = chat_targets.write_target(tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    chat = chat_targets.chat_target(chat_targets.CHATML)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": chat.vocab_size + 1}))
    chat.tokenizer.add_special_tokens({"extra_special_tokens": ["<row>", "<none>"]})
    chat.tokenizer.save_pretrained(folder)
    records = [sharegpt(name, f"Is {name} there?", "No.") for name in ("<row>", "<none>", "it")]
    file = write_jsonl(tmp_path / "a.jsonl", *records)
    manifest = prepare(str(folder), [str(file)], tmp_path / "out", validation_share=0)
    assert manifest.skipped == {"a token outside the target's vocabulary": 1}
    data = TokenDataset(tmp_path / "out", "train")
    assert len(choose(data, ChatTarget.load(str(folder)), 20)) == 20


@pytest.mark.parametrize(("vocab_size", "stored_as"), [(1 << 16, np.uint16), (70_000, np.uint32)])
def test_the_last_token_of_a_vocabulary_reads_back(vocab_size: int, stored_as: type, tmp_path: Path) -> None:
    folder = chat_targets.write_target(tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
    answer = {"token_ids": [vocab_size - 1, 5], "finish_reason": "length"}
    file = write_jsonl(tmp_path / "a.jsonl", sharegpt("a", "Which?", "That.", **answer))
    prepare(str(folder), [str(file)], tmp_path / "out", validation_share=0)
    tokens, mask = TokenDataset(tmp_path / "out", "train")[0]
    assert tokens[mask].tolist() == [vocab_size - 1, 5]
    assert np.load(tmp_path / "out" / "train.tokens.npy").dtype == stored_as


def test_every_option_of_the_command_reaches_the_data(target: Path, tmp_path: Path) -> None:
    looping = sharegpt("loop_0", "again?", "again and again " * 30)
    somewhat = sharegpt("some_0", "twice?", " ".join(f"{n} sheep {n} sheep" for n in range(20)))
    file = write_jsonl(tmp_path / "a.jsonl", *talks(20), looping, somewhat)
    heldout = write_jsonl(tmp_path / "heldout.jsonl", {"id": "talk003_5", "prompt": "x"})
    command = ["data", "prepare", "--target", str(target), "--out", str(tmp_path / "out"), str(file)]
    options = ["--exclude", str(heldout), "--loops", "drop", "--loop-threshold", "0.2", "--max-length", "120"]
    done = CliRunner().invoke(app, [*command, *options, "--validation", "0.4"])
    assert done.exit_code == 0, done.output
    train, validation = (TokenDataset(tmp_path / "out", split) for split in ("train", "validation"))
    assert "skipped 1: excluded" in done.output
    assert train.manifest.skipped == {"excluded": 1, "the answer loops": 1}
    assert len(train) + len(validation) == 20
    assert len(validation) > 4
    assert max(*train.lengths, *validation.lengths) == 120


def test_same_input_gives_the_same_bytes(target: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", *talks(50))
    for name in ("one", "two"):
        prepare(str(target), [str(file)], tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("content", [b"", b"[]", b"oops\n", b"\x1f\x8bxx", b"[{"])
def test_nothing_usable_is_one_error_and_leaves_the_old_dataset(
    content: bytes, target: Path, tmp_path: Path
) -> None:
    prepare(
        str(target), [str(write_jsonl(tmp_path / "a.jsonl", *talks(5)))], tmp_path / "out", validation_share=0
    )
    bad = tmp_path / "bad.json"
    bad.write_bytes(content)
    with pytest.raises(GriffinError, match="no usable conversation"):
        prepare(str(target), [str(bad)], tmp_path / "out")
    assert len(TokenDataset(tmp_path / "out", "train")) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "bad.json", "out"]


def test_folder_of_something_else_is_never_replaced(target: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "mine" / "a.jsonl", *talks(5))
    with pytest.raises(GriffinError, match="--out"):
        prepare(str(target), [str(file)], tmp_path / "mine")
    assert file.exists()


def damage_manifest(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "griffin data prepare"),
        (lambda folder: (folder / "train.mask.npy").unlink(), "train.mask.npy"),
        (lambda folder: (folder / "train.tokens.npy").write_bytes(b"junk"), "train.tokens.npy"),
        (lambda folder: np.save(folder / "train.mask.npy", np.zeros(3, np.uint8)), "train.mask.npy"),
        (lambda folder: np.save(folder / "train.loops.npy", np.array([None] * 5)), "train.loops.npy"),
        (lambda folder: np.save(folder / "train.offsets.npy", np.zeros(6, np.int64)), "train.offsets.npy"),
        (lambda folder: damage_manifest(folder, format=2), "format"),
        (lambda folder: damage_manifest(folder, splits={}), "splits"),
    ],
)
def test_damaged_dataset_names_the_file(
    damage: Callable[[Path], None], words: str, target: Path, tmp_path: Path
) -> None:
    prepare(
        str(target), [str(write_jsonl(tmp_path / "a.jsonl", *talks(5)))], tmp_path / "out", validation_share=0
    )
    damage(tmp_path / "out")
    with pytest.raises(GriffinError, match=words):
        TokenDataset(tmp_path / "out", "train")


def test_dataset_of_another_target_is_refused(target: Path, tmp_path: Path) -> None:
    prepare(
        str(target), [str(write_jsonl(tmp_path / "a.jsonl", *talks(5)))], tmp_path / "out", validation_share=0
    )
    dataset = TokenDataset(tmp_path / "out", "train")
    same, other_template = AutoTokenizer.from_pretrained(target), byte_level(INSTRUCT)
    other_tokens = AutoTokenizer.from_pretrained(target)
    other_tokens.add_tokens(["new"])
    dataset.check_target(same, len(same))
    for tokenizer, size, field in (
        (same, len(same) + 1, "vocab_size"),
        (other_template, len(same), "template_sha256"),
        (other_tokens, len(same), "tokenizer_sha256"),
    ):
        with pytest.raises(GriffinError, match=f"{field} is"):
            dataset.check_target(tokenizer, size)


@given(
    lengths=st.lists(st.integers(1, 300), max_size=80),
    budget=st.integers(1, 1000),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_length_buckets_hold_every_sample_once_within_the_budget(
    lengths: list[int], budget: int, seed: int, epoch: int
) -> None:
    batches = length_buckets(lengths, budget, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert batches == length_buckets(np.array(lengths), budget, seed, epoch)


def test_length_buckets_change_with_the_epoch_and_waste_little() -> None:
    lengths = np.random.default_rng(0).integers(10, 2048, 2000)
    one, two = (length_buckets(lengths, 8192, 0, epoch) for epoch in (0, 1))
    assert one != two
    padded = sum(len(batch) * lengths[batch].max() for batch in one)
    assert padded / lengths.sum() < 1.15


def test_demo_target_masks_its_answers_behind_its_default_system_turn(
    demo_target: Path, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", sharegpt("a", "Hi", "\n\nHello", "More?", "No."))
    prepare(str(demo_target), [str(file)], tmp_path / "out", validation_share=0)
    tokens, mask = TokenDataset(tmp_path / "out", "train")[0]
    tokenizer = AutoTokenizer.from_pretrained(demo_target)
    assert tokenizer.decode(tokens[mask]) == "\n\nHello<|im_end|>No.<|im_end|>"
    assert tokenizer.decode(tokens).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
