"""The target's features on disk: written once, resumable, read back through a memory map.

A cache is a folder of safetensors shards (``hidden_states`` bf16 (N, d), ``top_ids`` int32 (N, k) and
``top_probabilities`` bf16 (N, k), N being the tokens of a run of samples), the target's ``SharedWeights``,
and a ``manifest.json`` that says which data set and target they belong to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from griffin_vllm.errors import GriffinError
from griffin_vllm.files import make_folder, read_json, write_whole
from griffin_vllm.training.data import TokenDataset, dataset_digest
from griffin_vllm.training.target import SharedWeights, SoftTargets, Target, soft_targets

SHARD_TOKENS = 65_536
MANIFEST = "manifest.json"
SHARED = "shared.safetensors"
DIGEST_BLOCKS, DIGEST_BLOCK_BYTES = 256, 4096


@dataclass(frozen=True)
class CacheManifest:
    """What a cache was made from; two caches with the same manifest hold the same numbers.

    ``target_weights`` (:func:`target_digest`) tells targets apart, whatever their names. Where it is None, as for a Hub
    id and in caches that are older than the field, ``target`` does: the Hub id, or the name of the folder.
    ``target_config`` (:func:`target_config_digest`) tells of other positions or layers over the same weights; where it
    is None, nothing does.
    """

    target: str
    dataset: str
    hidden_size: int
    vocab_size: int
    top_k: int
    lengths: list[int]
    target_weights: str | None = None
    target_config: str | None = None

    @classmethod
    def of(cls, target: Path, hf_config: PreTrainedConfig, data: TokenDataset, top_k: int) -> CacheManifest:
        """The cache that ``data`` needs from the target in folder ``target``."""
        digest = target_digest(target)
        return cls(
            target=str(target) if digest is None else target.name,
            dataset=dataset_digest(data.folder),
            hidden_size=hf_config.hidden_size,
            vocab_size=hf_config.vocab_size,
            top_k=top_k,
            lengths=data.lengths.tolist(),
            target_weights=digest,
            target_config=target_config_digest(target),
        )

    def size_in_bytes(self) -> int:
        return sum(self.lengths) * self.bytes_per_token + self.shared_bytes

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.hidden_size + (4 + 2) * self.top_k

    @property
    def shared_bytes(self) -> int:
        """Of embeddings and ``lm_head``."""
        return 4 * self.vocab_size * self.hidden_size

    def describes(self, stored: Any) -> bool:
        """Whether a cache with the manifest ``stored`` (JSON) is the one that this manifest asks for."""
        if not isinstance(stored, dict):
            return False
        wanted, found = asdict(self), {"target_weights": None, "target_config": None, **stored}
        ignored = [
            name for name in ("target_weights", "target_config") if None in (wanted[name], found[name])
        ]
        if "target_weights" not in ignored:
            ignored.append("target")
        return wanted | dict.fromkeys(ignored) == found | dict.fromkeys(ignored)


class FeatureCache:
    """Reader of one split's cache."""

    def __init__(self, folder: Path, manifest: CacheManifest) -> None:
        """Open the cache in ``folder``, which :func:`is_complete` for ``manifest``.

        Raises:
            GriffinError: a shard is damaged.
        """
        self.folder, self.manifest = folder, manifest
        starts = np.concatenate([[0], np.cumsum(manifest.lengths)])
        runs = shards(manifest.lengths)
        for shard, run in enumerate(runs):
            self._check(_shard_path(folder, shard), sum(manifest.lengths[i] for i in run))
        self._place = {
            sample: (shard, int(starts[sample] - starts[run[0]]))
            for shard, run in enumerate(runs)
            for sample in run
        }
        self._open = lru_cache(maxsize=64)(lambda i: safe_open(_shard_path(folder, i), "pt"))

    def _check(self, path: Path, tokens: int) -> None:
        """Hours of training may lie between the start and the first use of a shard."""
        k = self.manifest.top_k
        expected = {
            "hidden_states": [tokens, self.manifest.hidden_size],
            "top_ids": [tokens, k],
            "top_probabilities": [tokens, k],
        }
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
        if found != expected:
            raise GriffinError.at(path, "content", found, f"{expected}; remove it and it is written again")

    def shared_weights(self) -> SharedWeights:
        """Raises GriffinError where the file is damaged."""
        try:
            tensors = load_file(self.folder / SHARED)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder / SHARED, error) from error
        embed_tokens = tensors["embed_tokens"]
        softcap = tensors.get("logit_softcap")
        return SharedWeights(
            embed_tokens, tensors.get("lm_head", embed_tokens), None if softcap is None else float(softcap)
        )

    def features(self, samples: Sequence[int], tokens: Sequence[Tensor]) -> list[tuple[Tensor, SoftTargets]]:
        """As ``sources.Source`` has it; the ``tokens`` need not be looked at."""
        return [self[sample] for sample in samples]

    def __getitem__(self, sample: int) -> tuple[Tensor, SoftTargets]:
        """Features (T, d) bf16 of one sample and the target's soft targets after each position."""
        shard, start = self._place[sample]
        rows = slice(start, start + self.manifest.lengths[sample])
        file = self._open(shard)
        return file.get_slice("hidden_states")[rows], SoftTargets(
            file.get_slice("top_ids")[rows].long(), file.get_slice("top_probabilities")[rows].float()
        )


def write_cache(
    folder: Path,
    target: Target,
    tokens: Sequence[Tensor],
    manifest: CacheManifest,
    progress: Callable[[int], None] = lambda done: None,
    batch_tokens: int = 2048,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Compute and store the features of ``tokens`` (int64 (T,) each); continues a partial cache.

    Of ``ranks`` processes that do this together, in one folder, each writes every ``ranks``-th shard, and the
    first of them what there is once.

    Raises:
        GriffinError: the disk has no room, or the folder cannot be written or holds the cache of something else.
    """
    make_folder(folder)
    if rank == 0:
        check_caches({folder: manifest})
        text = json.dumps(asdict(manifest))
        write_whole(folder / MANIFEST, text)
        _write_tensors(folder / SHARED, _shared_tensors(target.shared))
    for shard, run in list(enumerate(shards(manifest.lengths)))[rank::ranks]:
        if not _shard_path(folder, shard).is_file():
            tensors = _compute(target, [tokens[i] for i in run], manifest.top_k, batch_tokens)
            _write_tensors(_shard_path(folder, shard), tensors)
        progress(sum(manifest.lengths[i] for i in run))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # save_file would leave a file with a name of its own, as large as a shard, behind each process that is killed
    write_whole(path, lambda unfinished: unfinished.write_bytes(save(tensors)))


def _shared_tensors(shared: SharedWeights) -> dict[str, Tensor]:
    tensors = {"embed_tokens": shared.embed_tokens}
    if shared.lm_head is not shared.embed_tokens:
        tensors["lm_head"] = shared.lm_head
    if shared.logit_softcap is not None:
        tensors["logit_softcap"] = torch.tensor(shared.logit_softcap)
    return tensors


def check_caches(caches: Mapping[Path, CacheManifest]) -> None:
    """Raise GriffinError unless all of ``caches`` (by folder, on one disk) can be written, before the first is begun:
    the disk has room for what is missing of them, and no folder holds the cache of something else."""
    need = 0
    for folder, manifest in caches.items():
        if not _matches(folder, manifest):
            raise GriffinError(
                f"{folder}: holds features of another target or data set, or with another soft_target_tokens; "
                "name another folder"
            )
        need += 0 if (folder / SHARED).is_file() else manifest.shared_bytes
        for shard, run in enumerate(shards(manifest.lengths)):
            if not _shard_path(folder, shard).is_file():
                need += sum(manifest.lengths[i] for i in run) * manifest.bytes_per_token
    place = Path(os.path.commonpath([folder.absolute() for folder in caches]))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise GriffinError(
            f"{', '.join(map(str, caches))}: the feature cache takes {need / 1e9:.1f} GB more and the disk has "
            f"{free / 1e9:.1f} GB free; a smaller soft_target_tokens makes it smaller, without `features` there is none"
        )


def target_digest(folder: Path) -> str | None:
    """A digest of a target's weights that reads little of them: each file's size and blocks all over it.

    Headers alone would not do: a fine-tuned model has those of its base. None where ``folder`` is a Hub id.

    Raises:
        GriffinError: a file cannot be read.
    """
    files = [path for pattern in ("*.safetensors", "*.bin") for path in sorted(folder.glob(pattern))]
    if not files:
        return None
    digest = sha256()
    for path in files:
        try:
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as file:
                for block in range(DIGEST_BLOCKS):
                    file.seek(size * block // DIGEST_BLOCKS)
                    digest.update(file.read(DIGEST_BLOCK_BYTES))
        except OSError as error:
            raise GriffinError(f"{path}: cannot be read ({GriffinError.reason(error)})") from error
    return digest.hexdigest()


def target_config_digest(folder: Path) -> str | None:
    """A digest of what a target's ``config.json`` says of the model; None where ``folder`` has none (a Hub id).

    Raises:
        GriffinError: the file is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    # written anew by every library that saves the model
    of_no_matter = {"_name_or_path", "transformers_version"}
    config = {name: value for name, value in read_json(path).items() if name not in of_no_matter}
    return sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def is_complete(folder: Path, manifest: CacheManifest) -> bool:
    """Whether ``folder`` holds all of the cache that ``manifest`` describes."""
    names = [MANIFEST, SHARED, *(_shard_path(folder, i).name for i in range(len(shards(manifest.lengths))))]
    return all((folder / name).is_file() for name in names) and _matches(folder, manifest)


def _matches(folder: Path, manifest: CacheManifest) -> bool:
    path = folder / MANIFEST
    try:
        return not path.is_file() or manifest.describes(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise GriffinError(f"{path}: is not valid JSON ({GriffinError.reason(error)})") from error


def shards(lengths: Sequence[int]) -> list[range]:
    """Runs of consecutive samples of about ``SHARD_TOKENS`` tokens, the same for the same lengths."""
    runs, start, size = [], 0, 0
    for sample, length in enumerate(lengths):
        size += length
        if size >= SHARD_TOKENS:
            runs.append(range(start, sample + 1))
            start, size = sample + 1, 0
    if start < len(lengths):
        runs.append(range(start, len(lengths)))
    return runs


def _compute(target: Target, tokens: Sequence[Tensor], top_k: int, batch_tokens: int) -> dict[str, Tensor]:
    """Features of one shard, in the samples' order; computed longest first so that padding stays small."""
    features: list[Tensor] = [torch.empty(0)] * len(tokens)
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    while order:
        size = max(1, batch_tokens // len(tokens[order[0]]))
        batch, order = order[:size], order[size:]
        hidden = target.hidden_states(pad_sequence([tokens[i] for i in batch], batch_first=True))
        for row, i in enumerate(batch):
            features[i] = hidden[row, : len(tokens[i])]
    hidden_states = torch.cat(features)
    soft = soft_targets(hidden_states, target.shared.lm_head, top_k, target.shared.logit_softcap)
    return {
        "hidden_states": hidden_states.to("cpu", torch.bfloat16).contiguous(),
        "top_ids": soft.ids.to("cpu", torch.int32).contiguous(),
        "top_probabilities": soft.probabilities.to("cpu", torch.bfloat16).contiguous(),
    }


def _damaged(path: Path, error: Exception) -> GriffinError:
    return GriffinError(
        f"{path}: is damaged ({GriffinError.reason(error)}); remove it and it is written again"
    )


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"features-{shard:05d}.safetensors"
