"""`griffin tune` finds what pays on this machine, and the plugin uses it where nothing else was asked."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from griffin_vllm.checkpoint import TUNING_FILE, open_head, weights_digest
from griffin_vllm.cli import app
from griffin_vllm.convert import cached_served_layout
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.tune import PROMPTS, alone_with, choose, explain, measure, tune
from griffin_vllm.serving.tune_depth import Chain, Depth
from griffin_vllm.serving.tune_engine import running_engine
from griffin_vllm.serving.tuning import (
    TUNING_VARIABLE,
    Point,
    Tuning,
    check_writable,
    machine,
    read_tuning,
    untuned_schedule,
    vllm_version,
    write_tuning,
)
from tests.serving import tiny


def point(size: int, k: int, step_ms: float, tau: float = 1.0) -> Point:
    return Point(
        batch_size=size,
        num_speculative_tokens=k,
        step_ms=step_ms,
        acceptance_length=tau,
        tokens_per_second=1.0,
    )


def test_each_batch_size_gets_the_drafts_that_pay_there_and_none_where_none_do() -> None:
    costs = {1: (40, 44, 50), 2: (40, 44, 50), 8: (40, 50, 80), 16: (40, 70, 120)}
    points = [
        point(size, k, step, tau)
        for size, steps in costs.items()
        for k, (step, tau) in enumerate(zip(steps, (1.0, 1.5, 1.8), strict=True))
    ]
    assert choose(points) == [(1, 2, 2), (3, 8, 1), (9, 16, 0)]


def test_a_gain_within_the_noise_leaves_drafting_off() -> None:
    assert choose([point(1, 0, 40), point(1, 1, 59.9, 1.5)]) == [(1, 1, 0)]


@pytest.mark.parametrize(("tau", "drafts"), [(2.0, 0), (3.0, 4)])
def test_a_depth_that_is_no_faster_as_it_is_served_leaves_drafting_off_with_an_engine_of_our_own(
    head: Path, monkeypatch: pytest.MonkeyPatch, tau: float, drafts: int
) -> None:
    model_config = SimpleNamespace(dtype="float32", quantization=None)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model_config))
    by_the_model = [point(1, 0, 40), point(1, 4, 90, 3.0)]
    as_served = [point(1, 0, 40), point(1, 4, 90, tau)]
    stand_ins: dict[str, Any] = {
        "misfit": lambda *_: None,
        "rendered_prompts": lambda *_: [[1]],
        "running_engine": lambda *_: nullcontext(engine),
        "Drafts": lambda _: SimpleNamespace(set=lambda _: None),
        "decode": lambda *_: iter(()),
        "draft_to_the_end": lambda _: None,
        "draft_as_served": lambda *_: None,
        "record_chains": lambda _: False,
        "choose_depth": lambda *_: Depth(4, 0.25),
        "measure": lambda *_: by_the_model,
        "measure_each": lambda *_, **__: as_served,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(f"griffin_vllm.serving.tune.{name}", stand_in)
    options: dict[str, Any] = {"max_k": 4, "batch_sizes": [1], "tokens": 16, "engine_options": []}
    found = tune("target", open_head(head), ["Hi"], **options)
    assert found.schedule == [(1, 1, drafts)]
    rows = explain(found).columns[0]._cells
    assert rows == ["1", "1", "1, as served", "1, as served"]


def test_a_batch_size_is_not_measured_far_beyond_its_best_number_of_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    k = 0

    def set_k(number: int) -> None:
        nonlocal k
        k = number

    def decode(_: object, prompts: Iterable[list[int]], tokens: int) -> Iterator[tuple[float, list[int]]]:
        size = len(list(prompts))
        asked.append((size, k))
        # half of all first drafts are accepted, and a quarter of all second ones
        for emitted in (1 + min(k, 2), 1 + min(k, 1), 1, 1):
            yield 1.0 + 0.1 * k * size, [emitted] * size

    monkeypatch.setattr("griffin_vllm.serving.tune.decode", decode)
    engine: Any = None
    drafts: Any = SimpleNamespace(set=set_k)
    points = measure(engine, drafts, [[1], [2]], [2, 8], 4, 16, give_up=0.9)
    assert {(one.batch_size, one.num_speculative_tokens) for one in points} == {
        *((2, number) for number in (0, 1, 2, 3)),
        *((8, number) for number in (0, 1)),
    }
    assert asked == [*asked[:6], *asked[:6][::-1], *asked[:6]]
    assert [one.acceptance_length for one in points[:4]] == [1, 1.5, 1.75, 1.75]
    assert points[5].step_ms == pytest.approx(1800)
    assert points[5].tokens_per_second == pytest.approx(8 * 1.5 / 1.8)
    assert len(measure(engine, drafts, [[1], [2]], [2, 8], 4, 16)) == 10


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return tiny.write_head(tmp_path / "head")


def tuning(head: Path, **changes: object) -> Tuning:
    found = Tuning(
        machine=machine(),
        vllm=vllm_version(),
        target="target",
        weights=weights_digest(open_head(head).weights),
        precision="float32",
        points=[point(1, 0, 40), point(1, 1, 44)],
        num_speculative_tokens=1,
        schedule=[(1, 1, 1), (2, 4, 0)],
    )
    return found.model_copy(update=changes)


@pytest.mark.parametrize(
    "other", [{"machine": "another"}, {"vllm": "0.1"}, {"weights": "0" * 16}, {"precision": "bfloat16"}]
)
def test_a_tuning_of_another_machine_vllm_head_or_precision_is_not_used(
    head: Path, other: dict[str, str]
) -> None:
    write_tuning(head / TUNING_FILE, tuning(head))
    assert read_tuning(open_head(head), "float32") == tuning(head)
    write_tuning(head / TUNING_FILE, tuning(head, **other))
    assert read_tuning(open_head(head), "float32") is None


def test_a_damaged_tuning_is_named(head: Path) -> None:
    (head / TUNING_FILE).write_text("{")
    with pytest.raises(GriffinError, match=r"tuning\.json: is not a tuning"):
        read_tuning(open_head(head), "float32")


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ([], "must not be empty"),
        ([[1, 4, -1]], "must be >= 0"),
        ([[1, 4, 9]], "its schedule has 9 draft tokens"),
    ],
)
def test_a_tuning_whose_schedule_cannot_be_is_named_before_a_model_loads(
    head: Path, schedule: list[list[int]], reason: str
) -> None:
    spoilt = json.loads(tuning(head).model_dump_json()) | {"schedule": schedule}
    (head / TUNING_FILE).write_text(json.dumps(spoilt))
    with pytest.raises(GriffinError, match=rf"tuning\.json: is not a tuning \(.*{reason}"):
        read_tuning(open_head(head), "float32")


def test_a_tuning_holds_for_as_many_cores_as_the_process_may_use() -> None:
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert machine().endswith(", 1 cores")
    finally:
        os.sched_setaffinity(0, cores)


def test_a_file_that_the_environment_names_is_used_in_place_of_the_one_beside_the_head(
    head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tuning(head / TUNING_FILE, tuning(head))
    elsewhere = tmp_path / "elsewhere.json"
    monkeypatch.setenv(TUNING_VARIABLE, str(elsewhere))
    with pytest.raises(GriffinError, match=r"GRIFFIN_TUNING is '.*elsewhere\.json', expected a file"):
        read_tuning(open_head(head), "float32")
    write_tuning(elsewhere, tuning(head, num_speculative_tokens=2))
    assert read_tuning(open_head(head), "float32") == tuning(head, num_speculative_tokens=2)


def test_a_name_that_no_file_can_have_is_refused_in_one_line(
    head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TUNING_VARIABLE, "x" * 300)
    with pytest.raises(GriffinError, match=r"x: is not a tuning \(File name too long\)"):
        read_tuning(open_head(head), "float32")


@pytest.mark.parametrize("name", ["/dev/null", "missing/tuning.json"])
def test_what_could_not_be_replaced_is_refused_before_anything_is_measured(name: str, tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match=f"{name}: .*; see --out"):
        check_writable(tmp_path / name)
    writable = write(tmp_path / "tuning.json", b"mine")
    check_writable(writable)
    assert writable.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [writable]


def test_what_was_measured_is_shown_where_it_cannot_be_written(
    tmp_path: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "tuning.json"
    out.parent.mkdir()

    def measured(*_: Any, **__: Any) -> Tuning:
        out.parent.rmdir()
        return tuning(head)

    monkeypatch.setattr("griffin_vllm.serving.tune.tune", measured)
    done = CliRunner().invoke(app, ["tune", "target", str(head), "--out", str(out)])
    assert done.exit_code == 2
    assert Tuning.model_validate_json(done.stdout) == tuning(head)
    assert re.match(r"error: .*tuning\.json: cannot be written", done.stderr)


def test_a_tuned_head_is_served_from_its_own_folder(head: Path, tmp_path: Path) -> None:
    write_tuning(head / TUNING_FILE, tuning(head))
    assert cached_served_layout(open_head(head), tmp_path / "cache") == head
    assert not (tmp_path / "cache").exists()


def test_a_schedule_of_one_number_is_no_schedule(head: Path) -> None:
    assert tuning(head, schedule=[(1, 4, 1)]).speculative_config() == {"num_speculative_tokens": 1}
    assert tuning(head).speculative_config() == {
        "num_speculative_tokens": 1,
        "num_speculative_tokens_per_batch_size": [(1, 1, 1), (2, 4, 0)],
    }


def untokenized(here: Path) -> Path:
    for file in (here / "target").glob("tokenizer*"):
        file.unlink()
    return here / "target"


def write_wide_head(folder: Path) -> str:
    return str(tiny.write_head(folder, tiny.CONFIG.model_copy(update={"hidden_size": 128})))


# What is given besides or instead of a good target and head, and the line that refuses it.
REFUSALS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no file of prompts": (
        lambda here: ["--prompts", str(here / "nowhere.txt")],
        r"nowhere\.txt: cannot be read \(No such file or directory\)",
    ),
    "a folder of prompts": (
        lambda here: ["--prompts", str(here)],
        r": cannot be read \(Is a directory\)",
    ),
    "empty prompts": (
        lambda here: ["--prompts", str(write(here / "empty.txt", b"\n \n"))],
        r"empty\.txt: holds no prompts",
    ),
    "prompts that are no text": (
        lambda here: ["--prompts", str(write(here / "bytes.txt", b"\xff\xfe"))],
        r"bytes\.txt: cannot be read \('utf-8' codec can't decode",
    ),
    "prompts that are JSON": (
        lambda here: ["--prompts", str(write(here / "mt.jsonl", b'{"turns": ["Why?"]}'))],
        r"mt\.jsonl: first line is '.*', expected the text of a prompt \(one a line, not JSON\)",
    ),
    "no target": (
        lambda here: [str(here / "nowhere"), str(here / "head")],
        "nowhere: is no folder and not on the Hub",
    ),
    "a target of no possible name": (
        lambda here: ["x" * 300, str(here / "head")],
        "x{300}: is no folder and not on the Hub",
    ),
    "a target without a tokenizer": (
        lambda here: [str(untokenized(here)), str(here / "head")],
        "target: its tokenizer cannot render the prompts to measure with",
    ),
    "a target without a config": (
        lambda here: [str(here), str(here / "head")],
        r"config\.json: is missing",
    ),
    "no head": (
        lambda here: [str(here / "target"), "nowhere"],
        "griffin:nowhere: no bundled head, folder or",
    ),
    "a head that does not fit": (
        lambda here: [str(here / "target"), write_wide_head(here / "wide")],
        r"wide/config\.json: hidden_size is 128, expected 64 \(the target's\)",
    ),
    "an output below a file": (
        lambda here: ["--out", str(here / "head" / "config.json" / "tuning.json")],
        r"tuning\.json: cannot be written \(Not a directory\); see --out",
    ),
    "an output in no folder": (
        lambda here: ["--out", str(here / "nowhere" / "tuning.json")],
        r"tuning\.json: cannot be written \(No such file or directory\); see --out",
    ),
    "an output that is a folder": (
        lambda here: ["--out", str(here)],
        r": cannot be written \(Is a directory\); see --out",
    ),
    "an unknown engine option": (
        lambda here: ["--enforce-eagr"],
        "griffin tune: unrecognized arguments: --enforce-eagr",
    ),
    "an engine option that does not go with the others": (
        lambda here: ["--max-num-batched-tokens", "8"],
        "griffin tune: .*max_num_batched_tokens",
    ),
    "an engine option that is no number": (
        lambda here: ["--block-size", "many"],
        "griffin tune: argument --block-size: ",
    ),
    "prompts that are longer than the target's context": (
        lambda here: ["--prompts", str(write(here / "long.txt", b"word " * 1000))],
        r"griffin tune: .*max_model_len",
    ),
    "prompts that are longer than --max-model-len": (
        lambda here: ["--max-model-len", "64"],
        r"griffin tune: --max-model-len is 64, expected \d+ or more for these prompts",
    ),
    "another head among the engine's options": (
        lambda here: ["--speculative-model", "griffin:another"],
        "griffin tune: its head is the second argument",
    ),
    "batch sizes that are no numbers": (
        lambda here: ["--batch-sizes", "1,two"],
        "--batch-sizes is '1,two', expected whole numbers like 1,2,4",
    ),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_line_before_an_engine_starts(
    name: str, tmp_path: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    def start(*_: object) -> None:
        raise AssertionError("an engine starts")

    monkeypatch.setattr(LLMEngine, "from_engine_args", start)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # vLLM sets its logger up somewhere on the way, to write to this test's output, which is closed behind it
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [logging.NullHandler()])
    target = tmp_path / "target"
    tiny.target_config().save_pretrained(target)
    tiny.write_tokenizer(target)
    given, message = REFUSALS[name]
    arguments = given(tmp_path)
    if arguments[0].startswith("--"):
        arguments = [str(target), str(head), *arguments]
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["tune", *arguments])
    assert done.exit_code == 2, done.exception
    assert done.stderr.count("\n") == 1
    assert re.match(f"error: .*{message}", done.stderr), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_an_engine_that_does_not_start_is_one_line(tmp_path: Path, head: Path) -> None:
    target = tmp_path / "target"
    tiny.write_target(target)
    options = "--kv-cache-memory-bytes 1024 --enforce-eager --distributed-executor-backend uni"
    refused = pytest.raises(GriffinError, match=r"^griffin tune: the engine does not start .*[Mm]emory")
    with refused, running_engine(str(target), open_head(head), 2, 1, 64, options.split()):
        raise AssertionError("it started")


def test_the_v2_runner_of_a_mocked_gpu_is_refused_before_an_engine_starts(
    tmp_path: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    def start(*_: object) -> None:
        raise AssertionError("an engine starts")

    monkeypatch.setattr(LLMEngine, "from_engine_args", start)
    config = SimpleNamespace(use_v2_model_runner=True)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda _: config)
    done = CliRunner().invoke(app, ["tune", str(tiny.write_target(tmp_path / "target")), str(head)])
    assert done.exit_code == 2, done.exception
    assert re.match("error: griffin tune: .* set VLLM_USE_V2_MODEL_RUNNER=0", done.stderr), done.stderr


def test_as_many_drafts_are_tried_as_the_head_recommends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def noted(*_: Any, max_k: int, **__: Any) -> None:
        tried.append(max_k)
        raise GriffinError("not measured here")

    monkeypatch.setattr("griffin_vllm.serving.tune.tune", noted)
    for recommended in (2, 12, 20):
        config = tiny.CONFIG.model_copy(update={"num_speculative_tokens": recommended})
        CliRunner().invoke(app, ["tune", "target", str(tiny.write_head(tmp_path / str(recommended), config))])
    assert tried == [5, 12, 16]


def test_the_command_measures_and_the_plugin_uses_what_it_wrote(
    tmp_path: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import EngineArgs

    target = str(tiny.write_target(tmp_path / "target"))
    options = ["--max-k", "4", "--batch-sizes", "1,2", "--tokens", "16", "--explain"]
    # never free as a whole: no more memory is asked for than the measured requests need
    engine = ["--enforce-eager", "--dtype", "float32", "--gpu-memory-utilization", "1.0"]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    chains = []

    def chosen(found: list[Chain], points: list[Point], static: int) -> Depth:
        assert [one.num_speculative_tokens for one in points] == [0, 1, 2, 3, 4]
        chains.extend(found)
        return Depth(2, 0.25)

    # whether drafting pays on models this small is up to the machine's mood
    monkeypatch.setattr("griffin_vllm.serving.tune.GIVE_UP", 0.0)
    monkeypatch.setattr("griffin_vllm.serving.tune.choose", lambda *_: [(1, 2, 2)])
    monkeypatch.setattr("griffin_vllm.serving.tune.choose_depth", chosen)
    # not through CliRunner: vLLM 0.28 wants a standard output that is a file
    app(["tune", target, str(head), *options, *engine], standalone_mode=False)
    found = read_tuning(open_head(head), "float32")
    assert found is not None
    assert [(one.batch_size, one.num_speculative_tokens) for one in found.points] == [
        (size, k) for size in (1, 2) for k in (0, 1, 2, 3, 4)
    ]
    # plain rounds yield one token, drafting ones more
    lengths = [one.acceptance_length for one in found.points]
    assert lengths[0] == lengths[5] == 1.0
    assert lengths[2] > lengths[1] > 1.1
    assert lengths[7] > lengths[6] > 1.1

    # every round of the answers given one at a time, the longest too: 16 tokens, the first from the prefill
    assert sum(1 + chain.accepted for chain in chains) == len(PROMPTS) * 15
    assert {len(chain.likelihoods) for chain in chains} == {4} == {chain.by_head for chain in chains}
    assert all(0 < chain.likelihoods[1] <= chain.likelihoods[0] <= 1 for chain in chains)

    write_tuning(head / TUNING_FILE, found.model_copy(update={"schedule": [(1, 1, 2), (2, 2, 0)]}))

    def configured(**asked: object) -> object:
        arguments = EngineArgs(
            model=target, max_model_len=128, spec_model=f"griffin:{head}", **{"dtype": "float32", **asked}
        )
        config = arguments.create_engine_config().speculative_config
        stop = config.draft_model_config.hf_config.draft_stop_probability
        return config.num_speculative_tokens, config.num_speculative_tokens_per_batch_size, stop

    assert configured() == (found.num_speculative_tokens, [(1, 1, 2), (2, 2, 0)], 0.25)
    nothing = {"num_speculative_tokens": None, "prompt_lookup_min": None}
    assert configured(speculative_config=nothing) == configured()
    assert configured(spec_tokens=3) == (3, None, 0.0)
    recommended = tiny.CONFIG.num_speculative_tokens
    untuned = (recommended, untuned_schedule(recommended), 0.0)
    assert configured(dtype="bfloat16") == untuned
    # it was measured with the head's own lookup, and another schedule wants another depth
    assert configured(speculative_config={"prompt_lookup_min": 0}) == untuned
    schedule = [(1, 2, 1), (3, 4, 0)]
    given = {"num_speculative_tokens_per_batch_size": schedule}
    assert configured(speculative_config=given) == (1, schedule, 0.0)


def test_one_request_alone_can_have_a_depth_of_its_own() -> None:
    schedule = [(1, 4, 2), (5, 16, 0)]
    assert alone_with(2, schedule) == schedule
    assert alone_with(4, schedule) == [(1, 1, 4), (2, 4, 2), (5, 16, 0)]
    assert alone_with(4, [(1, 1, 2), (2, 16, 0)]) == [(1, 1, 4), (2, 16, 0)]
