"""Reference layout to served layout: the same tensors behind a config that vLLM reads by itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from griffin_vllm.checkpoint import (
    CONFIG_FILE,
    EMBEDDINGS,
    SAFETENSORS_FILE,
    Head,
    atomic_folder,
    load_tensors,
    open_head,
    save_head,
)


def convert(source: Path, destination: Path, target: str | None = None) -> Head:
    """Write the head in ``source`` (either layout) to ``destination`` in the served layout.

    Weights keep their dtype; the copy of the target's embeddings is left out. ``target`` (folder or
    Hub id) is written into the config, so that ``vllm serve DESTINATION`` knows what to serve.

    Raises:
        GriffinError: ``source`` is not a GRIFFIN head.
    """
    head = open_head(source)
    config = head.config.model_copy(update={"target": target}) if target else head.config
    tensors = load_tensors(head.weights)
    tensors.pop(EMBEDDINGS, None)
    save_head(destination, config.to_served(), tensors, dtype=None)
    return open_head(destination)


def cached_served_layout(head: Head, cache: Path) -> Path:
    """Folder of ``head`` in the served layout: its own, or one below ``cache`` made on first use.

    Safetensors are linked to, not copied. The cache entry is named by what was converted, so a head
    that changes on disk gets a new one.
    """
    if head.is_served_layout:
        return head.folder
    served = json.dumps(head.config.to_served(), indent=2) + "\n"
    stat = head.weights.stat()
    identity = f"{head.weights}\n{stat.st_size}\n{stat.st_mtime_ns}\n{served}"
    folder = cache / f"{head.folder.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    if head.weights.suffix == ".safetensors":
        with atomic_folder(folder) as staging:
            (staging / SAFETENSORS_FILE).symlink_to(head.weights)
            (staging / CONFIG_FILE).write_text(served, encoding="utf-8")
    else:
        convert(head.folder, folder)
    return folder
