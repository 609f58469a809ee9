"""Prompt files and vLLM's named data sets, read into conversations of one or more user turns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin_vllm.errors import GriffinError

NAMED_PARTS = {"openai/gsm8k": {"dataset_split": "test", "dataset_subset": "main"}}
FORMS = "`turns` (MT-bench), `prompt`, or `conversations` (ShareGPT)"


@dataclass(frozen=True)
class Conversation:
    """What a user says, turn by turn; the answers in between come from the model."""

    id: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    name: str
    conversations: tuple[Conversation, ...]


def read_prompts(
    source: str, limit: int | None = None, target: str | None = None, max_turns: int | None = None
) -> PromptSet:
    """The first ``limit`` conversations of a file, or of a data set that vLLM's benchmarks know by name,
    each with its first ``max_turns`` turns.

    A file holds a JSON array or one JSON object a line, each with one of ``FORMS``. vLLM's loaders of named
    data sets ask for the tokenizer of ``target``.

    Raises:
        GriffinError: no such file or data set, or a record of another form.
    """
    path = Path(source)
    if not path.is_file():
        return _read_named(source, limit, target)
    conversations: list[Conversation] = []
    for number, record in enumerate(_records(path), start=1):
        if len(conversations) == limit:
            break
        turns = _turns(record)
        if not turns:
            raise GriffinError.at(path, f"record {number}", record, f"an object with {FORMS}")
        name = record.get("question_id", record.get("id", number))
        conversations.append(Conversation(str(name), tuple(turns[:max_turns])))
    if not conversations:
        raise GriffinError(f"{path}: holds no prompts")
    return PromptSet(path.stem, tuple(conversations))


def _records(path: Path) -> list[Any]:
    number = 1
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        records = []
        for number, line in enumerate(text.split("\n"), start=1):  # noqa: B007 - named in the error
            if line.strip():
                records.append(json.loads(line))
        return records
    except json.JSONDecodeError as error:
        raise GriffinError(f"{path}: line {number + error.lineno - 1}: is not JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise GriffinError(f"{path}: is no text file ({GriffinError.reason(error)})") from error


def _turns(record: Any) -> list[str]:
    if not isinstance(record, dict):
        return []
    if "turns" in record:
        turns = record["turns"]
    elif "prompt" in record:
        turns = [record["prompt"]]
    else:
        messages = record.get("conversations")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return []
        turns = [message.get("value") for message in messages if message.get("from") in ("human", "user")]
    return turns if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns) else []


def _read_named(name: str, limit: int | None, target: str | None) -> PromptSet:
    from transformers import AutoTokenizer
    from vllm.benchmarks import datasets

    # vLLM does not export all of them
    known = {
        path: loader
        for loader in datasets.HuggingFaceDataset.__subclasses__()
        for path in loader.SUPPORTED_DATASET_PATHS
    }
    if name not in known:
        raise GriffinError(f"{name}: is neither a file nor a data set that vLLM's benchmarks know by name")
    part = NAMED_PARTS.get(name, {"dataset_split": "train"})
    loaded = known[name](dataset_path=name, random_seed=0, **part)
    samples = loaded.sample(
        tokenizer=AutoTokenizer.from_pretrained(target), num_requests=limit or 80, skip_chat_template=True
    )
    prompts = (Conversation(str(i), (sample.prompt,)) for i, sample in enumerate(samples))
    return PromptSet(name.rsplit("/", 1)[-1], tuple(prompts))
