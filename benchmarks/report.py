"""From the records of the benchmarks to a Markdown table, plots, and one HTML page that needs no server.

    python benchmarks/report.py acceptance.json speed.json --out report [--readme README.md] [--training RUN]

Prints the tables as Markdown and writes ``report.html`` and the plots as SVG into ``--out``. With ``--readme``
short tables (a column a data set) and the plots also replace what lies between that file's markers; with
``--headlines`` the README gets the tables of those records only, and ``--details`` names the file for all of them.
The plots are of the headlines, too. Below each table stand the machine, versions, engine settings and date of its
numbers.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.comparisons import margins, speed_margins
from benchmarks.methods import head_details, method_name
from benchmarks.options import execute
from benchmarks.plots import plots, svg
from benchmarks.round import table as phases
from benchmarks.sources import (
    CONTEXT_EDGES,
    REPETITION,
    TITLES,
    ReadRecord,
    drafts,
    is_baseline,
    read_records,
)
from benchmarks.tables import pipes, rewrite
from griffin_vllm.files import write_whole

BEGIN, END = "<!-- benchmarks: begin (written by `make bench`) -->", "<!-- benchmarks: end -->"
# column title -> what its cell shows of a row
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "data set": lambda row: f"{row['dataset']} ({row['num_prompts']})",
    "method": lambda row: method_name(row, details=False),
    "K": drafts,
    "T": lambda row: f"{row['temperature']:g}",
    "requests at a time": lambda row: str(row["concurrency"]),
    "tau": lambda row: number(row, "acceptance_length", 2),
    "tau without loops": lambda row: number(row, "acceptance_length_loop_free", 2),
    "accepted by position": lambda row: " ".join(
        f"{share:.2f}" for share in row.get("position_acceptance", [])
    ),
    "tokens/s": lambda row: number(row, "tokens_per_second", 1),
    "ms/token": lambda row: number(row, "time_per_output_token_ms", 1),
    "of requests": lambda row: " ".join(
        f"{name} {ms:.1f}" for name, ms in row.get("time_per_output_token_ms_percentiles", {}).items()
    ),
    "ms to first token": lambda row: number(row, "time_to_first_token_ms", 0),
    "speedup": lambda row: number(row, "speedup", 2, suffix=interval(row, "speedup_ci", row["num_prompts"])),
    "without loops": lambda row: number(
        row,
        "speedup_loop_free",
        2,
        suffix=interval(row, "speedup_loop_free_ci", loop_free_conversations(row)),
    ),
    "answers": lambda row: number(row, "num_answers", 0),
    "identical": lambda row: number(row, "identical", 0),
    "near-tie": lambda row: number(row, "near_tie", 0),
    "wrong": lambda row: number(row, "wrong", 0),
    "minutes": lambda row: number(row, "minutes", 0),
    "requests sent": lambda row: number(row, "sent", 0),
    "finished": lambda row: number(row, "finished", 0),
    "aborted": lambda row: number(row, "aborted", 0),
    "lost": lambda row: number(row, "lost", 0),
    "tau at first": lambda row: number(row, "acceptance_length_first", 3),
    "tau at last": lambda row: number(row, "acceptance_length_last", 3),
    "seconds to start": lambda row: number(row, "startup_seconds", 1),
    "beyond the first": lambda row: number(row, "beyond_first", 1),
    "MiB grown": lambda row: " ".join(f"{one['growth_mib']:+.0f}" for one in row["memory"]),
}
SHOWN = {
    "acceptance": "data set, method, K, T, tau, tau without loops, accepted by position",
    "speed": "data set, method, K, T, requests at a time, tau, tokens/s, ms/token, of requests, "
    "ms to first token, speedup, without loops",
    "losslessness": "data set, method, K, requests at a time, answers, identical, near-tie, wrong",
    "soak": "method, K, minutes, requests sent, finished, aborted, lost, answers, identical, near-tie, wrong, "
    "tau at first, tau at last, MiB grown",
    "startup": "method, K, seconds to start, beyond the first",
}
# The README has one line a run and one column a data set: what names the run, what a cell holds, and how.
OVERVIEW: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "acceptance": (
        "method, K, T",
        "tau (without loops)",
        lambda row: f"{COLUMNS['tau'](row)} ({COLUMNS['tau without loops'](row) or '-'})",
    ),
    "speed": (
        "method, K, T, requests at a time",
        "speed in units of plain decoding [95 % interval] (without answers that loop, where some do)",
        lambda row: (
            COLUMNS["speedup"](row)
            + (f" ({COLUMNS['without loops'](row)})" if _some_loop(row) else "")
            + (
                f", {COLUMNS['ms/token'](row)} ms a token"
                if is_baseline(row) and COLUMNS["ms/token"](row)
                else ""
            )
        ),
    ),
}
# field of a row -> title of the column of each of its groups
BREAKDOWN: dict[str, Callable[[str], str]] = {
    "acceptance_length_by_turn": lambda group: f"turn {group}",
    "acceptance_length_by_context": lambda group: (
        f"context < {group}" if int(group) <= CONTEXT_EDGES[-1] else "longer context"
    ),
    "acceptance_length_by_repetition": lambda group: group,
}
BREAKDOWN_TITLE = (
    "tau by turn, by tokens in the context, and by how repetitive the answer is (share of distinct 4-grams; "
    + ", ".join(f"{name}: below {below:g}" if below <= 1 else f"{name}: above" for below, name in REPETITION)
    + ")"
)
# From fewer conversations draws with replacement say little more than their range.
FEWEST_DRAWN = 5
STYLE = """body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}th,td{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:left}
svg{max-width:100%;height:auto}.conditions{color:#555;font-size:13px}"""


def number(row: dict[str, Any], field: str, digits: int, suffix: str = "") -> str:
    value = row.get(field)
    return "" if value is None else f"{value:.{digits}f}{suffix}"


def interval(row: dict[str, Any], field: str, conversations: int) -> str:
    return " [{:.2f}, {:.2f}]".format(*row[field]) if field in row and conversations >= FEWEST_DRAWN else ""


def _some_loop(row: dict[str, Any]) -> bool:
    """Whether the speed without answers that loop is another one."""
    return "speedup_loop_free" in row and any(row["samples"]["loops"])


def loop_free_conversations(row: dict[str, Any]) -> int:
    return row.get("samples", {}).get("loops", []).count(False)


def conditions(record: ReadRecord) -> str:
    """One line with everything that a number of this record depends on."""
    settings = record.settings
    machine, engine = settings["machine"], settings.get("engine", {})
    repeats = [row["repeats"] for row in record.results if "repeats" in row] or [settings.get("repeats")]
    preloaded = settings["environment"].get("LD_PRELOAD")
    prompts = ", ".join(f"{name} ({one['conversations']})" for name, one in settings["prompts"].items())
    parts = [
        settings["date"][:10],
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"load before {machine['load_average_before'][0]}",
        ", ".join(f"{name} {version}" for name, version in settings["versions"].items()),
        f"target {settings['target']}",
        *(
            f"head {name} ({', '.join([digest, *asked_of(name, record.results)])})"
            for name, digest in settings.get("heads", {}).items()
        ),
        f"{engine['dtype']}, compilation {engine['compilation']}" if engine else "",
        f"{engine['threads']} threads" if "threads" in engine else "",
        *(
            f"engine of {label} differs: "
            + ", ".join(f"{name} {value}" for name, value in differences.items())
            for label, differences in settings.get("engine_differences", {}).items()
        ),
        f"at most {settings['max_tokens']} tokens an answer" if prompts else "",
        f"prompts {prompts}" if prompts else "",
        f"preloaded {preloaded}" if preloaded else "nothing preloaded",
        f"{min(repeats)} repeats" if repeats != [None] else "",
        "" if settings.get("finished", True) else "unfinished",
        f"failed: {', '.join(one['run'] for one in record.failures)}" if record.failures else "",
        f"served, asked by {settings['client']}" if "client" in settings else "",
        f"host overhead of a plain step {settings['host_overhead_share']:.0%}"
        if "host_overhead_share" in settings
        else "",
    ]
    return "; ".join(part for part in parts if part)


def asked_of(head: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was asked of a head in a record's rows, each kind of drafting for itself where they differ."""
    kinds: dict[str, str] = {}
    for row in rows:
        if row.get("head") == head:
            name = f"{row['method']} {drafts(row)}" if "schedule" in row else row["method"]
            kinds.setdefault(", ".join(head_details(row)), name)
    if len(kinds) == 1:
        return [kind for kind in kinds if kind]
    return [f"{name}: {kind or 'to the end'}" for kind, name in kinds.items()]


def cells(record: ReadRecord) -> list[list[str]]:
    if record.kind == "round":
        return phases(record.results)
    titles = SHOWN[record.kind].split(", ")
    return [titles, *([COLUMNS[title](row) for title in titles] for row in record.results)]


def _speed_title(record: ReadRecord) -> str:
    which = "each at its own best K, " if any(row.get("best_k") for row in record.results) else ""
    return f"Speed against the others, {which}over all data sets, with 95 % intervals"


def breakdown(record: ReadRecord) -> list[list[str]]:
    """Acceptance lengths of each row's groups, as table cells; empty where the record has none."""
    rows = [row for row in record.results if row["method"] != "none" and BREAKDOWN.keys() & row.keys()]
    groups = [
        (field, group)
        for field in BREAKDOWN
        for group in sorted(
            {group for row in rows for group in row.get(field, ())},
            # numbers by size, words by name
            key=lambda group: (int(group) if group.isdigit() else 0, group),
        )
    ]
    naming = ("data set", "method", "K", "T")
    header = [*naming, *(BREAKDOWN[field](group) for field, group in groups)]
    lines = [
        [*(COLUMNS[title](row) for title in naming)]
        + [number(row.get(field, {}), group, 2) for field, group in groups]
        for row in rows
    ]
    return [header, *lines] if lines else []


def details(record: ReadRecord) -> list[tuple[str, list[list[str]]]]:
    """Title and cells of the tables below a record's own, those that it has something for."""
    tables = [
        (BREAKDOWN_TITLE, breakdown(record)),
        ("Acceptance length against the others, with 95 % intervals", margins(record)),
        (_speed_title(record), speed_margins(record)),
    ]
    return [(title, table) for title, table in tables if table]


def markdown(record: ReadRecord) -> str:
    parts = [f"**{TITLES[record.kind]}**", pipes(cells(record))]
    for title, table in details(record):
        parts += [f"{title}:", pipes(table)]
    return "\n\n".join([*parts, f"{conditions(record)}.\n"])


def overview(record: ReadRecord) -> str:
    """A record's short table, as Markdown."""
    if record.kind not in OVERVIEW:
        return markdown(record)
    naming, content, cell = OVERVIEW[record.kind]
    titles = naming.split(", ")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in record.results:
        run, dataset = tuple(COLUMNS[title](row) for title in titles), COLUMNS["data set"](row)
        while dataset in lines.get(run, {}):
            run = (f"{run[0]} (again)", *run[1:])
        lines.setdefault(run, {})[dataset] = cell(row)
    datasets = list(dict.fromkeys(name for line in lines.values() for name in line))
    body = [[*names, *(line.get(name, "") for name in datasets)] for names, line in lines.items()]
    parts = [f"**{TITLES[record.kind]}**: {content}", pipes([[*titles, *datasets], *body])]
    header, *compared = margins(record) or [[]]
    if pooled := [line for line in compared if line[0] == "all"]:
        parts += ["Over all data sets, with 95 % intervals:", pipes([header, *pooled])]
    header, *compared = speed_margins(record) or [[]]
    if len(datasets) == 1:
        # the table above has them
        compared = [line for line in compared if line[1] != "none"]
    if compared:
        parts += [f"{_speed_title(record)}:", pipes([header, *compared])]
    return "\n\n".join([*parts, f"{conditions(record)}.\n"])


def page(records: Sequence[ReadRecord], drawings: dict[str, str]) -> str:
    body = [f"<h1>griffin-vllm: benchmarks</h1>\n<style>{STYLE}</style>"]
    for drawing in drawings.values():
        body.append(drawing[drawing.index("<svg") :])
    for record in records:
        body.append(f"<h2>{TITLES[record.kind]}</h2>\n{_html_table(cells(record))}")
        for title, table in details(record):
            body.append(f"<p>{html.escape(title)}:</p>\n{_html_table(table)}")
        body.append(f'<p class="conditions">{html.escape(conditions(record))}</p>')
    opening = "<!doctype html><meta charset=utf-8><title>griffin-vllm benchmarks</title>"
    return "\n".join([opening, *body]) + "\n"


def _html_table(table: list[list[str]]) -> str:
    header, *lines = table
    rows = [f"<tr>{''.join(f'<th>{html.escape(title)}</th>' for title in header)}</tr>"]
    rows += [f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in line)}</tr>" for line in lines]
    return f"<table>{''.join(rows)}</table>"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html and the plots")
    parser.add_argument("--readme", type=Path, help="rewrite this file between its markers")
    parser.add_argument(
        "--headlines",
        type=Path,
        nargs="+",
        metavar="RECORD.json",
        help="the records that --readme and the plots show (default: all)",
    )
    parser.add_argument("--details", type=Path, help="rewrite this file, too, with all records")
    parser.add_argument(
        "--training", type=Path, nargs="*", default=[], metavar="RUN", help="training folders"
    )
    args = parser.parse_args(argv)
    records = read_records(args.records)
    headlines = records if args.headlines is None else read_records(args.headlines)
    args.out.mkdir(parents=True, exist_ok=True)
    drawings = {name: svg(figure) for name, figure in plots(headlines, args.training).items()}
    for name, drawing in drawings.items():
        write_whole(args.out / f"{name}.svg", drawing)
    write_whole(args.out / "report.html", page(records, drawings))
    print("\n".join(map(markdown, records)))
    for path, shown in ((args.readme, headlines), (args.details, records)):
        if path:
            folder = Path(os.path.relpath(args.out, path.parent))
            images = [
                f"![{name.replace('-', ' ')}]({(folder / f'{name}.svg').as_posix()})\n" for name in drawings
            ]
            rewrite(path, BEGIN, END, "\n".join([*map(overview, shown), *images]))
    return 0


if __name__ == "__main__":
    execute(main)
