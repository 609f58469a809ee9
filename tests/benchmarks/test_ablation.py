"""Each variant trains what its name says, and the record tells them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from benchmarks import ablation
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.loop import Trainer
from tests.training import tiny


def test_leaky_softmax_adds_one_to_the_denominator_for_each_position_that_is_not_visible() -> None:
    torch.manual_seed(0)
    T, D = 5, 4
    q, k0, k1, v0, v1 = torch.randn(5, 1, 1, T, D, dtype=torch.double)
    leaky = ablation.LeakySoftmax()
    leaky.leaks = True
    found = leaky(q, [k0, k1], [v0, v1])
    for t in range(T):
        # the newest stream at t, the target's features before it
        keys = torch.cat([k0[0, 0, :t], k1[0, 0, t : t + 1]])
        values = torch.cat([v0[0, 0, :t], v1[0, 0, t : t + 1]])
        weights = (keys @ q[0, 0, t] / D**0.5).exp()
        expected = weights @ values / (weights.sum() + T - 1 - t)
        torch.testing.assert_close(found[0, 0, t], expected)


def test_renormalised_targets_sum_to_one_over_the_draft_vocabulary_where_it_has_any_of_them(
    tmp_path: Path,
) -> None:
    target = tiny.write_target(tmp_path / "target")
    data = tiny.write_data(tmp_path / "data", target, answer_tokens=12)
    settings = tiny.settings(target, data, tmp_path / "out", draft_vocab=40)
    kept, scaled = (
        kind(settings)._batch([0, 1, 2, 3], seed=0).soft.probabilities.sum(-1)
        for kind in (Trainer, ablation.RenormalisedTrainer)
    )
    assert kept.max() < 0.99
    torch.testing.assert_close(scaled, (kept > 0).float())


def test_every_variant_trains_and_a_second_call_trains_nothing(tmp_path: Path) -> None:
    target = tiny.write_target(tmp_path / "target")
    data = tiny.write_data(tmp_path / "data", target, answer_tokens=12)
    config = tmp_path / "ablation.yaml"
    settings = {
        "target": str(target),
        "data": str(data),
        "precision": "fp32",
        "batch_tokens": 256,
        "stages": [{"draft_steps": 2, "epochs": 1}],
    }
    config.write_text(yaml.safe_dump(settings))
    command = [
        str(config),
        "--out",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "out.json"),
        "--seeds",
        "1",
    ]
    app = ablation.typer.Typer()
    app.command()(ablation.main)
    first = CliRunner().invoke(app, command, catch_exceptions=False)
    assert first.exit_code == 0
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [one["variant"] for one in runs] == list(ablation.VARIANTS)
    weights = {
        path.parent.parent.name: path.read_bytes()
        for path in (tmp_path / "runs").glob("*/head/model.safetensors")
    }
    assert len(set(weights.values())) == len(ablation.VARIANTS)
    written = [
        path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").glob("*/head/model.safetensors"))
    ]
    CliRunner().invoke(app, command, catch_exceptions=False)
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").glob("*/head/model.safetensors"))]
    assert again == written


def test_a_record_of_other_data_is_not_gone_on_with_and_data_without_validation_are_refused(
    tmp_path: Path,
) -> None:
    target = tiny.write_target(tmp_path / "target")
    config = tmp_path / "ablation.yaml"
    records: list[dict[str, Any]] = []
    for name, tokens in (("one", 12), ("two", 13)):
        data = tiny.write_data(tmp_path / name, target, answer_tokens=tokens)
        config.write_text(yaml.safe_dump({"target": str(target), "data": str(data)}))
        records.append(ablation.settings_of(config))
    (tmp_path / "out.json").write_text(json.dumps({"settings": records[0], "runs": []}))
    assert ablation.recorded(tmp_path / "out.json", records[0]) == {}
    with pytest.raises(GriffinError, match=r"inputs is .*; name another --json"):
        ablation.recorded(tmp_path / "out.json", records[1])
    data = tiny.write_data(tmp_path / "three", target, answer_tokens=12, validation_share=0.0)
    config.write_text(yaml.safe_dump({"target": str(target), "data": str(data)}))
    with pytest.raises(GriffinError, match="validation samples is 0, expected 1 or more"):
        ablation.settings_of(config)


@pytest.mark.parametrize(
    ("changes", "variants", "message"),
    [
        ({"method": "hass"}, "griffin", "method is 'hass', expected 'griffin', which variants change"),
        ({"alignment": "off"}, "griffin", "alignment is 'off', expected None, which variants change"),
        ({"draft_vocab": 8}, "griffin,eagle-mask", "draft_vocab"),
    ],
)
def test_settings_that_would_make_a_variant_another_one_are_refused_before_anything_trains(
    changes: dict[str, Any], variants: str, message: str, tmp_path: Path
) -> None:
    target = tiny.write_target(tmp_path / "target")
    data = tiny.write_data(tmp_path / "data", target, answer_tokens=12)
    config = tmp_path / "ablation.yaml"
    config.write_text(yaml.safe_dump({"target": str(target), "data": str(data), **changes}))
    with pytest.raises(GriffinError, match=message):
        ablation.main(config, tmp_path / "runs", tmp_path / "out.json", variants=variants, seeds="1")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": "griffin,eagel-mask"}, "unknown variant 'eagel-mask'; did you mean eagle-mask?"),
        ({"variants": "medusa"}, "unknown variant 'medusa'; there are griffin, griffin-no-mask"),
        ({"variants": ""}, "unknown variant ''; there are"),
        ({"seeds": "1,two"}, "--seeds is '1,two', expected whole numbers"),
    ],
)
def test_a_bad_choice_is_refused_before_anything_trains(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    arguments = {"variants": "griffin", "seeds": "1", **changes}
    with pytest.raises(GriffinError) as refusal:
        ablation.main(tmp_path / "none.yaml", tmp_path / "runs", tmp_path / "out.json", **arguments)
    assert message in str(refusal.value)
