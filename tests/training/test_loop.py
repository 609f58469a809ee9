"""Whole training runs on a tiny random target: they learn, they survive, they refuse bad input."""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import griffin_vllm.training
from griffin_vllm.checkpoint import open_head, save_head
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import only_process_in
from griffin_vllm.training import sources
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.loop import Interrupted, Trainer
from griffin_vllm.training.run_folder import claim_output, only_run_in
from griffin_vllm.training.target import Target
from griffin_vllm.training.training_state import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tests.full_disk import full_disk, small_disk
from tests.serving.tiny import write_reference_layout
from tests.training.tiny import settings, write_data


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def trained(output: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of the last checkpoint."""
    latest = latest_checkpoint(output / "checkpoints")
    assert latest is not None
    return load_checkpoint(latest).weights


def assert_same_run(found: Path, expected: Path) -> None:
    """The runs in two output folders ended with the same weights, bit for bit: in training and as they are served."""
    for one, other in (
        (trained(found), trained(expected)),
        (weights(found / "head"), weights(expected / "head")),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def finished(target: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing has interrupted."""
    output = tmp_path_factory.mktemp("finished")
    Trainer(settings(target, data, output)).run()
    return output


@pytest.mark.parametrize("method", ["griffin", "hass"])
def test_finished_run_leaves_a_head_that_can_be_served(
    method: str, finished: Path, target: Path, data: Path, tmp_path: Path
) -> None:
    output = finished
    if method == "hass":
        output = tmp_path
        Trainer(settings(target, data, output, method=method)).run()
    folder = output / "head"
    card = (folder / "README.md").read_text()
    assert f"{method.upper()} draft head" in card
    assert "simulated acceptance length" in card
    manifest = TokenDataset(data, "train").manifest
    counts, last = manifest.splits["train"], losses(output)[-1]
    assert f"| train data | {counts.samples} samples, {counts.tokens} tokens, {counts.answer_tokens} " in card
    assert f"| {manifest.sources[0].name} | {manifest.sources[0].sha256} | 12 | 0 |" in card
    assert f"| last training loss | {last:.3f} at step " in card
    if method == "griffin":
        assert open_head(folder).is_served_layout
    else:
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (config["num_speculative_tokens"], config["trained_context_length"]) == (5, 86)
        assert {"fc.weight", "layers.0.mlp.down_proj.weight"} <= weights(folder).keys()


def test_every_validation_is_logged_once_also_when_a_finished_run_is_run_again_or_lost_its_head(
    target: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(target, data, tmp_path, validate_every=1)
    for loses_its_head in (False, True, False):
        trainer = Trainer(config)
        head = trainer.run()
        assert (head / "config.json").is_file()
        if loses_its_head:
            shutil.rmtree(head)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "validation"]
    assert steps == list(range(1, len(trainer.plan) + 1))


@pytest.mark.parametrize("checkpoints", ["kept", "gone"])
def test_finished_run_that_is_run_again_leaves_its_head_and_checkpoints_as_they_are(
    target: Path, data: Path, tmp_path: Path, checkpoints: str
) -> None:
    config = settings(target, data, tmp_path)
    head = Trainer(config).run()
    (head / "tuning.json").write_text("mine")
    if checkpoints == "gone":
        shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert Trainer(config).run() == head
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_finished_run_needs_neither_target_nor_features_to_say_so(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(target, data, tmp_path / "run", features=str(tmp_path / "features"))
    head = Trainer(config).run()
    shutil.rmtree(tmp_path / "features")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def load(path: Path, device: torch.device) -> Target:
        raise AssertionError("the target is loaded")

    monkeypatch.setattr(sources, "Target", load)
    assert Trainer(config.model_copy(update={"validate_every": 7})).run() == head
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_folder_in_which_a_run_trains_is_nobody_elses_meanwhile(
    target: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(target, data, tmp_path)
    trainer = Trainer(config)
    with only_run_in(tmp_path), pytest.raises(GriffinError, match="another run is training in it"):
        trainer.run()
    assert not list((tmp_path / "checkpoints").glob("*"))
    trainer.run()


def test_settings_of_a_run_without_a_checkpoint_stay_when_another_one_is_begun_in_its_folder(
    target: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(target, data, tmp_path)
    other = Trainer(config.model_copy(update={"seed": config.seed + 1}))
    trainer = Trainer(config)
    with only_run_in(tmp_path):
        claim_output(trainer.config)
        with pytest.raises(GriffinError, match="another run is training in it"):
            other.run()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == config.seed
    trainer.run()
    with pytest.raises(GriffinError, match=r"config\.json: seed is"):
        other.run()


def test_run_that_is_stopped_before_a_validation_makes_it_up_when_it_goes_on(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(target, data, tmp_path, validate_every=2)
    optimise = Trainer._optimise

    def stopped(trainer: Trainer, model: Any, optimizer: Any, index: int) -> dict[str, float]:
        found = optimise(trainer, model, optimizer, index)
        if index + 1 == 2:
            signal.raise_signal(signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimise", stopped)
        with pytest.raises(Interrupted, match="stopped at step 2"):
            Trainer(config).run()
    Trainer(config).run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    validated = [row["step"] for row in rows if row["kind"] == "validation"]
    last = max(row["step"] for row in rows)
    assert validated == sorted({*range(2, last + 1, 2), last})


def test_signal_while_the_last_checkpoint_is_written_ends_the_run_behind_it(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(target, data, tmp_path)

    def save(folder: Path, state: TrainingState) -> Path:
        signal.raise_signal(signal.SIGINT)
        return save_checkpoint(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr("griffin_vllm.training.loop.save_checkpoint", save)
        with pytest.raises(Interrupted) as stop:
            Trainer(config).run()
    assert stop.value.signal == signal.SIGINT
    assert not (tmp_path / "head").exists()
    kept = latest_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    written = kept.stat().st_mtime_ns
    assert Trainer(config).run().is_dir()
    # nothing was left to train, so it is not written again
    assert kept.stat().st_mtime_ns == written


def test_validation_answers_are_greedy_ones_among_the_first_candidates(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    validation = TokenDataset(copy, "validation")
    first = int(validation.lengths[0])
    assert len(validation) >= 3
    tokens = np.lib.format.open_memmap(copy / "validation.tokens.npy", "r+")
    tokens[:first] = (tokens[:first] + 1) % validation.manifest.vocab_size
    tokens.flush()
    one = Trainer(settings(target, copy, tmp_path / "one", validation_samples=1))
    assert one.answers == [[1]]
    two = Trainer(settings(target, copy, tmp_path / "two", validation_samples=2))
    assert sorted(sample for batch in two.answers for sample in batch) == [1, 2]
    # none of so few candidates is greedy: the first one it is
    monkeypatch.setattr("griffin_vllm.training.loop.GREEDY_CANDIDATES", 1)
    assert Trainer(settings(target, copy, tmp_path / "none", validation_samples=1)).answers == [[0]]


@pytest.mark.parametrize("features", [None, "features"])
def test_run_without_validation_answers_trains_and_says_so(
    features: str | None, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", target, conversations=3, validation_share=0.0)
    cache = None if features is None else str(tmp_path / features)
    config = settings(target, data, tmp_path / "run", features=cache, validate_every=1)
    card = (Trainer(config).run() / "README.md").read_text()
    assert "no validation answers" in " ".join(capsys.readouterr().err.split())
    assert "simulated acceptance length" not in card


@pytest.mark.parametrize("alignment", ["off", "reference"])
def test_overfitting_a_handful_of_conversations_accepts_all_five_drafts(
    target: Path, tmp_path: Path, alignment: str
) -> None:
    data = write_data(tmp_path / "few", target, conversations=6, answer_tokens=60)
    for kind in ("tokens", "mask", "offsets", "loops"):
        (data / f"validation.{kind}.npy").write_bytes((data / f"train.{kind}.npy").read_bytes())
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["validation"] = manifest["splits"]["train"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    trainer = Trainer(
        settings(
            target,
            data,
            tmp_path / "run",
            stages=[{"draft_steps": 5, "epochs": 120}],
            alignment=alignment,
            # What a greedy chain is judged by: the target's first choice alone.
            soft_target_tokens=1,
            learning_rate=3e-3,
            p_weight=1.0,
            v_weight=0.1,
            noise=0.0,
            validate_every=1000,
        )
    )
    trainer.run()
    assert trainer.validate().acceptance_length > 5


def test_features_from_disk_train_like_the_target_in_the_loop(
    finished: Path, target: Path, data: Path, tmp_path: Path
) -> None:
    Trainer(settings(target, data, tmp_path / "disk", features=str(tmp_path / "features"))).run()
    found, expected = losses(tmp_path / "disk"), losses(finished)
    assert len(expected) >= 2
    # features on disk are in bf16
    assert found == pytest.approx(expected, rel=1e-2)


def test_target_is_loaded_once_for_the_features_of_both_splits_and_never_for_complete_ones(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []

    def counted(path: Path, device: torch.device) -> Target:
        loaded.append(path)
        return Target(path, device)

    monkeypatch.setattr(sources, "Target", counted)
    for output in ("first", "second"):
        Trainer(settings(target, data, tmp_path / output, features=str(tmp_path / "features")))
        assert len(loaded) == 1


def test_features_that_another_run_is_writing_are_left_to_it(
    target: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(target, data, tmp_path / "run", features=str(tmp_path / "features"))
    split = tmp_path / "features" / "train"
    split.mkdir(parents=True)
    with (
        only_process_in(split, "this test is writing"),
        pytest.raises(GriffinError, match=r"features/train: another run is writing these features"),
    ):
        Trainer(config)
    assert [path.name for path in split.iterdir()] == [".lock"]
    Trainer(config)


def command(config: TrainConfig, path: Path, *launcher: str) -> list[str]:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return [sys.executable, *(launcher or ("-m", "griffin_vllm.cli")), "train", str(path)]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path, after: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        path = latest_checkpoint(folder)
        if path is not None and int(path.name.removeprefix("step-")) > after:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended before step {after}: {process.communicate()[0]}")
        time.sleep(0.01)
    raise AssertionError("no checkpoint in time")


def test_run_that_is_stopped_and_killed_ends_with_the_weights_of_an_uninterrupted_one(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"stages": [{"draft_steps": 2, "epochs": 15}], "checkpoint_minutes": 1e-6}
    interrupted = settings(target, data, tmp_path / "interrupted", **changes)
    arguments = command(interrupted, tmp_path / "run.yaml")
    checkpoints = interrupted.output / "checkpoints"

    process = start(arguments)
    wait_for_checkpoint(process, checkpoints, after=3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command again to continue" in output

    stopped = latest_checkpoint(checkpoints)
    assert stopped is not None
    process = start(arguments)
    wait_for_checkpoint(process, checkpoints, after=int(stopped.name.removeprefix("step-")) + 3)
    process.kill()
    process.communicate()

    killed = latest_checkpoint(checkpoints)
    assert killed is not None
    steps_left = len(Trainer(interrupted).plan) - load_checkpoint(killed).step
    assert steps_left > 0
    steps_done: list[int] = []
    optimise = Trainer._optimise

    def counted(trainer: Trainer, model: Any, optimizer: Any, index: int) -> dict[str, float]:
        steps_done.append(index)
        return optimise(trainer, model, optimizer, index)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimise", counted)
        Trainer(interrupted).run()
    # from the start again, the weights would be the same
    assert len(steps_done) == steps_left
    whole = Trainer(settings(target, data, tmp_path / "whole", **changes))
    whole.run()
    assert_same_run(interrupted.output, whole.config.output)


# Were the launcher to start one process, or two that know nothing of each other, their losses would agree, too.
# Asked only after the run: accelerate's first question, here the trainer's, decides.
TWO_PROCESSES = """
from accelerate import PartialState
from griffin_vllm.cli import app
try:
    app()
finally:
    assert PartialState().num_processes == 2
"""


def run_in_two_processes(
    config: TrainConfig, script: Path, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command of ``config`` in two gloo processes, each of which executes ``before`` first."""
    script.write_text(before + TWO_PROCESSES)
    # accelerate starts several processes without MPI for GPUs alone, unless it is told so by the environment
    arguments = command(
        config,
        script.with_suffix(".yaml"),
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
        str(script),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


def test_two_gloo_processes_write_the_features_of_one_together(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"stages": [{"draft_steps": 1}]}
    monkeypatch.setattr("griffin_vllm.training.features.SHARD_TOKENS", 200)
    Trainer(settings(target, data, tmp_path / "one", features=str(tmp_path / "of one"), **changes))
    config = settings(target, data, tmp_path / "two", features=str(tmp_path / "of two"), **changes)
    before = "import griffin_vllm.training.features as features\nfeatures.SHARD_TOKENS = 200\n"
    done = run_in_two_processes(config, tmp_path / "two.py", before)
    assert done.returncode == 0, done.stderr
    one, two = (
        {path.relative_to(folder): path for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "of one", tmp_path / "of two")
    )
    assert one.keys() == two.keys()
    assert len([name for name in one if "features-" in name.name]) > 3
    for name, path in one.items():
        expected, found = load_file(path), load_file(two[name])
        assert expected.keys() == found.keys()
        for tensor in expected:
            torch.testing.assert_close(found[tensor], expected[tensor], msg=f"{name}, {tensor}")


def test_two_gloo_processes_have_the_loss_curve_of_one(target: Path, data: Path, tmp_path: Path) -> None:
    # noise, sampled classes and padding are those of the whole batch, whichever process has which sample
    changes = {
        "stages": [{"draft_steps": 2, "epochs": 5}],
        "noise": 0.2,
        "soft_target_tokens": 2,
        "sampled_tokens": 20,
    }
    Trainer(settings(target, data, tmp_path / "one", **changes)).run()
    done = run_in_two_processes(settings(target, data, tmp_path / "two", **changes), tmp_path / "two.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'two' / 'head'}\n"
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(expected) >= 2
    assert found == pytest.approx(expected, rel=1e-3)
    of_two, of_one = (trained(tmp_path / name) for name in ("two", "one"))
    for name, tensor in of_one.items():
        torch.testing.assert_close(of_two[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_run_that_found_no_room_for_its_features_starts_with_fewer_soft_targets_in_the_same_output(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=0))
    config = settings(target, data, tmp_path / "run", features=str(tmp_path / "features"))
    with monkeypatch.context() as patch:
        patch.setattr("griffin_vllm.training.features.shutil", full)
        with pytest.raises(GriffinError, match="a smaller soft_target_tokens makes it smaller"):
            Trainer(config)
    Trainer(config.model_copy(update={"soft_target_tokens": 4}))


def test_head_that_is_continued_from_keeps_what_it_recommends_and_the_longest_context_it_was_trained_with(
    target: Path, data: Path, tmp_path: Path
) -> None:
    first = Trainer(settings(target, data, tmp_path / "first", stages=[{"draft_steps": 1}])).run()
    start = open_head(first)
    tuned = start.config.model_copy(
        update={
            "num_speculative_tokens": 7,
            "draft_stop_probability": 0.25,
            "prompt_lookup_min": 3,
            "trained_context_length": 4096,
        }
    )
    save_head(tmp_path / "tuned", tuned.to_served(), load_file(start.weights))
    from_tuned = {"init_from": str(tmp_path / "tuned"), "stages": [{"draft_steps": 1}]}
    found = open_head(Trainer(settings(target, data, tmp_path / "second", **from_tuned)).run()).config
    assert (found.num_speculative_tokens, found.draft_stop_probability) == (7, 0.25)
    assert (found.prompt_lookup_min, found.trained_context_length) == (3, 4096)
    other = Trainer(settings(target, data, tmp_path / "third", **from_tuned, num_speculative_tokens=2))
    assert other.head_config.num_speculative_tokens == 2
    assert len(other.validate().accuracy) == 2
    save_head(
        tmp_path / "tuned",
        tuned.model_copy(update={"trained_context_length": 3}).to_served(),
        load_file(start.weights),
    )
    longest = int(other.train_data.lengths.max())
    longer = Trainer(settings(target, data, tmp_path / "fourth", **from_tuned))
    assert longer.head_config.trained_context_length == longest


def test_what_a_head_to_continue_from_does_not_know_of_the_new_one_is_not_kept(
    target: Path, data: Path, tmp_path: Path
) -> None:
    first = open_head(Trainer(settings(target, data, tmp_path / "first", stages=[{"draft_steps": 1}])).run())
    tensors = load_file(first.weights)
    write_reference_layout(tmp_path / "published", first.config, tensors)
    from_published = settings(target, data, tmp_path / "second", init_from=str(tmp_path / "published"))
    # the authors' layout has no place for it
    assert Trainer(from_published).head_config.draft_sample_method == "probabilistic"
    for limit, kept in ((3, None), (4096, 4096)):
        tuned = {"draft_context_limit": limit, "draft_sample_method": "greedy"}
        save_head(tmp_path / "tuned", first.config.model_copy(update=tuned).to_served(), tensors)
        from_tuned = settings(target, data, tmp_path / f"{limit}", init_from=str(tmp_path / "tuned"))
        found = Trainer(from_tuned).head_config
        assert (found.draft_context_limit, found.draft_sample_method) == (kept, "greedy")


@pytest.mark.parametrize("kind", ["griffin", "eagle"])
def test_run_continues_from_an_existing_head(kind: str, target: Path, data: Path, tmp_path: Path) -> None:
    head = Trainer(settings(target, data, tmp_path / "first", head=kind)).run()
    second = Trainer(settings(target, data, tmp_path / "second", head=kind, init_from=f"griffin:{head}"))
    for name, tensor in weights(head).items():
        assert torch.equal(second.head.get_parameter(name), tensor.float())


def test_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
    target: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(
        target, data, tmp_path / "run", learning_rate=1e30, clip_norm=None, checkpoint_minutes=1e-6
    )
    with pytest.raises(
        GriffinError, match=r"the loss is .* at step \d+; the last good checkpoint is .*step-"
    ):
        Trainer(config).run()
    assert latest_checkpoint(config.output / "checkpoints") is not None


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_in_the_last_step_is_never_saved(
    broken: float, target: Path, data: Path, tmp_path: Path
) -> None:
    # clipping by value would make a number of infinity
    config = settings(target, data, tmp_path / "run", checkpoint_minutes=1e-6, clip_value=0.5)
    trainer = Trainer(config)
    parameter, calls = next(trainer.head.parameters()), count(1)

    def break_the_last(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * broken if next(calls) == len(trainer.plan) else gradient

    parameter.register_hook(break_the_last)
    last = len(trainer.plan) - 1
    with pytest.raises(
        GriffinError,
        match=rf"the gradient's norm is .* at step {last + 1}; the last good checkpoint is .*step-{last:08d}",
    ):
        trainer.run()
    assert all(tensor.isfinite().all() for tensor in trained(config.output).values())
    assert not (config.output / "head").exists()


def test_tensorboard_gets_the_accuracy_of_every_draft_step_and_the_speed(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    expected = {"validation/acceptance_length", *(f"validation/accuracy/{n}" for n in range(1, 6))}
    assert expected | {"train/loss", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


@contextlib.contextmanager
def files_that_stop_growing_after_the_second_checkpoint(
    folder: Path, _: Path
) -> Iterator[Callable[[], None]]:
    disk = contextlib.ExitStack()
    folder.mkdir()

    def save(checkpoints: Path, state: TrainingState) -> Path:
        if state.step == 3:
            disk.enter_context(full_disk(20_000))
        return save_checkpoint(checkpoints, state)

    with pytest.MonkeyPatch.context() as patch, disk:
        patch.setattr("griffin_vllm.training.loop.save_checkpoint", save)

        def make_room() -> None:
            disk.close()
            patch.undo()

        yield make_room


@contextlib.contextmanager
def disk_for_two_checkpoints(folder: Path, checkpoint: Path) -> Iterator[Callable[[], None]]:
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    with small_disk(folder, 2 * size + size // 2) as grow:
        yield lambda: grow(8 * size)


@pytest.mark.parametrize(
    "disk", [files_that_stop_growing_after_the_second_checkpoint, disk_for_two_checkpoints]
)
def test_full_disk_ends_the_run_which_goes_on_where_it_was_when_there_is_room(
    disk: Any, finished: Path, target: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = latest_checkpoint(finished / "checkpoints")
    with disk(tmp_path / "disk", checkpoint) as make_room:
        config = settings(target, data, tmp_path / "disk" / "run", checkpoint_minutes=1e-6)
        with pytest.raises(GriffinError, match=r"cannot be written .* the last good one is .*step-00000002"):
            Trainer(config).run()
        make_room()
        Trainer(config).run()
        assert_same_run(config.output, finished)


def test_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(
    finished: Path, target: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(target, data, tmp_path / "damaged", checkpoint_minutes=1e-6)
    with pytest.MonkeyPatch.context() as patch:

        def stop_at_the_fourth(folder: Path, state: TrainingState) -> Path:
            if state.step == 4:
                raise GriffinError("stop")
            return save_checkpoint(folder, state)

        patch.setattr("griffin_vllm.training.loop.save_checkpoint", stop_at_the_fourth)
        with pytest.raises(GriffinError, match="stop"):
            Trainer(config).run()
    latest = latest_checkpoint(config.output / "checkpoints")
    assert latest is not None
    weights_file = latest / "head.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    with pytest.raises(GriffinError, match=r"step-00000003: is damaged .*remove it to continue from the one"):
        Trainer(config).run()
    shutil.rmtree(latest)
    Trainer(config).run()
    assert_same_run(config.output, finished)


def test_run_in_bf16_multiplies_in_bf16_and_learns_the_same(
    finished: Path, target: Path, data: Path, tmp_path: Path
) -> None:
    # in a process of its own: accelerate keeps one precision a process
    config = settings(target, data, tmp_path / "bf16", precision="bf16")
    done = subprocess.run(
        command(config, tmp_path / "bf16.yaml"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, expected = losses(tmp_path / "bf16"), losses(finished)
    assert found == pytest.approx(expected, rel=0.05)
    assert found != pytest.approx(expected, rel=1e-6)


def test_accumulated_micro_batches_of_unequal_answers_train_like_one_batch(
    target: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"gradient_accumulation": 2, "alignment": "off", "stages": [{"draft_steps": 2}]}
    parts = Trainer(settings(target, data, tmp_path / "parts", **changes))
    # the longest answer alone, all others in the second micro-batch
    first, *others = sorted(range(len(parts.train_data)), key=lambda i: -int(parts.train_data.lengths[i]))
    step = replace(parts.plan[0], micro_batches=[[first], others])
    parts.plan = [step] * 3
    whole = Trainer(settings(target, data, tmp_path / "whole", **changes))
    whole.plan = [replace(step, micro_batches=[[first, *others]])] * 3
    found, expected = weights(parts.run()), weights(whole.run())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-2, msg=name)


def test_trainer_imports_no_vllm() -> None:
    modules = sorted(module.name for module in pkgutil.iter_modules(griffin_vllm.training.__path__))
    assert "loop" in modules
    code = (
        f"import importlib, sys; [importlib.import_module('griffin_vllm.training.' + m) for m in {modules}];"
        "sys.exit(','.join(m for m in sys.modules if m.split('.')[0] == 'vllm'"
        " or m.startswith('griffin_vllm.serving')) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
