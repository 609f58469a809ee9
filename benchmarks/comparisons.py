"""GRIFFIN against the other methods of a record: ratios of acceptance lengths and of speeds, as table cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.intervals import ratio_interval, speedup
from benchmarks.methods import Method, method_name
from benchmarks.sources import ReadRecord, drafts, is_baseline

MARGINS = ["data set", "method", "against", "K", "T", "ratio of tau"]
SPEED_MARGINS = ["method", "against", "T", "requests at a time", "ratio of speeds", "without loops"]


class Contender(NamedTuple):
    """What tells the methods of one record apart: ``head`` as the record names it, ``shown`` as the tables do."""

    method: str
    head: str | None
    draft_sample_method: str | None
    shown: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> Contender:
        shown = method_name(row, details=False) + (f" {drafts(row)}" if "schedule" in row else "")
        return cls(row["method"], row.get("head"), row.get("draft_sample_method"), shown)

    @property
    def is_griffin(self) -> bool:
        return Method(self.method).is_griffin


class Group(NamedTuple):
    """What two rows that are compared have in common; ``k`` is None where each side has its own."""

    k: int | None
    temperature: float
    concurrency: int


# One row a data set.
ByDataset = dict[str, dict[str, Any]]


def grouped(rows: Iterable[dict[str, Any]], *, same_k: bool) -> dict[Group, dict[Contender, ByDataset]]:
    """The rows of each group, contender by contender."""
    groups: dict[Group, dict[Contender, ByDataset]] = {}
    for row in rows:
        k = row["num_speculative_tokens"] if same_k else None
        contenders = groups.setdefault(Group(k, row["temperature"], row["concurrency"]), {})
        contenders.setdefault(Contender.of(row), {})[row["dataset"]] = row
    return groups


def margins(record: ReadRecord) -> list[list[str]]:
    """GRIFFIN's acceptance length over every other speculator's at the same K, temperature and way of sampling
    drafts (ngram has none), data set by data set and over all of them, as table cells; empty where there is
    nothing to compare."""
    rows = [*record.results, *record.baselines]
    drafted = [row for row in rows if row["method"] != "none" and row.get("conversations")]
    lines = []
    for group, contenders in grouped(drafted, same_k=True).items():
        griffins = [one for one in contenders if one.is_griffin]
        others = [one for one in contenders if not one.is_griffin]
        for ours, theirs in itertools.product(griffins, others):
            if theirs.draft_sample_method not in (None, ours.draft_sample_method):
                continue
            our_counts, their_counts = counts(contenders[ours]), counts(contenders[theirs])
            for dataset in our_counts.keys() & their_counts.keys():
                ratio, (low, high) = ratio_interval(our_counts[dataset], their_counts[dataset])
                margin = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
                lines.append(
                    [dataset, ours.shown, theirs.shown, str(group.k), f"{group.temperature:g}", margin]
                )
    return [MARGINS, *sorted(lines)] if lines else []


def counts(rows: ByDataset) -> dict[str, dict[str, list[int]]]:
    """(tokens, passes) by conversation, for each data set and for ``all`` of them."""
    everything = {
        f"{dataset}/{name}": tokens_and_passes
        for dataset, row in rows.items()
        for name, tokens_and_passes in row["conversations"].items()
    }
    return {dataset: row["conversations"] for dataset, row in rows.items()} | {"all": everything}


def speed_margins(record: ReadRecord) -> list[list[str]]:
    """GRIFFIN's decoding speed over every other speculator's and plain decoding's, each at its own best K (or the only
    one of the record) and over all data sets, as table cells; empty where there is nothing to compare."""
    lines = []
    for group, contenders in grouped(at_best_k(record.results), same_k=False).items():
        for ours, theirs in pairs(list(contenders)):
            both = sorted(contenders[ours].keys() & contenders[theirs].keys())
            our_rows = [contenders[ours][dataset] for dataset in both]
            their_rows = [contenders[theirs][dataset] for dataset in both]
            ratio = speed_ratio(our_rows, their_rows)
            if not ratio:
                continue
            # which answers loop is the target's affair at temperature 0 only
            loop_free = speed_ratio(our_rows, their_rows, loop_free=True) if group.temperature == 0 else ""
            names = [with_k(ours, our_rows[0]), with_k(theirs, their_rows[0])]
            lines.append([*names, f"{group.temperature:g}", str(group.concurrency), ratio, loop_free])
    return [SPEED_MARGINS, *lines] if lines else []


def at_best_k(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with samples of plain decoding, once, and of each contender at its best K or the only one that it
    has."""
    ks: dict[Contender, set[int]] = {}
    for row in rows:
        ks.setdefault(Contender.of(row), set()).add(row["num_speculative_tokens"])
    has_choice = {contender for contender, tried in ks.items() if len(tried) > 1}
    has_choice |= {Contender.of(row) for row in rows if row.get("best_k")}
    return [
        row
        for row in rows
        if "samples" in row
        and (row["method"] != "none" or is_baseline(row))
        and (row.get("best_k") or Contender.of(row) not in has_choice)
    ]


def pairs(contenders: Sequence[Contender]) -> Iterator[tuple[Contender, Contender]]:
    """Every GRIFFIN head with every other method, and with those GRIFFIN heads that stand before it."""
    griffins = [one for one in contenders if one.is_griffin]
    for i, ours in enumerate(griffins):
        for theirs in [*(one for one in contenders if not one.is_griffin), *griffins[:i]]:
            yield ours, theirs


def with_k(contender: Contender, row: dict[str, Any]) -> str:
    if contender.method == "none" or "schedule" in row:
        return contender.shown
    return f"{contender.shown} K={row['num_speculative_tokens']}"


def speed_ratio(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], *, loop_free: bool = False
) -> str:
    """Ratio of speeds and its interval, over all of two runs' rows, one a data set and the same ones; empty where
    nothing is measured of both."""
    if not ours:
        return ""
    compared = speedup(pooled_samples(ours), pooled_samples(theirs), loop_free=loop_free)
    return "{:.2f} [{:.2f}, {:.2f}]".format(compared[0], *compared[1]) if compared else ""


def pooled_samples(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ``samples`` of one run's rows, a data set each and in one order for all runs, as those of one."""
    sides = [row["samples"] for row in rows]
    repeats = sorted(set.intersection(*(set(side["repeats"]) for side in sides)))

    def side_by_side(field: str) -> list[list[float]]:
        return [
            [number for side in sides for number in side[field][side["repeats"].index(repeat)]]
            for repeat in repeats
        ]

    return {
        "repeats": repeats,
        "loops": [loops for side in sides for loops in side.get("loops", [])],
        "tokens": side_by_side("tokens"),
        "seconds": side_by_side("seconds"),
    }
