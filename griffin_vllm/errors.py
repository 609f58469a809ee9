"""The one exception type that users of griffin-vllm see for bad input."""

from __future__ import annotations

import reprlib
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

# A bad file can hold a megabyte in one field; the message stays one readable line.
MAX_SHOWN = 120
# Nor is all of a nested value written out first: a few lines of YAML can name more items than memory holds.
_shortly = reprlib.Repr()
_shortly.maxlevel, _shortly.maxstring, _shortly.maxother = 3, MAX_SHOWN, MAX_SHOWN


class GriffinError(ValueError):
    """Bad input, said in one line: which file, which field, what was found, what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))

    @classmethod
    def at(cls, where: str | Path, field: str, found: object, expected: str) -> GriffinError:
        """Build the usual message, for example
        ``heads/x/config.json: hidden_size is 512, expected 576 (the target's hidden size)``.
        """
        shown = _shortly.repr(found)
        if len(shown) > MAX_SHOWN:
            shown = shown[:MAX_SHOWN] + "..."
        return cls(f"{where}: {field} is {shown}, expected {expected}")

    @classmethod
    def invalid(cls, where: str | Path, found: ErrorDetails) -> GriffinError:
        """The usual message for a value that pydantic refuses (one of ``ValidationError.errors()``)."""
        expected = found["msg"].removeprefix("Input should be ")
        return cls.at(where, ".".join(map(str, found["loc"])), found.get("input"), expected)

    @classmethod
    def unwritable(cls, path: Path, error: BaseException) -> GriffinError:
        """What ``error`` kept from being written at ``path``."""
        return cls(f"{path}: cannot be written ({cls.reason(error)})")

    @staticmethod
    def reason(error: BaseException) -> str:
        """First line of another library's error (with the next one where it ends in a colon), an ``OSError``'s reason,
        or what pydantic found first, for the end of a message."""
        if isinstance(error, ValidationError):
            text = error.errors()[0]["msg"]
        else:
            text = getattr(error, "strerror", None) or str(error)
        first, *rest = text.splitlines() or [type(error).__name__]
        return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
