"""The trainer's settings: a file, a preset and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from griffin_vllm.training.config import TrainConfig, describe_settings


def test_alignment_off_needs_no_quotes_though_yaml_reads_it_as_false(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("target: t\ndata: d\noutput: o\n")
    assert TrainConfig.load(path, ["--alignment", "off"]).alignment_rule == "off"


def test_command_line_overrides_the_file_and_the_file_overrides_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: small\ntarget: t\ndata: d\noutput: o\nseed: 3\n")
    config = TrainConfig.load(path, ["--stages.0.epochs", "0.5", "--learning-rate=0.001"])
    assert (config.seed, config.stages[0].epochs, config.learning_rate) == (3, 0.5, 0.001)
    assert config.sampled_tokens == 4096


def test_command_line_can_name_the_preset_and_change_one_of_the_default_stages(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("target: t\ndata: d\noutput: o\nseed: 3\n")
    small = TrainConfig.load(path, ["--seed", "4", "--preset", "small"])
    assert (small.seed, small.sampled_tokens) == (4, 4096)
    path.write_text("target: t\ndata: d\noutput: o\n")
    stages = TrainConfig.load(path).stages
    changed = TrainConfig.load(path, ["--stages.1.epochs", "7"]).stages
    assert [stage.epochs for stage in changed] == [stages[0].epochs, 7, stages[2].epochs]
    assert [stage.draft_steps for stage in changed] == [1, 2, 3]


def write(folder: Path, text: str = "") -> Path:
    path = folder / "run.yaml"
    path.write_text(f"target: t\ndata: d\noutput: o\n{text}")
    return path


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", [], [(1, 0.0), (2, 0.5), (3, 0.5)]),
        ("method: hass", [], [(1, 0.0), (2, 0.5), (3, 0.5)]),
        ("stages: [{draft_steps: 1}, {draft_steps: 4}]", [], [(1, 0.0), (4, 0.5)]),
        ("stages: [{draft_steps: 1, k_weight: null}]", [], [(1, 0.0)]),
        (
            "stages: [{draft_steps: 1, k_weight: 0.5}, {draft_steps: 2, k_weight: 0}]",
            [],
            [(1, 0.5), (2, 0.0)],
        ),
        ("", ["--stages.0.draft_steps", "2"], [(2, 0.5), (2, 0.5), (3, 0.5)]),
    ],
)
def test_top_k_loss_begins_with_the_second_draft_step_unless_its_weight_is_given(
    text: str, overrides: list[str], expected: list[tuple[int, float]], tmp_path: Path
) -> None:
    config = TrainConfig.load(write(tmp_path, text), overrides)
    assert [(stage.draft_steps, stage.k_weight) for stage in config.stages] == expected
    # what a run writes down says the weights themselves
    assert [stage["k_weight"] for stage in config.model_dump()["stages"]] == [k for _, k in expected]


def test_eagle_trains_one_draft_step_without_the_top_k_loss_by_default(tmp_path: Path) -> None:
    config = TrainConfig.load(write(tmp_path, "method: eagle"))
    assert [(stage.draft_steps, stage.k_weight) for stage in config.stages] == [(1, 0.0)]
    changed = TrainConfig.load(write(tmp_path), ["--method", "eagle", "--stages.0.epochs", "3"])
    assert [(stage.draft_steps, stage.epochs) for stage in changed.stages] == [(1, 3)]


def test_draft_tokens_are_five_unless_a_head_to_continue_from_recommends_others(tmp_path: Path) -> None:
    assert TrainConfig.load(write(tmp_path)).num_speculative_tokens == 5
    assert TrainConfig.load(write(tmp_path, "init_from: h")).num_speculative_tokens is None
    given = TrainConfig.load(write(tmp_path, "init_from: h\nnum_speculative_tokens: 3"))
    assert given.num_speculative_tokens == 3


def test_a_path_below_the_home_folder_is_found_where_no_shell_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text("target: t\ndata: ~/data\noutput: ~/run\n")
    config = TrainConfig.load(path, ["--output=~/other"])
    assert (config.data, config.output, config.features) == (tmp_path / "data", tmp_path / "other", None)


def test_help_lists_every_setting_with_its_meaning() -> None:
    shown = describe_settings()
    names = {name for name, _, _ in shown}
    assert {f"--{name}" for name in TrainConfig.model_fields} <= names
    assert {"--stages.N.draft_steps", "--stages.N.learning_rate"} <= names
    assert all(meaning for _, _, meaning in shown)
