"""Where the target's features come from: the target in the loop, or a cache on disk, which is written first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from griffin_vllm.files import make_folder, only_process_in
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.features import (
    CacheManifest,
    FeatureCache,
    check_caches,
    is_complete,
    write_cache,
)
from griffin_vllm.training.target import SharedWeights, SoftTargets, Target, soft_targets


class Source(Protocol):
    """Where features and soft targets of a data set's samples come from."""

    def features(self, samples: Sequence[int], tokens: Sequence[Tensor]) -> list[tuple[Tensor, SoftTargets]]:
        """For each sample f (L, d) and the distributions after each position (L, k)."""


class TargetSource:
    """Features from the target in the loop."""

    def __init__(self, target: Target, top_k: int) -> None:
        self.target, self.top_k = target, top_k

    def features(self, samples: Sequence[int], tokens: Sequence[Tensor]) -> list[tuple[Tensor, SoftTargets]]:
        hidden = self.target.hidden_states(pad_sequence(list(tokens), batch_first=True))
        rows = [hidden[i, : len(ids)] for i, ids in enumerate(tokens)]
        shared = self.target.shared
        return [(f, soft_targets(f, shared.lm_head, self.top_k, shared.logit_softcap)) for f in rows]


def open_sources(
    config: TrainConfig,
    hf_config: PreTrainedConfig,
    train: TokenDataset,
    validation: TokenDataset,
    top_k: int,
    accelerator: Accelerator,
    console: Console,
) -> tuple[Source, Source, SharedWeights]:
    """The sources of both splits, and the target's own weights.

    ``hf_config`` is the target's; ``top_k``: the soft targets of a position.

    Raises:
        GriffinError: the target cannot be loaded, or a cache is of something else, damaged, or has no room.
    """
    if config.features is None:
        target = Target(config.target, accelerator.device)
        source = TargetSource(target, top_k)
        return source, source, target.shared
    splits = {config.features / data.split: data for data in (train, validation)}
    manifests = {
        folder: CacheManifest.of(config.target, hf_config, data, top_k) for folder, data in splits.items()
    }
    check_caches(manifests)
    load = cache(lambda: Target(config.target, accelerator.device))
    caches = [
        _open_cache(folder, data, manifests[folder], load, accelerator, console)
        for folder, data in splits.items()
    ]
    return caches[0], caches[1], caches[0].shared_weights()


def _open_cache(
    folder: Path,
    data: TokenDataset,
    manifest: CacheManifest,
    load: Callable[[], Target],
    accelerator: Accelerator,
    console: Console,
) -> FeatureCache:
    """Open a feature cache, writing it first (each process its shards) where it is not complete."""
    complete = torch.tensor([is_complete(folder, manifest)], device=accelerator.device)
    if not accelerator.gather(complete).all():
        console.print(f"writing {manifest.size_in_bytes() / 1e9:.1f} GB of target features to {folder}")
        with _writers_of(folder, accelerator), Progress(console=console) as progress:
            task = progress.add_task(
                f"features, {data.split}", total=sum(manifest.lengths) / accelerator.num_processes
            )
            write_cache(
                folder,
                load(),
                [data[i][0] for i in range(len(data))],
                manifest,
                lambda count: progress.advance(task, count),
                rank=accelerator.process_index,
                ranks=accelerator.num_processes,
            )
    return FeatureCache(folder, manifest)


@contextmanager
def _writers_of(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs from writing the cache in ``folder`` until all processes of this one have written their parts.

    Raises:
        GriffinError: another run is writing it, or the folder cannot be written.
    """
    make_folder(folder)
    refusal = "another run is writing these features; start this one again when it has"
    with only_process_in(folder, refusal) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        yield
        accelerator.wait_for_everyone()
