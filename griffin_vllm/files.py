"""Reading small JSON files, and writing files and folders whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from griffin_vllm.errors import GriffinError

# A config.json is a few kilobytes; reading more than this is never needed to describe a head.
MAX_CONFIG_BYTES = 1 << 20
LOCK = ".lock"


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object.

    Raises:
        GriffinError: missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        if not path.is_file():  # a device or a pipe could be read without end
            raise GriffinError(f"{path}: is missing or not a regular file")
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise GriffinError.at(path, "size", size, f"at most {MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GriffinError(f"{path}: cannot be read ({GriffinError.reason(error)})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, GriffinError):
            raise
        raise GriffinError(f"{path}: is not valid JSON ({GriffinError.reason(error)})") from error
    if not isinstance(value, dict):
        raise GriffinError.at(path, "top level", type(value).__name__, "a JSON object")
    return value


def sha256(*paths: Path) -> str:
    """Of the content of ``paths``, one after the other. Raises OSError where one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_same(where: str | Path, before: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    """Raise GriffinError for the first field of ``now`` that differs in ``before``, which was read from ``where``;
    ``remedy`` says what to do."""
    for name, value in now.items():
        if before.get(name) != value:
            raise GriffinError.at(where, name, before.get(name), f"{value!r}; {remedy}")


def write_whole(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a file so that a reader sees either the old one or the whole new one.

    ``content`` is its text, or what writes it to the path that it is given.

    Raises:
        GriffinError: it cannot be written; an old file is untouched.
    """
    unfinished = _unfinished(path)
    try:
        if isinstance(content, str):
            unfinished.write_text(content, encoding="utf-8")
        else:
            content(unfinished)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        # what stopped the writing can stop this, too
        with suppress(OSError):
            unfinished.unlink()
        raise GriffinError.unwritable(path, error) from error


def claim(file: IO[bytes], refusal: str) -> None:
    """Keep other processes from claiming the open ``file`` until it is closed.

    Raises:
        GriffinError: one has it, or has removed it since it was opened (``refusal``).
        OSError: the file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise GriffinError(refusal) from error
    if os.fstat(file.fileno()).st_nlink == 0:
        raise GriffinError(refusal)


@contextmanager
def only_process_in(folder: Path, refusal: str) -> Iterator[None]:
    """Keep other processes from the same with ``folder``, which is there, until the block ends.

    Raises:
        GriffinError: one is in it (``refusal``), or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            claim(stack.enter_context((folder / LOCK).open("ab")), f"{folder}: {refusal}")
        except OSError as error:
            raise GriffinError.unwritable(folder, error) from error
        yield


def make_folder(folder: Path) -> None:
    """Make ``folder`` unless it is there.

    Raises:
        GriffinError: it cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GriffinError.unwritable(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise GriffinError(f"{folder}: cannot be written (not allowed, or a read-only file system)")


def check_write_whole(path: Path) -> None:
    """Raise GriffinError if it can be seen already that ``write_whole`` would fail; nothing is left behind."""
    unfinished = _unfinished(path)
    try:
        if path.exists() and not path.is_file():
            kind = "Is a directory" if path.is_dir() else "Not a regular file"
            raise GriffinError(f"{path}: cannot be written ({kind})")
        unfinished.open("ab").close()
        unfinished.unlink()
    except OSError as error:
        raise GriffinError.unwritable(path, error) from error


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def exists_here(name: str) -> bool:
    """Whether ``name`` is a path on this machine; what cannot be one (it is too long, say) is not."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def may_be_replaced(folder: Path, files: Set[str] = frozenset()) -> bool:
    """Whether ``folder`` is new, or a folder with nothing in it but some of ``files`` (names).

    Raises:
        GriffinError: that cannot be found out (a name that is too long, a folder that cannot be read).
    """
    try:
        return not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= files)
    except OSError as error:
        raise GriffinError(f"{folder}: cannot be looked up ({GriffinError.reason(error)})") from error


@contextmanager
def atomic_folder(folder: Path, *, keeps: bool = False) -> Iterator[Path]:
    """A staging folder beside ``folder`` that takes its place when the block ends without an error.

    One that is there by then is replaced, or with ``keeps`` left in its place. Replacing takes two renames: whoever is
    killed between them leaves the old folder in a hidden one beside (``.NAME.old.*``).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if keeps:
            _rename_unless_there(staging, folder)
        elif folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            try:
                os.replace(folder, old / folder.name)
                os.replace(staging, folder)
            finally:
                if not folder.exists():
                    os.replace(old / folder.name, folder)
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _rename_unless_there(staging: Path, folder: Path) -> None:
    try:
        # fails on a folder that is not empty
        os.rename(staging, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(staging, ignore_errors=True)
