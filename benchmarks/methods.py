"""What is compared: speculators, each at some number of draft tokens, in vLLM's own terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from griffin_vllm.checkpoint import find_head, open_head, weights_digest
from griffin_vllm.config import HeadConfig
from griffin_vllm.errors import GriffinError
from griffin_vllm.serving.tuning import SCHEDULE, Schedule, Tuning, read_tuning, untuned_schedule

# HASS changes how an EAGLE head is trained; what is served is an EAGLE head. `griffin-alone` is a GRIFFIN head whose
# config asks for prompt lookup, without it.
VLLM_METHODS = {
    "eagle": "eagle",
    "hass": "eagle",
    "eagle3": "eagle3",
    "griffin": "griffin",
    "griffin-alone": "griffin",
}
SAMPLERS = ("greedy", "probabilistic")
# Instead of a number of draft tokens: what `griffin tune` found best at each batch size, and what a GRIFFIN head drafts
# on a CPU without that.
TUNED, UNTUNED = "tuned", "untuned"
WITHOUT_HEAD: dict[str, dict[str, Any]] = {
    "none": {},
    "ngram": {"prompt_lookup_min": 2, "prompt_lookup_max": 5},
    # Otherwise it drafts the answers that it gave to the same prompts before: at the warm-up, or under another load.
    "suffix": {"suffix_decoding_max_cached_requests": 0},
}


@dataclass(frozen=True)
class Method:
    """``config``: of a GRIFFIN head; methods are told apart by the other two."""

    name: str
    head: str | None = None
    config: HeadConfig | None = field(default=None, compare=False)

    def speculative_config(self, k: int, draft_sample_method: str) -> dict[str, Any] | None:
        """vLLM's speculative config for ``k`` draft tokens; None for plain decoding."""
        if self.name == "none":
            return None
        if self.head is None:
            return {"method": self.name, "num_speculative_tokens": k, **WITHOUT_HEAD[self.name]}
        config = {
            "method": VLLM_METHODS[self.name],
            "model": self.head,
            "num_speculative_tokens": k,
            "draft_sample_method": draft_sample_method,
        }
        return config | ({"prompt_lookup_min": 0} if self.name == "griffin-alone" else {})

    @property
    def is_griffin(self) -> bool:
        return VLLM_METHODS.get(self.name) == "griffin"


@dataclass(frozen=True)
class Run:
    """One engine: a method with a number of draft tokens (0 for ``none``; the most where it depends on the load),
    measured at ``temperatures``."""

    method: Method
    num_speculative_tokens: int
    draft_sample_method: str = "greedy"
    tuning: Tuning | None = None
    untuned: bool = False
    temperatures: tuple[float, ...] = ()

    @property
    def speculative_config(self) -> dict[str, Any] | None:
        config = self.method.speculative_config(self.num_speculative_tokens, self.draft_sample_method)
        if config and self.tuning:
            # said nothing else, the plugin takes all of the tuning
            del config["num_speculative_tokens"]
        if config and self.untuned:
            config[SCHEDULE] = self.schedule
        return config

    @property
    def schedule(self) -> Schedule | None:
        """Where the number of drafts depends on the load."""
        if self.tuning:
            return self.tuning.schedule
        return untuned_schedule(self.num_speculative_tokens) if self.untuned else None

    @property
    def label(self) -> str:
        name = self.method.name + (f":{shown(self.method.head)}" if self.method.head else "")
        drafts = f" K={self.num_speculative_tokens}" if self.num_speculative_tokens else ""
        drafts += f" {TUNED}" if self.tuning else f" {UNTUNED}" if self.untuned else ""
        return (
            name + drafts + ("" if self.draft_sample_method == "greedy" else f" {self.draft_sample_method}")
        )

    def fields(self) -> dict[str, Any]:
        """This run's identity in a result row; of a GRIFFIN head also what makes it another than the plain one."""
        fields: dict[str, Any] = {
            "method": self.method.name,
            "head": shown(self.method.head) if self.method.head else None,
            "num_speculative_tokens": self.num_speculative_tokens,
        }
        if self.method.head:
            fields["draft_sample_method"] = self.draft_sample_method
        config = self.method.config
        if config and not config.drafts_all_tokens:
            fields["draft_vocab_size"] = config.draft_vocab_size
        depth = self.tuning or config
        if depth and depth.draft_stop_probability > 0:
            fields["draft_stop_probability"] = depth.draft_stop_probability
        if config and config.prompt_lookup_min and self.method.name == "griffin":
            fields["prompt_lookup_min"] = config.prompt_lookup_min
        if self.schedule:
            fields["schedule"] = [list(rule) for rule in self.schedule]
        if self.untuned:
            fields["untuned"] = True
        return fields


PLAIN = Run(Method("none"), 0)


def method_name(row: dict[str, Any], *, details: bool = True) -> str:
    """What a result row was measured with, but for the number of drafts, and without ``details`` for what the head's
    config asks for."""
    head = [_short(row["head"])] if row.get("head") else []
    head += head_details(row) if details else []
    sampler = " probabilistic" if row.get("draft_sample_method") == "probabilistic" else ""
    return row["method"] + (f" ({', '.join(head)})" if head else "") + sampler


def head_details(row: dict[str, Any]) -> list[str]:
    """What a GRIFFIN head's config or tuning made of it in a result row."""
    details = []
    if "draft_vocab_size" in row:
        details.append(f"{row['draft_vocab_size']} tokens")
    if "draft_stop_probability" in row:
        details.append(f"stops below {row['draft_stop_probability']:g}")
    if "prompt_lookup_min" in row:
        details.append(f"lookup from {row['prompt_lookup_min']}")
    return details


def _short(head: str) -> str:
    """A head's folder, after that of the run where it is what `griffin train` calls it."""
    *_, parent, name = ("", *Path(head).parts)
    return f"{parent}/{name}" if name == "head" and parent else name


def shown(path: str) -> str:
    """A path as a record shows it: absolute ones would tell of the machine only."""
    return Path(path).name if Path(path).is_absolute() else path


def head_digest(method: Method) -> str | None:
    """Tells the weights of a method's head from others of the same name; None where they are not on this machine."""
    if method.head is None:
        return None
    folder = find_head(method.head) if method.is_griffin else Path(method.head)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return weights_digest(*files) if files else None


def parse_methods(text: str) -> list[Method]:
    """``none,eagle:PATH,griffin:PATH`` as methods, their heads known to exist.

    Raises:
        GriffinError: an unknown method, or a head that is missing, not asked for, or broken.
    """
    methods = []
    for item in text.split(","):
        name, _, head = item.strip().partition(":")
        if name in WITHOUT_HEAD and not head:
            methods.append(Method(name))
            continue
        if name not in VLLM_METHODS or not head:
            expected = ", ".join([*WITHOUT_HEAD, *(f"{name}:HEAD" for name in VLLM_METHODS)])
            raise GriffinError.at("--methods", "a method", item, f"one of {expected}")
        config = open_head(find_head(head)).config if VLLM_METHODS[name] == "griffin" else None
        if config is None and Path(head).is_absolute() and not Path(head).is_dir():
            raise GriffinError(f"--methods: {item}: there is no folder {head}")
        methods.append(Method(name, head, config))
    return methods


def number_of_drafts(text: str) -> int | str:
    """A number, or one of the words ``TUNED`` and ``UNTUNED``."""
    return text if text in (TUNED, UNTUNED) else int(text)


def draft_sampler(text: str) -> str:
    """``greedy`` or ``probabilistic``."""
    if text not in SAMPLERS:
        raise ValueError(f"{text!r} is none of {', '.join(SAMPLERS)}")
    return text


def runs(methods: Iterable[Method], ks: Sequence[int | str], dtype: str) -> list[Run]:
    """Every method at every number of draft tokens, ``none`` once each time that it is named, and GRIFFIN heads
    also as they are ``TUNED`` for a target in ``dtype``, or ``UNTUNED``.

    Raises:
        GriffinError: a head has no tuning of this machine, vLLM and dtype, or nothing is asked of a method.
    """
    planned = []
    for method in methods:
        if method.name == "none":
            planned.append(Run(method, 0))
            continue
        planned += [Run(method, k) for k in ks if isinstance(k, int)]
        if method.config and method.name == "griffin":
            if UNTUNED in ks:
                planned.append(Run(method, method.config.num_speculative_tokens, untuned=True))
            if TUNED in ks:
                planned.append(_tuned(method, dtype))
        elif not any(isinstance(k, int) for k in ks):
            asked = ",".join(map(str, ks))
            raise GriffinError.at(
                "benchmarks", "--num-speculative-tokens", asked, f"a number, too, for {method.name}"
            )
    return planned


def sampling(planned: Iterable[Run], samplers: Sequence[str], temperatures: Sequence[float]) -> list[Run]:
    """Every head with every way of drafting at a temperature, its own one where none is named; at temperature 0 there
    is but one."""
    sampled = []
    for run in planned:
        ways: Sequence[str] = ["greedy"]
        if run.method.head:
            ways = samplers or [run.method.config.draft_sample_method if run.method.config else "greedy"]
        for way in SAMPLERS:
            measured = tuple(t for t in temperatures if (way in ways if t else way == "greedy"))
            if measured:
                sampled.append(replace(run, draft_sample_method=way, temperatures=measured))
    return sampled


def _tuned(method: Method, dtype: str) -> Run:
    head = open_head(find_head(str(method.head)))
    tuning = read_tuning(head, dtype)
    if tuning is None:
        raise GriffinError(
            f"{head.folder}: has no tuning of this machine, vLLM and {dtype}; run `griffin tune` first"
        )
    return Run(method, tuning.num_speculative_tokens, tuning=tuning)


class Cell(NamedTuple):
    """What is measured once a repeat: one engine (its place in the plan) on one data set under one load."""

    engine: int
    dataset: str
    temperature: float
    concurrency: int


def in_turn(repeats: int, planned: int) -> Iterator[tuple[int, int]]:
    """Repeat and number of the run, ``planned`` runs a repeat, in an order that rotates as far as it takes for each run
    to come early in one repeat and late in another."""
    step = max(1, planned // repeats)
    for repeat, place in product(range(repeats), range(planned)):
        yield repeat, (place + step * repeat) % planned
