"""What a run leaves in its folder, and what may go on there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from griffin_vllm.checkpoint import Head, open_head, save_head, tensor_shapes
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import dataset_digest
from griffin_vllm.training.run_folder import claim_output, with_precision
from griffin_vllm.training.run_log import RunLog
from griffin_vllm.training.training_state import TrainingState, save_checkpoint
from tests.full_disk import full_disk
from tests.training.tiny import HEAD, settings, write_data


def claim_and_train(config: TrainConfig, start: Head | None = None) -> None:
    """Begin a run as far as its first checkpoint."""
    claim_output(config, start)
    save_checkpoint(config.output / "checkpoints", TrainingState(1, {"weight": torch.zeros(1)}, {}))


def stored(output: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((output / name).read_text())


def test_log_that_ends_in_half_a_line_is_read_without_it(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, writes=True)
    log.write("train", 1, {"loss": 1.0})
    log.write("train", 2, {"loss": 0.5})
    whole = log.path.read_text()
    log.path.write_text(whole + '{"kind": "train", "st')
    assert [row["step"] for row in RunLog(tmp_path, 2, writes=True).rows()] == [1, 2]
    assert log.path.read_text() == whole
    assert [row["step"] for row in RunLog(tmp_path, 1, writes=True).rows()] == [1]


def test_damaged_line_of_a_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n\0\0\0\n')
    with pytest.raises(GriffinError, match=r"log\.jsonl: line 2 is damaged"):
        RunLog(tmp_path, 1, writes=True)


def test_full_disk_while_the_log_is_written_is_one_line_and_its_rows_stay(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, writes=True)
    log.write("train", 1, {"loss": 1.0})
    with full_disk(40), pytest.raises(GriffinError, match=r"the log cannot be written \("):
        log.write("train", 2, {"loss": 0.5})
    with full_disk(20), pytest.raises(GriffinError, match=r"log\.jsonl: cannot be written \("):
        RunLog(tmp_path, 1, writes=True)
    assert [row["step"] for row in RunLog(tmp_path, 2, writes=True).rows()] == [1]


def test_full_disk_while_settings_are_written_leaves_a_folder_that_the_run_can_start_in(
    data: Path, tmp_path: Path
) -> None:
    config = settings(Path("t"), data, tmp_path / "run")
    with full_disk(), pytest.raises(GriffinError, match=r"config\.json: cannot be written \("):
        claim_output(config)
    assert list(config.output.iterdir()) == []
    claim_output(config)


def test_run_that_is_older_than_a_setting_has_its_default(data: Path, tmp_path: Path) -> None:
    config = settings(Path("t"), data, tmp_path)
    claim_and_train(config)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    del before["noise"]
    for stage in before["stages"]:
        del stage["learning_rate"]
    path.write_text(json.dumps(before))
    claim_output(config)
    with pytest.raises(GriffinError, match=r"config\.json: noise is 0\.2, expected 0\.5; name another"):
        claim_output(config.model_copy(update={"noise": 0.5}))


def test_output_of_another_run_is_refused(data: Path, tmp_path: Path) -> None:
    claim_and_train(settings(Path("t"), data, tmp_path / "run"))
    with pytest.raises(GriffinError, match="seed is 0, expected 1"):
        claim_output(settings(Path("t"), data, tmp_path / "run", seed=1))


def test_output_with_a_head_whose_checkpoints_are_gone_is_that_of_its_run(data: Path, tmp_path: Path) -> None:
    claim_output(settings(Path("t"), data, tmp_path))
    (tmp_path / "head").mkdir()
    with pytest.raises(GriffinError, match="seed is 0, expected 1"):
        claim_output(settings(Path("t"), data, tmp_path, seed=1))


def test_run_that_never_trained_a_step_may_begin_again_with_other_settings_and_inputs(
    target: Path, data: Path, tmp_path: Path
) -> None:
    claim_output(settings(Path("t"), data, tmp_path / "run", soft_target_tokens=16))
    other = write_data(tmp_path / "data", target, conversations=5)
    config = settings(target, other, tmp_path / "run", soft_target_tokens=4)
    claim_and_train(config)
    assert stored(config.output)["soft_target_tokens"] == 4
    assert stored(config.output, "inputs.json")["data"] == dataset_digest(other)
    claim_output(config)
    with pytest.raises(GriffinError, match="soft_target_tokens is 4, expected 16"):
        claim_output(config.model_copy(update={"soft_target_tokens": 16}))


def test_run_goes_on_where_its_output_target_data_and_features_were_moved_to(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source, name in ((target, "target"), (data, "data")):
        shutil.copytree(source, name)
    here = Path.cwd()
    config = settings(here / "target", here / "data", here / "a", features=str(here / "features"))
    claim_and_train(config)
    for old, new in (("a", "b"), ("target", "t"), ("data", "d")):
        shutil.move(old, new)
    moved = settings(Path("t"), Path("d"), Path("b"), features="f")
    claim_output(moved)
    assert (stored(Path("b"))["target"], stored(Path("b"))["data"]) == ("t", "d")
    with pytest.raises(GriffinError, match="features is 'f', expected None; name another output folder"):
        claim_output(moved.model_copy(update={"features": None}))


def test_path_of_what_has_no_digest_is_compared(target: Path, data: Path, tmp_path: Path) -> None:
    config = settings(Path("org/model"), data, tmp_path / "run", features="features")
    claim_and_train(config)
    claim_output(config)
    for name, other in (("target", Path("other/model")), ("features", Path("others"))):
        with pytest.raises(GriffinError, match=rf"config\.json: {name} is '.*', expected '{other}'; name"):
            claim_output(config.model_copy(update={name: other}))
    (config.output / "inputs.json").unlink()
    with pytest.raises(GriffinError, match=r"config\.json: data is '.*', expected '.*'; name another"):
        claim_output(config.model_copy(update={"data": shutil.copytree(data, tmp_path / "copy")}))


def test_run_may_go_on_with_another_validation_which_changes_no_weights(data: Path, tmp_path: Path) -> None:
    claim_and_train(settings(Path("t"), data, tmp_path / "run"))
    changed = settings(Path("t"), data, tmp_path / "run", validate_every=7, validation_samples=3)
    claim_output(changed)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["validate_every"] == 7
    with pytest.raises(GriffinError, match="seed is 0, expected 1"):
        claim_output(changed.model_copy(update={"seed": 1}))


def test_run_does_not_go_on_with_other_data_at_the_same_place(target: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = settings(target, write_data(data, target), tmp_path / "run")
    claim_and_train(config)
    claim_output(config)
    shutil.rmtree(data)
    write_data(data, target, conversations=5)
    with pytest.raises(GriffinError, match=r"inputs\.json: data is .*; name another output folder"):
        claim_output(config)


def test_run_does_not_go_on_with_another_head_of_the_same_name(
    target: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(target, data, tmp_path / "run")
    heads = []
    for number in (0, 1):
        weights = {name: torch.full(shape, float(number)) for name, shape in tensor_shapes(HEAD).items()}
        save_head(tmp_path / str(number), HEAD.to_served(), weights)
        heads.append(open_head(tmp_path / str(number)))
    claim_and_train(config, heads[0])
    with pytest.raises(GriffinError, match=r"inputs\.json: init_from is "):
        claim_output(config, heads[1])


def test_run_does_not_go_on_with_another_target_of_the_same_name(
    target: Path, data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(target, tmp_path / "target"))
    config = settings(copy, data, tmp_path / "run")
    claim_and_train(config)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GriffinError, match=r"inputs\.json: target is "):
        claim_output(config)


def test_run_does_not_go_on_where_the_targets_config_says_something_else(
    target: Path, data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(target, tmp_path / "target"))
    config = settings(copy, data, tmp_path / "run")
    claim_and_train(config)
    said = stored(copy)
    (copy / "config.json").write_text(json.dumps(said | {"transformers_version": "another"}))
    claim_output(config)
    (copy / "config.json").write_text(json.dumps(said | {"max_position_embeddings": 12}))
    with pytest.raises(GriffinError, match=r"inputs\.json: target_config is "):
        claim_output(config)
    # as a run from before that digest has it
    inputs = stored(config.output, "inputs.json")
    del inputs["target_config"]
    (config.output / "inputs.json").write_text(json.dumps(inputs))
    claim_output(config)


@pytest.mark.parametrize("native", [True, False])
def test_products_are_in_bf16_only_where_the_device_does_not_emulate_it_with_a_stand_in_for_its_answer(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr("griffin_vllm.training.run_folder.multiplies_bf16", lambda device: native)
    here = Path()
    found = {
        asked: with_precision(settings(here, here, here, precision=asked), torch.device("cpu")).precision
        for asked in ("auto", "bf16", "fp32")
    }
    assert found == {"auto": "bf16" if native else "fp32", "bf16": "bf16", "fp32": "fp32"}


def test_run_goes_on_in_its_precision_on_a_machine_of_the_other_kind_with_a_stand_in_for_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(Path("t"), data, tmp_path / "run", precision="auto")
    for native in (True, False):
        monkeypatch.setattr("griffin_vllm.training.run_folder.multiplies_bf16", lambda device, n=native: n)
        found = with_precision(config, torch.device("cpu"))
        assert found.precision == "bf16"
        claim_and_train(found)
