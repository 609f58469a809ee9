"""The plots of the report: acceptance by position, speed by method and by load, training."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.methods import method_name
from benchmarks.records import read_lines
from benchmarks.sources import ReadRecord, drafts


def plots(records: Sequence[ReadRecord], training: Sequence[Path]) -> dict[str, Figure]:
    acceptance = [row for record in records if record.kind == "acceptance" for row in _rows(record, records)]
    drafted = [row for row in acceptance if row.get("position_acceptance")]
    compared = [
        [row for row in _rows(record, records) if "speedup" in row and row["method"] != "none"]
        for record in records
        if record.kind == "speed"
    ]
    # runs of one load only would be single points, with a legend each
    by_load = [rows for rows in compared if len({row["concurrency"] for row in rows}) > 1]
    drawn = {}
    if drafted:
        drawn["acceptance-by-position"] = _by_position(drafted)
    if any(compared):
        drawn["speedup-by-method"] = _by_method(list(itertools.chain(*compared)))
    if by_load:
        drawn["speedup-by-concurrency"] = _by_concurrency(list(itertools.chain(*by_load)))
    if training:
        drawn["training"] = _training(training)
    return drawn


def _rows(record: ReadRecord, records: Sequence[ReadRecord]) -> list[dict[str, Any]]:
    """The rows of ``record``, with its name where another record is drawn into the same plot: its conditions may be
    others, and no line joins two records."""
    several = sum(one.kind == record.kind for one in records) > 1
    return [{**row, "record": record.name} if several else row for row in record.results]


def _panels(
    rows: Sequence[dict[str, Any]], y: str | None, inches: tuple[float, float]
) -> tuple[Figure, dict[str, Any]]:
    """A figure with one panel a data set; ``inches``: width beside the panels, and height."""
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    beside, height = inches
    figure = Figure(figsize=(beside + 3.5 * len(names), height), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for name, axis in zip(names, axes, strict=True):
        axis.set_title(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y)
    return figure, dict(zip(names, axes, strict=True))


def _name_lines(figure: Figure, panels: dict[str, Any]) -> None:
    """One colour and one entry of the legend for the lines of the same name in all panels."""
    drawn = {line.get_label(): line for axis in panels.values() for line in axis.get_lines()}
    names = [name for name in drawn if not name.startswith("_")]
    colours = dict(zip(names, itertools.cycle(mpl.colormaps["tab20"](range(20)))))
    for axis in panels.values():
        for line in axis.get_lines():
            line.set_color(colours.get(line.get_label(), "black"))
    figure.legend([drawn[name] for name in names], names, loc="outside right upper", fontsize="small")


def _label(row: dict[str, Any]) -> str:
    record = f", {row['record']}" if "record" in row else ""
    return f"{method_name(row, details=False)} K={drafts(row)} T={row['temperature']:g}{record}"


def _by_position(rows: Sequence[dict[str, Any]]) -> Figure:
    # as high as its legend
    height = max(3.5, 0.6 + 0.2 * len({_label(row) for row in rows}))
    figure, panels = _panels(rows, "share of passes that accept it", inches=(5.5, height))
    for row in rows:
        shares = row["position_acceptance"]
        panels[row["dataset"]].plot(range(1, len(shares) + 1), shares, marker="o", label=_label(row))
    for axis in panels.values():
        axis.set(xlabel="draft position", ylim=(0, 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
    _name_lines(figure, panels)
    return figure


def _by_method(rows: Sequence[dict[str, Any]]) -> Figure:
    least = min(row["concurrency"] for row in rows)
    alone = [row for row in rows if row["concurrency"] == least]
    # one line a run, named at the left once for all panels
    lines = list(dict.fromkeys(_label(row) for row in alone))
    figure, panels = _panels(alone, None, inches=(4, 1 + 0.22 * len(lines)))
    for name, axis in panels.items():
        own = [row for row in alone if row["dataset"] == name]
        lengths = [row["speedup"] for row in own]
        bounds = [row.get("speedup_ci", [row["speedup"]] * 2) for row in own]
        errors = [
            [max(length - low, 0) for length, (low, _) in zip(lengths, bounds, strict=True)],
            [max(high - length, 0) for length, (_, high) in zip(lengths, bounds, strict=True)],
        ]
        axis.barh([lines.index(_label(row)) for row in own], lengths, xerr=errors, capsize=2)
        axis.set_yticks(range(len(lines)), lines, fontsize="small")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel(f"speedup, {least} at a time")
    # the first run on top
    next(iter(panels.values())).invert_yaxis()
    return figure


def _by_concurrency(rows: Sequence[dict[str, Any]]) -> Figure:
    figure, panels = _panels(rows, "speedup", inches=(5.5, 3.5))
    lines: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for row in rows:
        low, high = row.get("speedup_ci", [row["speedup"]] * 2)
        point = (row["concurrency"], row["speedup"], low, high)
        lines.setdefault((row["dataset"], _label(row)), []).append(point)
    for (name, label), points in lines.items():
        loads, speedups, lows, highs = zip(*sorted(points), strict=True)
        panels[name].plot(loads, speedups, marker="o", label=label)
        panels[name].fill_between(loads, lows, highs, alpha=0.1, color="grey")
    for axis in panels.values():
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("requests at a time")
    _name_lines(figure, panels)
    return figure


def _training(runs: Sequence[Path]) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, length = figure.subplots(1, 2)
    for run in runs:
        log = read_lines(run / "log.jsonl")
        for axis, kind, field in ((loss, "train", "loss"), (length, "validation", "acceptance_length")):
            rows = [row for row in log if row["kind"] == kind]
            axis.plot([row["step"] for row in rows], [row[field] for row in rows], label=run.name)
    for axis, y in ((loss, "training loss"), (length, "acceptance length, validation")):
        axis.set(xlabel="step", ylabel=y)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def svg(figure: Figure) -> str:
    text = io.StringIO()
    # the same numbers give the same file
    with mpl.rc_context({"svg.hashsalt": "griffin", "font.size": 9}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
