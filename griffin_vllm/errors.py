"""The one exception type that users of griffin-vllm see for bad input."""

from __future__ import annotations

from pathlib import Path


class GriffinError(ValueError):
    """Bad input, said in one line: which file, which field, what was found, what was expected."""

    @classmethod
    def at(cls, where: str | Path, field: str, found: object, expected: str) -> GriffinError:
        """Build the usual message, for example
        ``heads/x/config.json: hidden_size is 512, expected 576 (the target's hidden size)``.
        """
        return cls(f"{where}: {field} is {found!r}, expected {expected}")
