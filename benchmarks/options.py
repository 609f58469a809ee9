"""The command line that all benchmarks share, and what it stands for: methods, prompts, engine arguments."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import (
    VLLM_METHODS,
    WITHOUT_HEAD,
    Method,
    draft_sampler,
    number_of_drafts,
    parse_methods,
    shown,
)
from benchmarks.prompts import PromptSet, read_prompts
from griffin_vllm.errors import GriffinError


def parser(
    description: str | None, without: Collection[str] = (), **defaults: Any
) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks share, but for those ``without`` use to the script, which are
    None then; ``defaults`` are the script's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)

    def add(option: str, **settings: Any) -> None:
        if option in without:
            parser.set_defaults(**{option.removeprefix("--").replace("-", "_"): None})
        else:
            parser.add_argument(option, **settings)

    add("--target", required=True, help="folder or Hub id of the target")
    add(
        "--methods",
        required=True,
        help=", ".join([*WITHOUT_HEAD, *(f"{name}:HEAD" for name in VLLM_METHODS)]),
    )
    asks = "prompts" not in defaults
    add(
        "--prompts",
        required=asks,
        nargs="+",
        metavar="FILE",
        help="MT-bench, ShareGPT or `prompt` form, or a data set that vLLM's benchmarks know by name",
    )
    add("--num-prompts", type=int, metavar="N", help="only the first N conversations of each file")
    add("--turns", type=int, metavar="N", help="only the first N turns of each conversation")
    add(
        "--num-speculative-tokens",
        type=_list_of(number_of_drafts),
        default=[5],
        metavar="K[,K]",
        help="numbers (default: 5); `tuned`: what `griffin tune` wrote beside a GRIFFIN head; `untuned`: what such a "
        "head drafts on a CPU when nothing is said",
    )
    add("--temperature", type=_list_of(float), default=[0.0], metavar="T[,T]", help="default: %(default)s")
    add(
        "--concurrency",
        type=_list_of(int),
        default=[1],
        metavar="N[,N]",
        help="requests at a time (default: %(default)s)",
    )
    add(
        "--max-tokens",
        type=int,
        default=128,
        help="longest answer (default: %(default)s); answers end at EOS",
    )
    add("--max-model-len", type=int, default=2048, help="longest prompt and answer (default: %(default)s)")
    add(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16"),
        help="of the target and the heads (default: %(default)s); a CPU with AVX2 only is slow in bfloat16",
    )
    add(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="do not compile: vLLM 0.32's CPU build compiles some bfloat16 models to nonsense (default: %(default)s)",
    )
    add("--kv-cache-gib", type=float, default=1.0, help="GiB of KV cache (default: %(default)s)")
    add("--json", type=Path, required=True, metavar="OUT.json", help="the record to write")
    parser.set_defaults(**defaults)
    return parser


def add_draft_sample_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft-sample-method",
        type=_list_of(draft_sampler),
        default=[],
        metavar="greedy,probabilistic",
        help="how heads draft at a temperature (default: as their configs recommend)",
    )


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(item) for item in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def execute(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Run a script's ``main``: bad input ends in one line and exit status 2; SIGTERM ends it as Ctrl-C does, so that
    no engine is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(None))
    except GriffinError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def load_inputs(args: argparse.Namespace) -> tuple[list[Method], list[PromptSet]]:
    """Methods and prompts of the command line, checked before any engine starts."""
    methods = parse_methods(args.methods)
    folders = {shown(method.head): method.head for method in methods if method.head}
    for method in methods:
        if method.head and folders[shown(method.head)] != method.head:
            raise GriffinError(
                f"--methods: a record shows {method.head} and {folders[shown(method.head)]} by one name; give the "
                "paths from the working folder, or other folder names"
            )
    sets = [read_prompts(source, args.num_prompts, args.target, args.turns) for source in args.prompts]
    names = [prompts.name for prompts in sets]
    if len(set(names)) < len(names):
        raise GriffinError.at("--prompts", "the files' stems", names, "different names, they tell rows apart")
    for prompts in sets:
        ids = [conversation.id for conversation in prompts.conversations]
        if len(set(ids)) < len(ids):
            raise GriffinError(f"{prompts.name}: two conversations have one id")
    return methods, sets


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM's engine arguments, the same for every method."""
    return {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        # one limit for all concurrencies; verification of K + 1 tokens a request must fit the batch
        "max_num_seqs": max(args.concurrency),
        "max_num_batched_tokens": max(args.max_model_len, 2048),
        "kv_cache_memory_bytes": int(args.kv_cache_gib * (1 << 30)),
        "enforce_eager": args.enforce_eager,
        "seed": 0,
    }
