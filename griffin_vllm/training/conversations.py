"""Conversations from files and data sets: ShareGPT JSON, chat JSONL, prompt lists, Hugging Face data sets.

Files are streamed, so a file may be larger than memory. A record that cannot be used never stops a run: it
comes out as a `Skipped` with its reason.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from griffin_vllm.errors import GriffinError

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
}
# ShareGPT cuts long conversations into fragments: QWJhYvA_0, QWJhYvA_3, ... are one conversation. example_0 and
# example_3 are two: one in 500 of its random words would be of small letters alone.
_SHAREGPT_FRAGMENT = re.compile(r"(?![a-z]{7}_)([A-Za-z0-9]{7})_\d+")
_FIRST_FIELD = re.compile(r'\{\s*"([^"\\]+)"\s*:')
_FIRST_FIELDS = ("id", "question_id", "conversations", "messages", "turns", "prompt")
_CHUNK = 1 << 20
MAX_RECORD = 64 << 20


@dataclass(frozen=True)
class Turn:
    role: str  # "system", "user" or "assistant"
    content: str
    token_ids: tuple[int, ...] | None = None  # exactly what the target generated, where it is known
    cut: bool = False  # the answer hit a length limit, so the target generated no end of turn


@dataclass(frozen=True)
class Conversation:
    """At most one system turn, then user and assistant turns by turns, or prompts: user turns alone.

    Conversations of one `family` belong on the same side of a split: fragments of one original, by their ids,
    and records that begin with the same question where an id does not tell (a number is one in its own file only).
    """

    id: str
    family: str
    turns: tuple[Turn, ...]

    @property
    def known_as(self) -> set[str]:
        """What a list of conversations to exclude may know it by: its family, and its first question."""
        return {self.family, next(turn.content for turn in self.turns if turn.role == "user")}


@dataclass(frozen=True)
class Skipped:
    """A record that was left out. ``record`` counts from 0 within ``source``."""

    source: str
    record: int
    reason: str
    id: str | None = None


Record = Conversation | Skipped


class RecordError(ValueError):
    """Why one record cannot be used; the message is the reason under which it is counted."""


def check_source(source: str) -> None:
    """Raise GriffinError if ``source`` is named like a file or folder that is not there; a Hub id is not looked up."""
    path = Path(source)
    named_like_a_file = path.suffix in (".json", ".jsonl", ".gz") or source.startswith((".", "/", "~"))
    if named_like_a_file and not path.exists() and _saved_dataset(source) is None:
        raise GriffinError(f"{source}: there is no such file or folder")


def read_source(source: str, open_file: Callable[[Path], IO[bytes]] | None = None) -> Iterator[Record]:
    """Conversations of a file (see `read_file`) or a Hugging Face data set (see `read_dataset`).

    Raises:
        GriffinError: it cannot be opened or read.
    """
    check_source(source)
    path = Path(source)
    if not path.is_file():
        yield from read_dataset(source)
        return
    try:
        with open_file(path) if open_file else path.open("rb") as file:
            yield from read_file(file, path.name)
    except OSError as error:
        raise GriffinError(f"{source}: cannot be read ({GriffinError.reason(error)})") from error


def read_file(file: IO[bytes], source: str) -> Iterator[Record]:
    """Conversations of one open file, gzip-compressed or not: a JSON array, or one JSON object a line."""
    for index, record in enumerate(_records(file)):
        yield _convert(record, source, index)


def read_dataset(source: str) -> Iterator[Record]:
    """Conversations of a Hugging Face data set: a folder written by ``save_to_disk``, or a Hub id.

    Either may name a split, ``train`` if it does not, and a Hub id a configuration: ``folder``, ``folder:test``,
    ``org/name``, ``org/name:test``, ``org/name:configuration:test``.

    Raises:
        GriffinError: the library ``datasets`` is missing, or there is no such data set or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise GriffinError(
            f"{source}: is not a file; to read a Hugging Face data set, pip install datasets"
        ) from error
    saved = _saved_dataset(source)
    try:
        if saved is not None:
            data = datasets.load_from_disk(str(saved[0]))
        else:
            name, *configuration, split = source.split(":") if ":" in source else (source, "")
            data = datasets.load_dataset(name, *configuration, split=split or "train", streaming=True)
    except Exception as error:  # the library and the Hub client have many kinds, and all mean the same here
        raise GriffinError(
            f"{source}: is neither a file nor a data set that could be opened ({GriffinError.reason(error)})"
        ) from error
    if saved is not None:
        data = _split_of(data, *saved)
    records = enumerate(data)
    while True:
        try:
            index, record = next(records)
        except StopIteration:
            return
        except Exception as error:  # a Hub data set comes over the network, record by record
            raise GriffinError(f"{source}: cannot be read ({GriffinError.reason(error)})") from error
        yield _convert(record, source, index)


def _saved_dataset(source: str) -> tuple[Path, str] | None:
    """Folder and split ("": not named) of a data set on this disk; None if ``source`` is no such one."""
    if Path(source).is_dir():
        return Path(source), ""
    folder, _, split = source.rpartition(":")
    return (Path(folder), split) if folder and Path(folder).is_dir() else None


def _split_of(data: Any, folder: Path, split: str) -> Any:
    """The records of ``split`` (``train`` if it is not named) in the data set that was saved in ``folder``.

    Raises:
        GriffinError: it has no such split.
    """
    if not isinstance(data, Mapping):
        if split:
            raise GriffinError.at(
                folder, "split", split, f"none: write {folder}, it was saved without splits"
            )
        return data
    wanted = split or "train"
    if wanted not in data:
        raise GriffinError.at(folder, "split", wanted, f"one of {sorted(data)}; write {folder}:SPLIT")
    return data[wanted]


def conversation(record: object) -> Conversation:
    """The conversation in one JSON record.

    Known forms: ``conversations`` or ``conversation`` (ShareGPT: ``from``, ``value``), ``messages`` (OpenAI: ``role``,
    ``content``; either kind of turn in any of them), ``turns`` (a list of user turns), ``prompt`` (one user turn).
    Answers may carry ``token_ids`` beside their text and ``finish_reason``, and a record the ``family`` of the one that
    it was made from. Assistant turns before the first user turn are dropped (fragments begin with them), and system
    turns at the beginning are made one; a conversation ends before its first empty turn, before a later system turn,
    before the first turn behind an answer that cannot be used (a tool's, say), and before the first turn that repeats a
    role unless there are no answers at all. A field that is null counts as absent: Arrow gives every record the fields
    of all of them.

    Raises:
        RecordError: nothing usable is left.
    """
    if not isinstance(record, Mapping):
        raise RecordError("not a JSON object")
    found = _turns(_raw_turns(record))
    start = next((i for i, turn in enumerate(found) if turn.role != "system"), len(found))
    said = "\n\n".join(turn.content for turn in found[:start] if turn.content.strip())
    system = [Turn("system", said)] if said else []
    while start < len(found) and found[start].role == "assistant":
        start += 1
    only_prompts = all(turn.role == "user" for turn in found[start:])
    kept: list[Turn] = []
    for turn in found[start:]:
        repeats = turn.role == (kept[-1].role if kept else "assistant")
        if (repeats and not only_prompts) or turn.role == "system" or not turn.content.strip():
            break
        kept.append(turn)
    if not kept:
        raise RecordError("no user turn to begin with")
    turns = (*system, *kept)
    family = record.get("family")
    name = _name(record)
    if name is None or name.isdecimal():
        asked = json.dumps([turn.content for turn in turns if turn.role != "assistant"])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        name, by_id = digest if name is None else f"{name}-{digest}", kept[0].content
    else:
        by_id = _family(name)
    return Conversation(name, _sound(family) if isinstance(family, str) and family else by_id, turns)


def _name(record: Mapping[str, Any]) -> str | None:
    """The id of a record as it says it, or None."""
    found = _given(record, "id", "question_id")
    return None if found in (None, "") else _sound(str(found))


def _family(name: str) -> str:
    fragment = _SHAREGPT_FRAGMENT.fullmatch(name)
    return fragment[1] if fragment else name


def _sound(text: str) -> str:
    """``text`` without halves of surrogate pairs, which no file takes."""
    return text.encode("utf-8", "replace").decode()


def without_trailing_user_turn(found: Conversation) -> Conversation:
    """``found`` up to its last answer.

    Raises:
        RecordError: it has no answer.
    """
    turns = found.turns[:-1] if found.turns[-1].role == "user" else found.turns
    if not any(turn.role == "assistant" for turn in turns):
        raise RecordError("no assistant turn")
    return replace(found, turns=turns)


def names_to_exclude(paths: Sequence[Path]) -> set[str]:
    """All that the conversations in files are `Conversation.known_as`; of a record that cannot be used its id.

    Raises:
        GriffinError: a file cannot be read, or names none.
    """
    names: set[str] = set()
    for path in paths:
        found: set[str] = set()
        for record in read_source(str(path)):
            if isinstance(record, Conversation):
                found |= record.known_as
            elif record.id is not None and not record.id.isdecimal():
                found.add(_family(record.id))
        if not found:
            raise GriffinError(f"{path}: names no conversation to exclude")
        names |= found
    return names


def _convert(record: object, source: str, index: int) -> Record:
    if isinstance(record, RecordError):
        return Skipped(source, index, str(record))
    try:
        return conversation(record)
    except RecordError as error:
        return Skipped(source, index, str(error), _name(record) if isinstance(record, Mapping) else None)


def _raw_turns(record: Mapping[str, Any]) -> list[Any]:
    given = [
        record[key] for key in ("conversations", "conversation", "messages") if record.get(key) is not None
    ]
    for turns in given:
        if isinstance(turns, list) and turns:
            return turns
    if isinstance(record.get("turns"), list) and record["turns"]:
        return [{"role": "user", "content": turn} for turn in record["turns"]]
    if record.get("prompt") is not None:
        return [{"role": "user", "content": record["prompt"]}]
    if given:
        raise RecordError("no turns")
    raise RecordError("none of the fields conversations, messages, turns, prompt")


def _given(record: Mapping[str, Any], *names: str) -> Any:
    """The first of the fields ``names`` that is not null, or None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def _turns(raw_turns: Sequence[Any]) -> list[Turn]:
    """The turns up to the first that cannot be used; RecordError where no answer came before that one."""
    turns: list[Turn] = []
    for raw in raw_turns:
        try:
            turns.append(_turn(raw))
        except RecordError:
            if not any(turn.role == "assistant" for turn in turns):
                raise
            break
    return turns


def _turn(raw: object) -> Turn:
    if not isinstance(raw, Mapping):
        raise RecordError("a turn is not an object")
    role = ROLES.get(str(_given(raw, "from", "role")))
    if role is None:
        raise RecordError("a turn with an unknown role")
    content = _given(raw, "value", "content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise RecordError("a turn without text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("broken UTF-8") from error
    token_ids = raw.get("token_ids") if role == "assistant" else None
    if token_ids is not None:
        if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
            raise RecordError("token_ids is not a list of integers")
        token_ids = tuple(token_ids) or None
    return Turn(role, content, token_ids, cut=raw.get("finish_reason") == "length")


def _records(file: IO[bytes]) -> Iterator[object]:
    """JSON values of a file in order; a `RecordError` in the place of each that cannot be read."""
    chunks = _chunks(file)
    head = b""
    for chunk in chunks:
        if isinstance(chunk, RecordError):
            yield chunk
            return
        head += chunk
        if head.strip():
            break
    head = head.removeprefix(codecs.BOM_UTF8)
    split = _array_records if head.lstrip().startswith(b"[") else _line_records

    def all_chunks() -> Iterator[bytes | RecordError]:
        yield head
        yield from chunks

    yield from split(all_chunks())


def _chunks(file: IO[bytes]) -> Iterator[bytes | RecordError]:
    start = file.read(2)
    file.seek(0)
    # as it comes: what was decompressed before the damage would be lost in a chunk that is being filled
    read = gzip.GzipFile(fileobj=file).read1 if start == b"\x1f\x8b" else file.read
    while True:
        try:
            chunk = read(_CHUNK)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield RecordError("the compressed file is damaged or ends early from here on")
            return
        if not chunk:
            return
        yield chunk


def _line_records(chunks: Iterator[bytes | RecordError]) -> Iterator[object]:
    # of the line that goes on in the next chunk; of one that is too long only its length
    parts: list[bytes] = []
    size = 0
    for chunk in chain(chunks, [b"\n"]):
        if isinstance(chunk, RecordError):
            yield chunk
            return
        *ends, beginning = chunk.split(b"\n")
        for end in ends:
            line = b"".join([*parts, end])
            if size + len(end) > MAX_RECORD:
                yield RecordError(f"a line of more than {MAX_RECORD >> 20} MiB")
            elif line.strip():
                yield _line_record(line)
            parts, size = [], 0
        size += len(beginning)
        parts.append(beginning)
        if size > MAX_RECORD:
            parts.clear()


def _line_record(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return RecordError("broken UTF-8")
    except (ValueError, RecursionError):
        return RecordError("not JSON")


def _record_like(text: str, position: int) -> re.Pattern[str]:
    """How a record begins: with a field that is known for it, or as the one at ``position`` does."""
    first = _FIRST_FIELD.match(text, position)
    names = {*_FIRST_FIELDS, *(first.groups() if first else ())}
    return re.compile(rf'\{{\s*"({"|".join(map(re.escape, names))})"\s*:')


def _array_records(chunks: Iterator[bytes | RecordError]) -> Iterator[object]:
    """Elements of a JSON array that may be cut anywhere; broken UTF-8 becomes lone surrogates."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    parser = json.JSONDecoder()
    text, position, ended = "", 0, False
    damage: RecordError | None = None

    def more() -> None:
        nonlocal text, position, ended, damage
        # Doubling what is read keeps the cost of retrying a long record linear in its length.
        wanted = max(_CHUNK, len(text) - position)
        parts, size = [text[position:]], 0
        while size < wanted and not ended:
            chunk = next(chunks, None)
            if chunk is None or isinstance(chunk, RecordError):
                ended, damage = True, chunk
            else:
                parts.append(decode(chunk))
                size += len(parts[-1])
        text, position = "".join(parts), 0

    more()
    position = text.index("[") + 1
    while True:
        while (position < len(text) and text[position] in " \t\r\n,") or (
            position == len(text) and not ended
        ):
            if position < len(text):
                position += 1
            else:
                more()
        if position == len(text):
            break
        if text[position] in "[]":
            # Arrays one behind the other, as `cat` makes them of files.
            position += 1
            continue
        try:
            value, position = parser.raw_decode(text, position)
            yield value
        except (ValueError, RecursionError) as error:
            unfinished = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
            )
            if unfinished and not ended and len(text) - position < MAX_RECORD:
                more()
                continue
            if unfinished and ended:
                yield damage or RecordError("the file ends inside this record")
                return
            yield RecordError("not JSON")
            next_record = _record_like(text, position)
            start = next_record.search(text, position + 1)
            while start is None and not ended:
                position = max(position + 1, len(text) - 64)
                more()
                start = next_record.search(text, position)
            if start is None:
                return
            position = start.start()
    if damage:
        yield damage
