"""The token dataset on disk: written once by ``griffin data prepare``, memory-mapped by the trainer.

A folder with ``manifest.json`` and, for each split (``train``, ``validation``):

- ``SPLIT.tokens.npy``  token ids, sample after sample, uint16 (uint32 for vocabularies above 65536)
- ``SPLIT.mask.npy``    uint8, as long: 1 where the target generated the token (end-of-turn tokens included)
- ``SPLIT.offsets.npy`` int64 [n + 1]: sample i is ``offsets[i]:offsets[i + 1]``
- ``SPLIT.loops.npy``   bool [n]: an answer of the sample loops

``skipped.jsonl`` names every record that was left out, with the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from griffin_vllm import __version__
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import atomic_folder, check_same, may_be_replaced, read_json, sha256
from griffin_vllm.training.chat import ChatTarget, Sample, template_hash, tokenizer_hash
from griffin_vllm.training.conversations import (
    Conversation,
    Record,
    RecordError,
    Skipped,
    check_source,
    names_to_exclude,
    read_source,
    without_trailing_user_turn,
)

MANIFEST, SKIPPED = "manifest.json", "skipped.jsonl"
SPLITS = ("train", "validation")
ARRAYS = ("tokens", "mask", "offsets", "loops")
_FILES = {MANIFEST, SKIPPED, *(f"{split}.{array}.npy" for split in SPLITS for array in ARRAYS)}
LOOP_THRESHOLD = 0.6
_CONVERSATIONS_AT_ONCE = 256
_EXAMPLES = 5

Loops = Literal["flag", "drop"]


class SourceFile(BaseModel):
    """One input: its name, the SHA-256 of a file's bytes (None for a data set), its records."""

    name: str
    sha256: str | None
    records: int
    skipped: int


class SplitCounts(BaseModel):
    samples: int
    tokens: int
    answer_tokens: int
    looping_samples: int


class Options(BaseModel):
    """How `griffin data prepare` makes samples of conversations."""

    max_length: int
    validation_share: float
    loops: Loops
    loop_threshold: float


class Manifest(Options):
    """``manifest.json``: what a token dataset was made of, how, and for what target."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    griffin_vllm: str
    target: str
    vocab_size: int
    tokenizer_sha256: str
    template_sha256: str
    sources: list[SourceFile]
    splits: dict[str, SplitCounts]
    conversations: int
    truncated_samples: int
    skipped: dict[str, int]
    skipped_examples: list[dict[str, Any]]


class TokenDataset:
    """One split of a token dataset, memory-mapped.

    Item i is ``(tokens int64 [T], mask bool [T])``. ``lengths`` is int64 [n], ``loops`` bool [n].

    Raises:
        GriffinError: a file is missing, damaged, or does not fit the others.
    """

    def __init__(self, folder: Path, split: str):
        path = folder / MANIFEST
        if not path.is_file():
            raise GriffinError(
                f"{folder}: has no {MANIFEST}; a token dataset is written by `griffin data prepare`"
            )
        try:
            self.manifest = Manifest.model_validate(read_json(path))
        except ValidationError as error:
            raise GriffinError.invalid(path, error.errors()[0]) from error
        if split not in self.manifest.splits:
            raise GriffinError.at(path, "splits", sorted(self.manifest.splits), f"one called {split!r}")
        self.folder, self.split = folder, split
        counts = self.manifest.splits[split]
        dtype = _token_dtype(self.manifest.vocab_size)
        self._tokens = _load(folder, split, "tokens", dtype, counts.tokens)
        self._mask = _load(folder, split, "mask", np.dtype(np.uint8), counts.tokens)
        self._offsets = _load(folder, split, "offsets", np.dtype(np.int64), counts.samples + 1)
        self.loops = _load(folder, split, "loops", np.dtype(np.bool_), counts.samples)
        self.lengths: np.ndarray = np.diff(self._offsets)
        if self._offsets[0] != 0 or self._offsets[-1] != counts.tokens or (self.lengths < 0).any():
            raise GriffinError(
                f"{folder / f'{split}.offsets.npy'}: does not rise from 0 to {counts.tokens} tokens"
            )
        largest = int(self._tokens.max(initial=0))
        if largest >= self.manifest.vocab_size:
            raise GriffinError.at(
                folder / f"{split}.tokens.npy", "a token id", largest, f"below {self.manifest.vocab_size}"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self._offsets[index % len(self)], self._offsets[index % len(self) + 1]
        tokens = torch.from_numpy(self._tokens[start:end].astype(np.int64))
        return tokens, torch.from_numpy(self._mask[start:end].astype(np.bool_))

    def answer_token_counts(self) -> torch.Tensor:
        """How often the target generated each token, int64 [vocab_size]."""
        generated = self._tokens[self._mask.astype(np.bool_)]
        return torch.from_numpy(np.bincount(generated, minlength=self.manifest.vocab_size))

    def check_target(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """Raise GriffinError unless token ids mean the same to the target at hand: made with another tokenizer,
        vocabulary or chat template they do not."""
        at_hand = {
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer_hash(tokenizer),
            "template_sha256": template_hash(tokenizer),
        }
        prepared_for = (
            f"that of the target at hand; prepare the data again (it was for {self.manifest.target})"
        )
        check_same(self.folder / MANIFEST, self.manifest.model_dump(), at_hand, prepared_for)


def length_buckets(
    lengths: np.ndarray | Sequence[int], max_tokens_per_batch: int, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of sample indices, similar in length, in random order; every sample is in exactly one.

    A batch padded to its longest sample has at most ``max_tokens_per_batch`` tokens; a longer sample is a
    batch of its own. The same arguments give the same batches; another epoch gives others.
    """
    lengths = np.asarray(lengths)
    random = np.random.default_rng((seed, epoch))
    # A random order among samples of about one length, so that batches differ from epoch to epoch.
    order = np.argsort(lengths * random.uniform(0.95, 1.05, len(lengths)), kind="stable")
    batches: list[list[int]] = []
    longest = 0
    for index in order.tolist():
        longest = max(longest, int(lengths[index]))
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens_per_batch:
            batches.append([])
            longest = int(lengths[index])
        batches[-1].append(index)
    random.shuffle(batches)
    return batches


def prepare(
    target: str,
    sources: Sequence[str],
    out: Path,
    *,
    max_length: int = 2048,
    validation_share: float = 0.02,
    loops: Loops = "flag",
    loop_threshold: float = LOOP_THRESHOLD,
    exclude: Sequence[Path] = (),
    console: Console | None = None,
) -> Manifest:
    """Write the token dataset ``out`` from ``sources`` (files, saved data sets or Hub ids) for ``target``.

    ``exclude``: files of conversations that must not be used, with all of their families.

    Raises:
        GriffinError: an option is out of range, target or a source cannot be read, nothing usable is left, or ``out``
            holds something else than a dataset or cannot be written; it is then untouched.
    """
    if max_length < 2:
        raise GriffinError.at("griffin data prepare", "--max-length", max_length, "at least 2")
    if not 0 <= validation_share < 1:
        raise GriffinError.at("griffin data prepare", "--validation", validation_share, "from 0 to below 1")
    if not 0 <= loop_threshold <= 1:
        raise GriffinError.at("griffin data prepare", "--loop-threshold", loop_threshold, "from 0 to 1")
    for source in (*sources, *map(str, exclude)):
        check_source(source)
    if not may_be_replaced(out, _FILES):
        raise GriffinError.at(
            "griffin data prepare",
            "--out",
            str(out),
            "a new folder, or one with nothing but a token dataset, which is replaced",
        )
    chat = ChatTarget.load(target)
    excluded = names_to_exclude(exclude)
    options = Options(
        max_length=max_length, validation_share=validation_share, loops=loops, loop_threshold=loop_threshold
    )
    try:
        with (
            Progress(console=console or Console(stderr=True), transient=True) as progress,
            atomic_folder(out) as staging,
            _Writer(staging, chat, excluded, options) as writer,
        ):
            for source in sources:
                for chunk in _chunks(writer.reading(source, _open(source, progress)), _CONVERSATIONS_AT_ONCE):
                    writer.add(chunk)
            splits = writer.finish()
            if not splits["train"].samples:
                raise GriffinError(_nothing_left(sources, writer, splits))
            manifest = Manifest(
                griffin_vllm=__version__,
                target=target,
                vocab_size=chat.vocab_size,
                tokenizer_sha256=tokenizer_hash(chat.tokenizer),
                template_sha256=template_hash(chat.tokenizer),
                **options.model_dump(),
                sources=writer.sources,
                splits=splits,
                conversations=writer.conversations,
                truncated_samples=writer.truncated,
                skipped=dict(writer.reasons.most_common()),
                skipped_examples=writer.examples,
            )
            (staging / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise GriffinError.unwritable(out, error) from error
    return manifest


def split_of(family: str, validation_share: float) -> str:
    """The split of a conversation family, by its hash: it never depends on what else is in the data."""
    value = int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], "big") / 2**64
    return "validation" if value < validation_share else "train"


class _Writer:
    """Appends samples to the files of a dataset and counts everything that its manifest tells."""

    def __init__(self, folder: Path, chat: ChatTarget, excluded: set[str], options: Options):
        self._chat, self._excluded, self._options = chat, excluded, options
        self.sources: list[SourceFile] = []
        self.conversations = self.truncated = 0
        self.reasons: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        dtype = _token_dtype(chat.vocab_size)
        self._files = {
            split: {"tokens": _Npy(folder, split, "tokens", dtype), "mask": _Npy(folder, split, "mask", "u1")}
            for split in SPLITS
        }
        self._folder = folder
        self._offsets: dict[str, list[int]] = {split: [0] for split in SPLITS}
        self._loops: dict[str, list[bool]] = {split: [] for split in SPLITS}
        self._answer_tokens = dict.fromkeys(SPLITS, 0)
        self._skipped = (folder / SKIPPED).open("w", encoding="utf-8")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._skipped.close()
        for files in self._files.values():
            for file in files.values():
                file.close()

    def reading(self, source: str, records: Iterable[Record]) -> Iterator[tuple[int, Conversation]]:
        """The usable ones of ``records`` with their numbers; the others are skipped."""
        try:
            digest = sha256(Path(source)) if Path(source).is_file() else None
        except OSError as error:
            raise GriffinError(f"{source}: cannot be read ({GriffinError.reason(error)})") from error
        self.sources.append(
            SourceFile(name=Path(source).name if digest else source, sha256=digest, records=0, skipped=0)
        )
        for index, record in enumerate(records):
            self.sources[-1].records += 1
            if isinstance(record, Skipped):
                self._skip(record)
            else:
                yield index, record

    def add(self, numbered: Sequence[tuple[int, Conversation]]) -> None:
        usable: list[tuple[int, Conversation]] = []
        for index, found in numbered:
            try:
                if not self._excluded.isdisjoint(found.known_as):
                    raise RecordError("excluded")
                usable.append((index, without_trailing_user_turn(found)))
            except RecordError as error:
                self._skip(Skipped(self.sources[-1].name, index, str(error), found.id))
        rendered = self._chat.samples([found for _, found in usable])
        for (index, found), samples in zip(usable, rendered, strict=True):
            try:
                if isinstance(samples, RecordError):
                    raise samples
                if self._options.loops == "drop" and any(map(self._is_loop, samples)):
                    raise RecordError("the answer loops")
                cut = [_truncate(sample, self._options.max_length) for sample in samples]
                if not any(cut):
                    raise RecordError(f"no answer within {self._options.max_length} tokens")
            except RecordError as error:
                self._skip(Skipped(self.sources[-1].name, index, str(error), found.id))
                continue
            self.conversations += 1
            split = split_of(found.family, self._options.validation_share)
            for sample, length in zip(samples, cut, strict=True):
                if length:
                    self.truncated += length < len(sample.tokens)
                    self._append(split, sample, length)

    def finish(self) -> dict[str, SplitCounts]:
        for split in SPLITS:
            np.save(self._folder / f"{split}.offsets.npy", np.array(self._offsets[split], np.int64))
            np.save(self._folder / f"{split}.loops.npy", np.array(self._loops[split], np.bool_))
            for file in self._files[split].values():
                file.finish(self._offsets[split][-1])
        return {
            split: SplitCounts(
                samples=len(self._loops[split]),
                tokens=self._offsets[split][-1],
                answer_tokens=self._answer_tokens[split],
                looping_samples=sum(self._loops[split]),
            )
            for split in SPLITS
        }

    def _is_loop(self, sample: Sample) -> bool:
        return sample.distinct_4grams < self._options.loop_threshold

    def _append(self, split: str, sample: Sample, length: int) -> None:
        self._files[split]["tokens"].write(sample.tokens[:length])
        self._files[split]["mask"].write(sample.mask[:length])
        self._offsets[split].append(self._offsets[split][-1] + length)
        self._loops[split].append(self._is_loop(sample))
        self._answer_tokens[split] += sum(sample.mask[:length])

    def _skip(self, skipped: Skipped) -> None:
        entry = asdict(skipped)
        self._skipped.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.sources[-1].skipped += 1
        self.reasons[skipped.reason] += 1
        if self.reasons[skipped.reason] <= _EXAMPLES:
            self.examples.append(entry)


class _Npy:
    """A flat ``.npy`` file of unknown length, written as it comes."""

    def __init__(self, folder: Path, split: str, name: str, dtype: str | np.dtype):
        self._dtype = np.dtype(dtype)
        self._file = (folder / f"{split}.{name}.npy").open("w+b")
        self._header(0)

    def write(self, values: list[int]) -> None:
        self._file.write(np.array(values, self._dtype).tobytes())

    def finish(self, length: int) -> None:
        """Write the real length into the header, which numpy pads so that its size stays the same."""
        self._file.seek(0)
        self._header(length)

    def close(self) -> None:
        self._file.close()

    def _header(self, length: int) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(
            self._file, {"shape": (length,), "fortran_order": False, "descr": descr}
        )


def _truncate(sample: Sample, max_length: int) -> int:
    """Tokens of ``sample`` to keep: at most ``max_length``, and none behind the last generated one."""
    length = min(len(sample.tokens), max_length)
    while length and not sample.mask[length - 1]:
        length -= 1
    return length


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _load(folder: Path, split: str, name: str, dtype: np.dtype, length: int) -> np.ndarray:
    path = folder / f"{split}.{name}.npy"
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise GriffinError(f"{path}: cannot be read ({GriffinError.reason(error)})") from error
    if array.dtype != dtype or array.shape != (length,):
        raise GriffinError.at(path, "array", (str(array.dtype), array.shape), f"{dtype} of shape {(length,)}")
    return array


def _open(source: str, progress: Progress) -> Iterator[Record]:
    if Path(source).is_file():
        yield from read_source(source, lambda path: progress.open(path, "rb", description=path.name))
        return
    task = progress.add_task(source, total=None)
    for record in read_source(source):
        progress.advance(task)
        yield record


def dataset_digest(folder: Path) -> str:
    """SHA-256 of the manifest of the token dataset in ``folder``, which holds the digests of its sources."""
    return sha256(folder / MANIFEST)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _nothing_left(sources: Sequence[str], writer: _Writer, splits: dict[str, SplitCounts]) -> str:
    if splits["validation"].samples:
        return (
            f"{', '.join(sources)}: all {splits['validation'].samples} samples fell into the validation "
            "split; give more conversations or a smaller --validation"
        )
    reasons = "; ".join(f"{reason}: {count}" for reason, count in writer.reasons.most_common(3))
    return f"{', '.join(sources)}: no usable conversation ({reasons or 'no records'})"
