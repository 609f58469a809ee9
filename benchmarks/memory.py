"""Memory of a process and its children over time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import psutil

MIB = 1 << 20


@dataclass
class History:
    """One process; ``samples`` are (seconds, resident MiB, proportional MiB: shared pages are split up)."""

    name: str
    samples: list[tuple[float, float, float]] = field(default_factory=list)

    def summary(self, warm_up: float) -> dict[str, Any] | None:
        """Size and growth in MiB after ``warm_up`` seconds; None for a process that did not live on.

        ``growth`` is what the fitted line rises from the first sample after the warm-up to the last.
        """
        warm = [sample for sample in self.samples if sample[0] >= warm_up]
        if len(warm) < 2:
            return None
        seconds, resident, proportional = (np.array(column) for column in zip(*warm, strict=True))
        slope = float(np.polyfit(seconds, proportional, 1)[0])
        few = max(1, len(warm) // 10)
        return {
            "process": self.name,
            "resident_mib": round(float(resident[-1]), 1),
            "proportional_mib_after_warm_up": round(median(proportional[:few].tolist()), 1),
            "proportional_mib_at_the_end": round(median(proportional[-few:].tolist()), 1),
            "slope_mib_per_hour": round(3600 * slope, 1),
            "growth_mib": round(slope * float(seconds[-1] - seconds[0]), 1),
        }


class ProcessTree:
    """A process and all of its descendants, sampled again and again."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.histories: dict[int, History] = {}

    def sample(self, seconds: float) -> None:
        """Add one sample to every process that is alive."""
        for process in self._alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.memory_full_info()
                history = self.histories.setdefault(process.pid, History(_name(process, self.root)))
                history.samples.append(
                    (round(seconds, 1), round(used.rss / MIB, 1), round(used.pss / MIB, 1))
                )

    def summaries(self, warm_up: float) -> list[dict[str, Any]]:
        """Of the processes that lived to the last sample, see `History.summary`."""
        last = max((history.samples[-1][0] for history in self.histories.values()), default=0.0)
        living = (history for history in self.histories.values() if history.samples[-1][0] == last)
        return [one for history in living if (one := history.summary(warm_up))]

    def survivors(self, seconds: float = 10.0) -> list[str]:
        """Names of the sampled processes that are still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while left := [history.name for pid, history in self.histories.items() if is_running(pid)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left

    def _alive(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield self.root
            yield from self.root.children(recursive=True)


def is_running(pid: int) -> bool:
    """False for a zombie, too: its memory is gone, and whoever adopted it may never ask for its status."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process, root: psutil.Process) -> str:
    """vLLM's title of a process (``VLLM::EngineCore``), or the program's name."""
    title = " ".join(process.cmdline()).strip()
    if process == root:
        return "API server"
    return title.split()[0] if title.startswith("VLLM::") else process.name()
