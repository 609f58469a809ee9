"""Prompt files of every form, and the methods of a command line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import options
from benchmarks.methods import method_name, parse_methods, runs, sampling
from benchmarks.prompts import read_prompts
from benchmarks.report import drafts
from griffin_vllm.checkpoint import TUNING_FILE
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.tuning import write_tuning
from tests.serving import tiny
from tests.serving.test_tune import tuning

RECORDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mt-bench": ({"question_id": 81, "category": "x", "turns": ["a", "b"]}, ("a", "b")),
    "prompt": ({"id": "q", "prompt": "a"}, ("a",)),
    "sharegpt": (
        {
            "id": "q",
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "x"},
                {"from": "human", "value": "b"},
            ],
        },
        ("a", "b"),
    ),
}


@pytest.mark.parametrize("form", RECORDS)
@pytest.mark.parametrize("array", [True, False])
def test_forms_of_prompt_files(tmp_path: Path, form: str, array: bool) -> None:
    record, turns = RECORDS[form]
    path = tmp_path / "some.file.json"
    path.write_text(
        json.dumps([record, record]) if array else f"{json.dumps(record)}\n\n{json.dumps(record)}\n"
    )
    prompts = read_prompts(str(path))
    assert prompts.name == "some.file"
    assert [conversation.turns for conversation in prompts.conversations] == [turns, turns]
    assert len(read_prompts(str(path), limit=1).conversations) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}', "record 2"),
        ('{"prompt": "a"}\n{"prompt', "line 2: is not JSON"),
        ("", "holds no prompts"),
        ('{"turns": "What is this?"}', "record 1"),
        ('{"turns": null}', "record 1"),
        ('{"conversations": ["a"]}', "record 1"),
    ],
)
def test_a_bad_prompt_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(GriffinError, match=message):
        read_prompts(str(path))


@pytest.mark.parametrize(
    "text", ["griffon:x", "eagle", "none:x", "griffin:/no/such/head", "eagle:/no/such/head"]
)
def test_a_bad_method_is_refused_before_any_engine_starts(text: str) -> None:
    with pytest.raises(GriffinError):
        parse_methods(f"none,{text}")


def test_a_line_of_json_may_hold_any_character_and_a_binary_file_none(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_prompts(str(path)).conversations[0].turns == ("a\u2028b",)
    path.write_bytes(gzip.compress(b'{"prompt": "a"}'))
    with pytest.raises(GriffinError, match="is no text file"):
        read_prompts(str(path))


def test_nothing_that_is_asked_for_is_left_out_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GriffinError, match="a number, too, for ngram"):
        runs(parse_methods("none,ngram"), ["tuned"], "float32")
    planned = sampling(runs(parse_methods("eagle:org/head"), [3], "float32"), ["probabilistic"], [0.0, 1.0])
    assert [(run.draft_sample_method, run.temperatures) for run in planned] == [
        ("greedy", (0.0,)),
        ("probabilistic", (1.0,)),
    ]
    parser = options.parser(None)
    options.add_draft_sample_method(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--draft-sample-method", "probabilistc"])
    assert "--draft-sample-method" in capsys.readouterr().err


def test_heads_draft_at_a_temperature_as_they_recommend_unless_told_otherwise(tmp_path: Path) -> None:
    sampled = tiny.write_head(
        tmp_path / "s", tiny.CONFIG.model_copy(update={"draft_sample_method": "probabilistic"})
    )
    planned = runs(parse_methods(f"none,eagle:org/head,griffin:{sampled}"), [3], "float32")
    assert [run.draft_sample_method for run in sampling(planned, [], [1.0])] == [
        "greedy",
        "greedy",
        "probabilistic",
    ]
    assert [run.draft_sample_method for run in sampling(planned, ["greedy"], [1.0])] == ["greedy"] * 3


def test_methods_become_vllm_configs(tmp_path: Path) -> None:
    plain, ngram, hass = parse_methods(f"none,ngram,hass:{tmp_path}")
    assert [run.num_speculative_tokens for run in runs([plain, ngram], [3, 5], "float32")] == [0, 3, 5]
    assert plain.speculative_config(0, "greedy") is None
    assert (ngram.speculative_config(3, "greedy") or {})["num_speculative_tokens"] == 3
    assert hass.speculative_config(5, "probabilistic") == {
        "method": "eagle",
        "model": str(tmp_path),
        "num_speculative_tokens": 5,
        "draft_sample_method": "probabilistic",
    }


def test_a_reduced_vocabulary_and_a_dynamic_depth_are_told_from_the_plain_head(tmp_path: Path) -> None:
    plain = tiny.write_head(tmp_path / "plain")
    dynamic = tiny.write_head(tmp_path / "dynamic")
    config = json.loads((dynamic / "config.json").read_text())
    (dynamic / "config.json").write_text(json.dumps(config | {"draft_stop_probability": 0.25}))
    methods = parse_methods(f"none,griffin:{plain},griffin:{dynamic},griffin:smollm2-135m-instruct")
    rows = [run.fields() for run in runs(methods, [3], "float32")]
    assert [row.get("draft_vocab_size") for row in rows] == [None, None, None, 8192]
    assert [row.get("draft_stop_probability") for row in rows] == [None, None, 0.25, 0.15]
    assert [method_name(row) for row in rows] == [
        "none",
        "griffin (plain)",
        "griffin (dynamic, stops below 0.25)",
        "griffin (smollm2-135m-instruct, 8192 tokens, stops below 0.15, lookup from 2)",
    ]


def test_prompt_lookup_is_told_from_the_head_alone(tmp_path: Path) -> None:
    head = tiny.write_head(tmp_path / "head", tiny.CONFIG.model_copy(update={"prompt_lookup_min": 2}))
    both = runs(parse_methods(f"griffin:{head},griffin-alone:{head}"), [3], "float32")
    assert [method_name(run.fields()) for run in both] == [
        "griffin (head, lookup from 2)",
        "griffin-alone (head)",
    ]
    assert [(run.speculative_config or {}).get("prompt_lookup_min") for run in both] == [None, 0]
    assert [run.method.is_griffin for run in both] == [True, True]


def test_a_tuned_head_runs_with_its_schedule_and_an_untuned_one_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_head(tmp_path / "head")
    [griffin] = parse_methods(f"griffin:{folder}")
    with pytest.raises(GriffinError, match="run `griffin tune`"):
        runs([griffin], ["tuned"], "float32")
    found = tuning(folder, num_speculative_tokens=2, schedule=[(1, 2, 2), (3, 8, 0)])
    write_tuning(folder / TUNING_FILE, found)
    fixed, tuned = runs([griffin], [3, "tuned"], "float32")
    assert fixed.num_speculative_tokens == 3
    assert tuned.num_speculative_tokens == 2
    # without a number the plugin takes what it finds beside the head
    assert tuned.speculative_config == {
        "method": "griffin",
        "model": str(folder),
        "draft_sample_method": "greedy",
    }


def test_an_untuned_head_runs_as_a_cpu_serves_it_when_nothing_is_said(tmp_path: Path) -> None:
    folder = tiny.write_head(tmp_path / "head", tiny.CONFIG.model_copy(update={"num_speculative_tokens": 6}))
    planned = runs(parse_methods(f"none,griffin:{folder}"), ["untuned"], "float32")
    [_, untuned] = planned
    assert untuned.speculative_config == {
        "method": "griffin",
        "model": str(folder),
        "num_speculative_tokens": 6,
        "num_speculative_tokens_per_batch_size": [(1, 1, 6), (2, 2, 2), (3, 4, 1), (5, 5, 0)],
        "draft_sample_method": "greedy",
    }
    assert drafts(untuned.fields()) == "untuned"
    with pytest.raises(GriffinError, match=r"untuned.*a number, too, for eagle"):
        runs(parse_methods("eagle:org/head"), ["untuned"], "float32")
