"""The trainer's settings: a file, a preset and the command line."""

from __future__ import annotations

from pathlib import Path

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


def test_help_lists_every_setting_with_its_meaning() -> None:
    shown = describe_settings()
    names = {name for name, _, _ in shown}
    assert {f"--{name}" for name in TrainConfig.model_fields} <= names
    assert {"--stages.N.draft_steps", "--stages.N.learning_rate"} <= names
    assert all(meaning for _, _, meaning in shown)
