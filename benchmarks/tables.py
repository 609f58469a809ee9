"""Tables of result rows on the terminal, and Markdown tables in the documents."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from griffin_vllm.errors import GriffinError
from griffin_vllm.files import write_whole


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    # a pipe is not a narrow terminal
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, list):
        return " ".join(cell(item) for item in value)
    return str(value)


def pipes(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its header."""
    header, *body = table
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])


def rewrite(readme: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between two lines of ``readme``."""
    whole = readme.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise GriffinError(f"{readme}: needs the lines {begin!r} and {end!r}, once each")
    before, after = whole[: whole.index(begin)], whole[whole.index(end) :]
    write_whole(readme, f"{before}{begin}\n\n{text}\n{after}")
