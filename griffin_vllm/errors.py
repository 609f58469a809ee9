"""The one exception type that users of griffin-vllm see for bad input."""

from __future__ import annotations

from pathlib import Path

# A bad file can hold a megabyte in one field; the message stays one readable line.
MAX_SHOWN = 120


class GriffinError(ValueError):
    """Bad input, said in one line: which file, which field, what was found, what was expected."""

    @classmethod
    def at(cls, where: str | Path, field: str, found: object, expected: str) -> GriffinError:
        """Build the usual message, for example
        ``heads/x/config.json: hidden_size is 512, expected 576 (the target's hidden size)``.
        """
        shown = repr(found)
        if len(shown) > MAX_SHOWN:
            shown = shown[:MAX_SHOWN] + "..."
        return cls(f"{where}: {field} is {shown}, expected {expected}")

    @staticmethod
    def reason(error: BaseException) -> str:
        """First line of another library's error, for the end of a message."""
        return (str(error).splitlines() or [type(error).__name__])[0]
