"""From either layout to the served one, behind whose config vLLM finds the tensors by itself; with fewer draft tokens
if wanted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from griffin_vllm.checkpoint import (
    CARD_FILE,
    CONFIG_FILE,
    EMBEDDINGS,
    SAFETENSORS_FILE,
    TUNING_FILE,
    Head,
    draft_vocabulary_tensors,
    load_tensors,
    open_head,
    read_target_config,
    save_head,
)
from griffin_vllm.config import HeadConfig, target_sizes
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import atomic_folder, may_be_replaced, read_json

_REPLACED = {CONFIG_FILE, SAFETENSORS_FILE, CARD_FILE}


def convert(
    source: Path,
    destination: Path,
    target: str | None = None,
    draft_vocabulary: torch.Tensor | None = None,
) -> Head:
    """Write the head in ``source`` (either layout) to ``destination`` in the served layout.

    Weights keep their dtype, and the model card goes along; the copy of the target's embeddings is left out.
    ``target`` (folder or Hub id) is written into the config, so that ``vllm serve DESTINATION`` knows what to serve,
    and so is its model type where this machine has the target. With ``draft_vocabulary`` (target
    ids (N,) int64, ascending) the head drafts these tokens only.

    Raises:
        GriffinError: ``source`` is not a GRIFFIN head, or one for a target of another family or other sizes, or
            ``destination`` holds something else than a head, or cannot be written.
    """
    head, target_config = open_for(source, target)
    check_destination(destination)
    tensors = load_tensors(head.weights)
    tensors.pop(EMBEDDINGS, None)
    changes: dict[str, object] = {"target": target} if target else {}
    if target and target_config:
        changes["target_model_type"] = target_config["model_type"]
    if draft_vocabulary is not None:
        changes["draft_vocab_size"] = len(draft_vocabulary)
        tensors |= draft_vocabulary_tensors(draft_vocabulary, head.config.vocab_size)
    config = head.config.model_copy(update=changes)
    save_head(destination, config.to_served(), tensors, _card(head, config), dtype=None)
    return open_head(destination)


def _card(head: Head, converted: HeadConfig) -> str | None:
    """What the model card of ``head`` says of the converted head."""
    path = head.folder / CARD_FILE
    if not path.is_file():
        return None
    card = path.read_text(encoding="utf-8", errors="replace")
    if converted.draft_vocab_size != head.config.draft_vocab_size:
        card += (
            f"\n`griffin convert` then reduced the draft vocabulary to {converted.draft_vocab_size} of "
            f"{converted.vocab_size} tokens.\n"
        )
    return card


def open_for(source: Path, target: str | None) -> tuple[Head, dict[str, Any]]:
    """The head in ``source``, and the config of ``target`` or else of the target that it names (empty where this
    machine has none).

    Raises:
        GriffinError: it is not a GRIFFIN head, or does not fit that target.
    """
    head = open_head(source)
    named = target or head.config.target
    target_config = read_target_config(named, download=False) if named else {}
    if named and target_config:
        head.config.check_target(source / CONFIG_FILE, *target_sizes(target_config, named))
    return head, target_config


def check_destination(folder: Path) -> None:
    """Raise GriffinError unless ``folder`` is new, or holds a head and nothing else: then it may be replaced."""
    if not may_be_replaced(folder, _REPLACED):
        more = sorted({path.name for path in folder.iterdir()} - _REPLACED) if folder.is_dir() else []
        raise GriffinError.at(
            "griffin convert",
            "DST",
            f"{folder}{f' with {more[0]}' if more else ''}",
            "a new folder, or one with nothing but a head to replace",
        )


def cached_served_layout(head: Head, cache: Path) -> Path:
    """A folder in which vLLM reads nothing of ``head`` but what was checked: its own, or one below ``cache``.

    The one in the cache is made on first use; it links to safetensors instead of copying them, and is named
    by what was converted, so a head that changes on disk gets a new one.

    Raises:
        GriffinError: the cache cannot be written.
    """
    if _is_served_as_it_is(head):
        return head.folder
    served = json.dumps(head.config.to_served(), indent=2) + "\n"
    stat = head.weights.stat()
    identity = f"{head.weights}\n{stat.st_size}\n{stat.st_mtime_ns}\n{served}"
    folder = cache / f"{head.folder.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    try:
        # Another server may be making the same one, or have it in use by now.
        with atomic_folder(folder, keeps=True) as staging:
            if head.weights.suffix == ".safetensors":
                (staging / SAFETENSORS_FILE).symlink_to(head.weights)
                (staging / CONFIG_FILE).write_text(served, encoding="utf-8")
            else:
                convert(head.folder, staging)
    except OSError as error:
        raise GriffinError.unwritable(folder, error) from error
    return folder


def _is_served_as_it_is(head: Head) -> bool:
    """Whether the folder holds our config to the letter, and no other weights, index or config beside it.

    vLLM would read whatever else a config says (code to import, a quantisation), and other weights files.
    """
    beside = {path.name for path in head.folder.iterdir() if path.suffix in (".bin", ".json", ".safetensors")}
    return (
        beside - {TUNING_FILE} == {CONFIG_FILE, SAFETENSORS_FILE}
        and read_json(head.folder / CONFIG_FILE) == head.config.to_served()
    )
