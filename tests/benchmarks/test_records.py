"""A record belongs to one set of conditions, and a run that cannot be part of it ends before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import engines, options, records
from benchmarks.methods import parse_methods, runs
from benchmarks.prompts import Conversation, read_prompts
from benchmarks.trajectory import Trajectory
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import read_json
from tests.serving import tiny
from tests.training.chat_targets import CHATML, byte_level


def arguments(folder: Path, methods: str) -> list[str]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}')
    record = str(folder / "out.json")
    return ["--target", "t", "--methods", methods, "--prompts", str(prompts), "--json", record]


def test_two_heads_that_a_record_would_show_by_one_name_are_refused(tmp_path: Path) -> None:
    heads = [tiny.write_head(tmp_path / run / "head") for run in ("a", "b")]
    methods = ",".join(f"griffin:{head}" for head in heads)
    with pytest.raises(GriffinError, match="by one name"):
        options.load_inputs(options.parser(None).parse_args(arguments(tmp_path, methods)))


def test_a_head_that_changed_is_no_part_of_the_record_and_of_no_resumed_one(tmp_path: Path) -> None:
    head = tiny.write_head(tmp_path / "head")
    args = options.parser(None).parse_args(arguments(tmp_path, f"griffin:{head}"))
    planned = runs(parse_methods(args.methods), [3], "float32")
    sets = [read_prompts(args.prompts[0])]
    record = records.Record("speed", args, sets)
    with record.attempt(planned[0]):
        record.results.append({"row": 1})
    weights = head / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(GriffinError, match=r"heads\.head is "), record.attempt(planned[0]):
        raise AssertionError("an engine would start")
    with pytest.raises(GriffinError, match=r"heads\.head is "):
        records.Record("speed", args, sets).resume(planned)


@pytest.mark.parametrize(("option", "value"), [("dtype", "float32"), ("max_model_len", 128)])
def test_a_record_of_other_conditions_is_not_resumed(tmp_path: Path, option: str, value: object) -> None:
    args = options.parser(None).parse_args(arguments(tmp_path, "none"))
    sets = [read_prompts(args.prompts[0])]
    records.Record("speed", args, sets).save()
    records.Record("speed", args, sets).resume([])
    setattr(args, option, value)
    with pytest.raises(GriffinError, match=rf"out\.json: {option} is .*; give --json another name"):
        records.Record("speed", args, sets).resume([])


def test_a_record_or_answers_of_another_target_in_a_folder_of_the_same_name_are_not_gone_on_with(
    tmp_path: Path,
) -> None:
    args = options.parser(None).parse_args(arguments(tmp_path, "none"))
    sets = [read_prompts(args.prompts[0])]
    for version in ("first", "second"):
        args.target = str(tiny.write_head(tmp_path / version / "final"))
        if version == "first":
            records.Record("speed", args, sets).save()
            Trajectory("speed", args, sets).record("prompts", [])
            assert Trajectory("speed", args, sets).answers == {"prompts": []}
        else:
            weights = tmp_path / version / "final" / "model.safetensors"
            save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
            assert Trajectory("speed", args, sets).answers == {}
            with pytest.raises(GriffinError, match=r"out\.json: target_weights is "):
                records.Record("speed", args, sets).resume([])


def test_answers_that_another_benchmark_recorded_may_lack_margins_and_are_left_unused(tmp_path: Path) -> None:
    args = options.parser(None).parse_args(arguments(tmp_path, "none"))
    sets = [read_prompts(args.prompts[0])]
    Trajectory("acceptance", args, sets).record("prompts", [])
    assert Trajectory("acceptance", args, sets).answers == {"prompts": []}
    assert Trajectory("losslessness", args, sets).answers == {}


def test_a_finished_record_that_is_gone_on_with_is_unfinished_until_the_end(tmp_path: Path) -> None:
    args = options.parser(None).parse_args(arguments(tmp_path, "none"))
    sets = [read_prompts(args.prompts[0])]
    records.Record("speed", args, sets).finish([])
    again = records.Record("speed", args, sets)
    again.resume([])
    again.save()
    assert read_json(args.json)["settings"]["finished"] is False


def test_a_failure_of_an_engine_is_recorded_and_the_next_one_gets_its_turn(tmp_path: Path) -> None:
    args = options.parser(None).parse_args(arguments(tmp_path, "none,ngram"))
    record = records.Record("speed", args, [read_prompts(args.prompts[0])])
    for run in runs(parse_methods(args.methods), [3], "float32"):
        with record.attempt(run):
            raise RuntimeError("out of luck")
    assert [failure["run"] for failure in record.failures] == ["none", "ngram K=3"]


def test_conversations_that_do_not_fit_are_left_out_unless_none_fits() -> None:
    tokenizer = byte_level(CHATML)
    short, long = Conversation("short", ("a",)), Conversation("long", ("a" * 300,))
    assert engines.fitting(tokenizer, [short, long], 50, 128) == [short]
    with pytest.raises(GriffinError, match="none of 1 conversations fits --max-model-len 128"):
        engines.fitting(tokenizer, [long], 50, 128)
