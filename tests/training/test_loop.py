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
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import griffin_vllm.training
from griffin_vllm.checkpoint import open_head
from griffin_vllm.config import HeadConfig
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.checkpoints import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from griffin_vllm.training.config import TrainConfig, describe_settings
from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.export import model_card
from griffin_vllm.training.loop import Trainer, learning_rate, plan_steps
from griffin_vllm.training.run_folder import claim_output, with_precision
from griffin_vllm.training.run_log import RunLog
from tests.full_disk import full_disk, small_disk
from tests.training.tiny import write_data

BASE = {
    "stages": [{"draft_steps": 1, "epochs": 2, "k_weight": 0.0}, {"draft_steps": 2, "epochs": 2}],
    "batch_tokens": 256,
    "learning_rate": 1e-3,
    "soft_target_tokens": 16,
    "precision": "fp32",
    "validation_samples": 2,
}


HEAD = HeadConfig(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=9,
    draft_vocab_size=9,
)


def settings(target: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    values = {**BASE, "target": str(target), "data": str(data), "output": str(output), **changes}
    return TrainConfig.check(values, Path("settings.yaml"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def trained(output: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of the last checkpoint."""
    latest = latest_checkpoint(output / "checkpoints")
    assert latest is not None
    return load_checkpoint(latest).weights


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("method", ["griffin", "hass"])
def test_finished_run_leaves_a_head_that_can_be_served(
    method: str, target: Path, data: Path, tmp_path: Path
) -> None:
    folder = Trainer(settings(target, data, tmp_path / "run", method=method)).run()
    card = (folder / "README.md").read_text()
    assert f"{method.upper()} draft head" in card
    assert "simulated acceptance length" in card
    manifest = TokenDataset(data, "train").manifest
    counts, last = manifest.splits["train"], losses(tmp_path / "run")[-1]
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


def test_card_of_a_long_run_shows_a_few_points_of_its_curves_up_to_the_last(data: Path) -> None:
    log: list[dict[str, Any]] = []
    for step in range(10, 1010, 10):
        log.append({"kind": "train", "step": step, "loss": 1000 / step})
        log.append({"kind": "validation", "step": step, "acceptance_length": 2.0, "accuracy": [0.5, 0.25]})
    config = settings(Path("target"), data, Path("o"))
    card = model_card(HEAD, config, TokenDataset(data, "train").manifest, log, None, 0)
    rows = card.split("accuracy by draft step |\n")[1].splitlines()[1:]
    assert 8 < len(rows) <= 16
    assert rows[-1] == "| 1000 | 1.000 | 2.000 | 0.500, 0.250 |"
    assert "simulated acceptance length" not in card


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


def test_overfitting_a_handful_of_conversations_accepts_all_five_drafts(target: Path, tmp_path: Path) -> None:
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
            alignment="off",
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
    target: Path, data: Path, tmp_path: Path
) -> None:
    runs = {"loop": None, "disk": str(tmp_path / "features")}
    for name, features in runs.items():
        Trainer(settings(target, data, tmp_path / name, features=features)).run()
    found, expected = (losses(tmp_path / name) for name in ("disk", "loop"))
    assert len(expected) >= 2
    # features on disk are in bf16
    assert found == pytest.approx(expected, rel=1e-2)


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
    expected = weights(whole.run())
    found = weights(interrupted.output / "head")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


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


def test_two_gloo_processes_have_the_loss_curve_of_one(target: Path, data: Path, tmp_path: Path) -> None:
    # noise, sampled classes and padding are those of the whole batch, whichever process has which sample
    changes = {
        "stages": [{"draft_steps": 2, "epochs": 5}],
        "noise": 0.2,
        "soft_target_tokens": 2,
        "sampled_tokens": 20,
    }
    Trainer(settings(target, data, tmp_path / "one", **changes)).run()
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    # accelerate starts several processes without MPI for GPUs alone, unless it is told so by the environment
    arguments = command(
        settings(target, data, tmp_path / "two", **changes),
        tmp_path / "two.yaml",
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
        str(tmp_path / "two.py"),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(expected) >= 2
    assert found == pytest.approx(expected, rel=1e-3)
    of_two, of_one = (trained(tmp_path / name) for name in ("two", "one"))
    for name, tensor in of_one.items():
        torch.testing.assert_close(of_two[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


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


def test_log_that_ends_in_half_a_line_is_read_without_it(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, writes=True)
    log.write("train", 1, {"loss": 1.0})
    log.write("train", 2, {"loss": 0.5})
    whole = log.path.read_text()
    log.path.write_text(whole + '{"kind": "train", "st')
    assert [row["step"] for row in RunLog(tmp_path, 2, writes=True).rows()] == [1, 2]
    assert log.path.read_text() == whole
    assert [row["step"] for row in RunLog(tmp_path, 1, writes=True).rows()] == [1]


def test_tensorboard_gets_the_accuracy_of_every_draft_step_and_the_speed(
    target: Path, data: Path, tmp_path: Path
) -> None:
    Trainer(settings(target, data, tmp_path)).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = {"validation/acceptance_length", *(f"validation/accuracy/{n}" for n in range(1, 6))}
    assert expected | {"train/loss", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


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
    claim_output(config)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    del before["noise"]
    for stage in before["stages"]:
        del stage["learning_rate"]
    path.write_text(json.dumps(before))
    claim_output(config)
    with pytest.raises(GriffinError, match=r"config\.json: noise is 0\.2, expected 0\.5; name another"):
        claim_output(config.model_copy(update={"noise": 0.5}))


def test_full_disk_ends_the_run_which_goes_on_where_it_was_when_there_is_room(
    target: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"checkpoint_minutes": 1e-6}
    config = settings(target, data, tmp_path / "full", **changes)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as disk:

        def fill_up_after_the_second(folder: Path, state: TrainingState) -> Path:
            if state.step == 3:
                disk.enter_context(full_disk(20_000))
            return save_checkpoint(folder, state)

        patch.setattr("griffin_vllm.training.loop.save_checkpoint", fill_up_after_the_second)
        with pytest.raises(GriffinError, match=r"cannot be written .* the last good one is .*step-00000002"):
            Trainer(config).run()
    found = weights(Trainer(config).run())
    expected = weights(Trainer(settings(target, data, tmp_path / "whole", **changes)).run())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_disk_that_is_really_full_ends_the_run_which_goes_on_when_there_is_room(
    target: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"checkpoint_minutes": 1e-6}
    whole = Trainer(settings(target, data, tmp_path / "whole", **changes)).run()
    checkpoint = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert checkpoint is not None
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    with small_disk(tmp_path / "disk", 2 * size + size // 2) as grow:
        config = settings(target, data, tmp_path / "disk" / "run", **changes)
        with pytest.raises(GriffinError, match=r"cannot be written .* the last good one is .*step-00000002"):
            Trainer(config).run()
        grow(8 * size)
        found = weights(Trainer(config).run())
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(whole).items())


def test_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(
    target: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"checkpoint_minutes": 1e-6}
    config = settings(target, data, tmp_path / "damaged", **changes)
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
    found = weights(Trainer(config).run())
    expected = weights(Trainer(settings(target, data, tmp_path / "whole", **changes)).run())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_output_of_another_run_is_refused(target: Path, data: Path, tmp_path: Path) -> None:
    Trainer(settings(target, data, tmp_path / "run"))
    with pytest.raises(GriffinError, match="seed is 0, expected 1"):
        Trainer(settings(target, data, tmp_path / "run", seed=1))


def test_run_does_not_go_on_with_other_data_at_the_same_place(target: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = settings(target, write_data(data, target), tmp_path / "run")
    claim_output(config)
    claim_output(config)
    shutil.rmtree(data)
    write_data(data, target, conversations=5)
    with pytest.raises(GriffinError, match=r"inputs\.json: data is .*; name another output folder"):
        claim_output(config)


def test_run_does_not_go_on_with_another_head_of_the_same_name(
    target: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(target, data, tmp_path / "run")
    heads = [
        open_head(Trainer(settings(target, data, tmp_path / str(seed), seed=seed)).run()) for seed in (0, 1)
    ]
    claim_output(config, heads[0])
    with pytest.raises(GriffinError, match=r"inputs\.json: init_from is "):
        claim_output(config, heads[1])


@pytest.mark.parametrize("native", [True, False])
def test_products_are_in_bf16_only_where_the_device_does_not_emulate_it(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr("griffin_vllm.training.run_folder.multiplies_bf16", lambda device: native)
    here = Path()
    found = {
        asked: with_precision(settings(here, here, here, precision=asked), torch.device("cpu")).precision
        for asked in ("auto", "bf16", "fp32")
    }
    assert found == {"auto": "bf16" if native else "fp32", "bf16": "bf16", "fp32": "fp32"}


def test_run_in_bf16_multiplies_in_bf16_and_learns_the_same(target: Path, data: Path, tmp_path: Path) -> None:
    Trainer(settings(target, data, tmp_path / "fp32")).run()
    # in a process of its own: accelerate keeps one precision a process
    config = settings(target, data, tmp_path / "bf16", precision="bf16")
    done = subprocess.run(
        command(config, tmp_path / "bf16.yaml"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, expected = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert found == pytest.approx(expected, rel=0.05)
    assert found != pytest.approx(expected, rel=1e-6)


def test_run_goes_on_in_its_precision_on_a_machine_of_the_other_kind(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(Path("t"), data, tmp_path / "run", precision="auto")
    for native in (True, False):
        monkeypatch.setattr("griffin_vllm.training.run_folder.multiplies_bf16", lambda device, n=native: n)
        found = with_precision(config, torch.device("cpu"))
        assert found.precision == "bf16"
        claim_output(found)


def test_learning_rate_warms_up_and_anneals_to_zero() -> None:
    config = settings(Path("t"), Path("d"), Path("o"), warmup=0.1)
    rates = [learning_rate(config, config.learning_rate, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(config.learning_rate / 10)
    assert max(rates) == pytest.approx(config.learning_rate)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01 * config.learning_rate


def test_stage_with_a_rate_of_its_own_warms_up_and_anneals_by_itself(data: Path) -> None:
    peaks = {1: 5e-5, 2: 3e-5}
    stages = [{"draft_steps": n, "epochs": 10, "learning_rate": peak} for n, peak in peaks.items()]
    config = settings(Path("t"), data, Path("o"), stages=stages, warmup=0.1)
    plan = plan_steps(TokenDataset(data, "train"), config)
    for n, peak in peaks.items():
        rates = [step.learning_rate for step in plan if step.stage.draft_steps == n]
        assert rates == [learning_rate(config, peak, i, len(rates)) for i in range(len(rates))]
        assert max(rates) == pytest.approx(peak)


def test_stages_without_a_rate_share_one_schedule(data: Path) -> None:
    config = settings(Path("t"), data, Path("o"))
    rates = [step.learning_rate for step in plan_steps(TokenDataset(data, "train"), config)]
    assert rates == [learning_rate(config, config.learning_rate, i, len(rates)) for i in range(len(rates))]


def test_gradient_accumulation_splits_a_batch_of_the_same_size(
    target: Path, data: Path, tmp_path: Path
) -> None:
    trainer = Trainer(settings(target, data, tmp_path / "run", gradient_accumulation=2))
    step = plan_steps(trainer.train_data, trainer.config)[0]
    assert len(step.micro_batches) == 2
    assert sum(int(trainer.train_data.lengths[i]) for part in step.micro_batches for i in part) <= 256


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


def test_help_lists_every_setting_with_its_meaning() -> None:
    shown = describe_settings()
    names = {name for name, _, _ in shown}
    assert {f"--{name}" for name in TrainConfig.model_fields} <= names
    assert {"--stages.N.draft_steps", "--stages.N.learning_rate"} <= names
    assert all(meaning for _, _, meaning in shown)


def test_trainer_imports_no_vllm() -> None:
    modules = sorted(module.name for module in pkgutil.iter_modules(griffin_vllm.training.__path__))
    assert "loop" in modules
    code = (
        f"import importlib, sys; [importlib.import_module('griffin_vllm.training.' + m) for m in {modules}];"
        "sys.exit(','.join(m for m in sys.modules if m.split('.')[0] == 'vllm'"
        " or m.startswith('griffin_vllm.serving')) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
