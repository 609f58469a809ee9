"""A head on disk: tensor names and shapes, finding a head, reading it safely, writing it whole."""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from griffin_vllm.config import METHOD, HeadConfig, HeadKind
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import atomic_folder, exists_here, read_json, sha256

CONFIG_FILE = "config.json"
# What `griffin tune` writes beside a head; vLLM never reads it.
TUNING_FILE = "tuning.json"
SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
CARD_FILE = "README.md"
PREFIX = "griffin:"
BUNDLED_HEADS = Path(__file__).parent / "heads"

EMBEDDINGS = "embed_tokens.weight"
# The tensor by which each kind is told from the other. An EAGLE-3 head has an `fc.weight`, too, of another shape.
MARKS: dict[HeadKind, str] = {"griffin": "fc.mlp.up_proj.weight", "eagle": "fc.weight"}
# vLLM's convention: target id = draft id + d2t[draft id]; t2d marks the target ids that can be drafted.
DRAFT_TO_TARGET, TARGET_TO_DRAFT = "d2t", "t2d"

_TITLES: dict[HeadKind, str] = {"griffin": "a GRIFFIN head", "eagle": "an EAGLE head of vLLM's"}
_FLOATS = ({"F16", "BF16", "F32", "FLOAT16", "BFLOAT16", "FLOAT32"}, "floats")
_DTYPES = {
    DRAFT_TO_TARGET: ({"I64", "I32", "INT64", "INT32"}, "integers"),
    TARGET_TO_DRAFT: ({"BOOL"}, "booleans"),
}
# Tensor name -> (shape, dtype name).
TensorHeaders = dict[str, tuple[tuple[int, ...], str]]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?")


def tensor_shapes(config: HeadConfig, kind: HeadKind = "griffin") -> dict[str, tuple[int, ...]]:
    """Every tensor that a head of this kind must have, under its published name, with its shape.

    An EAGLE head is vLLM's (``llama_eagle.py``): unlike the published ones its ``fc`` has no bias.
    """
    d, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    if kind == "griffin":
        outputs = 2  # predict and regress
        fusion: dict[str, tuple[int, ...]] = {
            "fc.fc.weight": (d, 2 * d),
            "fc.fc.bias": (d,),
            "fc.post_attention_layernorm.weight": (d,),
            "fc.mlp.input_layernorm.weight": (d,),
            MARKS["griffin"]: (inner, 2 * d),
            "fc.mlp.down_proj.weight": (d, inner),
        }
    else:
        outputs, fusion = 1, {MARKS["eagle"]: (d, 2 * d)}
    shapes = fusion | {
        "layers.0.self_attn.q_proj.weight": (q, d),
        "layers.0.self_attn.k_proj.weight": (kv, d),
        "layers.0.self_attn.v_proj.weight": (kv, d),
        "layers.0.self_attn.o_proj.weight": (d, q),
        "layers.0.post_attention_layernorm.weight": (d,),
        "layers.0.mlp.gate_proj.weight": (inner, d),
        "layers.0.mlp.up_proj.weight": (inner, d),
        "layers.0.mlp.down_proj.weight": (outputs * d, inner),
    }
    if config.qkv_bias:
        shapes["layers.0.self_attn.q_proj.bias"] = (q,)
        shapes["layers.0.self_attn.k_proj.bias"] = (kv,)
        shapes["layers.0.self_attn.v_proj.bias"] = (kv,)
    if not config.drafts_all_tokens:
        shapes[DRAFT_TO_TARGET] = (config.draft_vocab_size,)
        shapes[TARGET_TO_DRAFT] = (config.vocab_size,)
    return shapes


@dataclass(frozen=True)
class Head:
    """A head folder whose config and tensor headers have been checked against each other."""

    folder: Path
    weights: Path
    config: HeadConfig

    @property
    def is_served_layout(self) -> bool:
        """Whether it is laid out as `griffin convert` writes heads, and not as the GRIFFIN authors do."""
        served = "speculators_model_type" in read_json(self.folder / CONFIG_FILE)
        return served and self.weights.name == SAFETENSORS_FILE


def bundled_heads() -> list[str]:
    """Names of the heads that ship with this package."""
    return sorted(path.parent.name for path in BUNDLED_HEADS.glob(f"*/{CONFIG_FILE}"))


def asks_for_griffin(method: Any, model: Any) -> bool:
    """Whether a speculative ``method`` and ``model``, each as an operator gave it or None, mean a GRIFFIN head."""
    return method == METHOD or (isinstance(model, str) and model.startswith(PREFIX))


def find_head(name: str) -> Path:
    """Folder of the head called ``name``: bundled name, folder, or Hub id ``org/name[@revision]``, with or without
    ``griffin:`` before it.

    Raises:
        GriffinError: nothing of that name, or the Hub cannot be reached.
    """
    name = name.removeprefix(PREFIX)
    if not name.strip():
        raise GriffinError(
            f"no head named after {PREFIX!r}: give a bundled name "
            f"({', '.join(bundled_heads()) or 'none here'}), "
            "a folder, or a Hub id org/name"
        )
    if name in bundled_heads():
        return BUNDLED_HEADS / name
    try:
        folder = Path(name).expanduser()
        if folder.exists():
            return folder
    except (OSError, RuntimeError, ValueError) as error:
        raise GriffinError(
            f"{PREFIX}{name[:80]}: cannot be looked up ({GriffinError.reason(error)})"
        ) from error
    if _HUB_ID.fullmatch(name):
        return _download(name)
    near = difflib.get_close_matches(name, bundled_heads(), n=1, cutoff=0.4)
    hint = (
        f"did you mean {PREFIX}{near[0]}?"
        if near
        else f"bundled heads: {', '.join(bundled_heads()) or 'none'}"
    )
    raise GriffinError(f"{PREFIX}{name}: no bundled head, folder or Hub id of that name; {hint}")


def open_head(folder: Path, kind: HeadKind = "griffin") -> Head:
    """Check a head folder of either layout without loading its weights.

    Raises:
        GriffinError: something is missing, of the wrong shape, or not a head of this kind, or the draft
            vocabulary is not a part of the target's.
    """
    try:
        is_folder = folder.is_dir()
        folder = folder.resolve(strict=True) if is_folder else folder
        weights = _weights_file(folder)
    except (OSError, RuntimeError) as error:
        raise GriffinError(f"{folder}: cannot be read ({GriffinError.reason(error)})") from error
    if not is_folder:
        raise GriffinError(f"{folder}: is not a folder; a head is a folder with {CONFIG_FILE} and weights")
    if weights is None:
        raise GriffinError(f"{folder}: has no {SAFETENSORS_FILE} or {PICKLE_FILE}")
    # Other speculators' configs have features that ours lacks: say what the head is before complaining of those.
    found = _tensor_headers(weights)
    if MARKS[kind] not in found:
        raise GriffinError(
            f"{weights}: has no {MARKS[kind]}, so it is not {_TITLES[kind]}{_other_model(set(found))}"
        )
    config = HeadConfig.read(folder / CONFIG_FILE)
    _check_tensors(weights, found, config, kind)
    head = Head(folder, weights, config)
    _check_draft_vocabulary(head)
    return head


def read_target_config(target: str, *, download: bool) -> dict[str, Any]:
    """The ``config.json`` of a target, a folder or Hub id; empty where it is not on this machine and nothing may be
    downloaded.

    Raises:
        GriffinError: there is no such target, or its config cannot be read.
    """
    if exists_here(target):
        return read_json(Path(target) / CONFIG_FILE)
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(target, CONFIG_FILE, local_files_only=not download)
    except Exception as error:  # offline, no such repository, no access: the client has one class for each
        if not download:
            return {}
        raise GriffinError(
            f"{target}: is no folder and not on the Hub ({GriffinError.reason(error)})"
        ) from error
    return read_json(Path(path))


def is_griffin_head(folder: Path) -> bool:
    """Whether ``folder`` is a GRIFFIN head, by its config or its tensor names; False for anything else."""
    try:
        if read_json(folder / CONFIG_FILE).get("speculators_model_type") == METHOD:
            return True
        weights = _weights_file(folder)
        return weights is not None and MARKS["griffin"] in _tensor_headers(weights)
    except (GriffinError, OSError):
        return False


def _weights_file(folder: Path) -> Path | None:
    """The one that counts where a folder has two. Raises OSError where it cannot be looked up."""
    return next(
        (folder / name for name in (SAFETENSORS_FILE, PICKLE_FILE) if (folder / name).is_file()), None
    )


def load_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a weights file (all, or those called ``names``), on CPU, in their stored dtype; a pickle
    may hold tensors only.

    Raises:
        GriffinError: truncated, or not a weights file.
    """
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    state = _load_pickle(path)
    return {name: state[name] for name in names or state}


def check_values(head: Head) -> None:
    """Check what the headers of an opened head do not show; reads the whole weights file.

    Raises:
        GriffinError: NaN or infinity in a tensor.
    """
    # the copy of the embeddings is the target's business; nothing here reads it
    names = _tensor_headers(head.weights).keys() - {EMBEDDINGS}
    for name, tensor in load_tensors(head.weights, names).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise GriffinError.at(head.weights, f"tensor {name}", "NaN or infinite", "finite numbers")


def weights_digest(*files: Path) -> str:
    """Start of the SHA-256 of weights files: a head's name may stay when it is trained anew."""
    return sha256(*files)[:16]


def draft_vocabulary(head: Head) -> torch.Tensor | None:
    """Target ids (draft_vocab_size,) int64, ascending, of the tokens that ``head`` drafts; None: all."""
    if head.config.drafts_all_tokens:
        return None
    offsets = load_tensors(head.weights, [DRAFT_TO_TARGET])[DRAFT_TO_TARGET].long()
    return offsets + torch.arange(len(offsets))


def draft_vocabulary_tensors(target_ids: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
    """What a checkpoint says about a draft vocabulary of ``target_ids`` (N,) int64, ascending."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    target_ids = target_ids.cpu()
    mask[target_ids] = True
    return {DRAFT_TO_TARGET: target_ids - torch.arange(len(target_ids)), TARGET_TO_DRAFT: mask}


def save_head(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    card: str | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> None:
    """Write a head folder so that a reader sees either the old one or the whole new one.

    ``config`` is the JSON object of either layout; floating-point ``tensors`` are written as ``dtype``
    (None: as they are).

    Raises:
        GriffinError: it cannot be written; an old head is untouched.
    """
    stored = {
        name: (tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    try:
        with atomic_folder(folder) as staging:
            save_file(stored, staging / SAFETENSORS_FILE, metadata={"format": "pt"})
            (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            # safetensors lets only the owner read it, and a server may run as somebody else
            shutil.copymode(staging / CONFIG_FILE, staging / SAFETENSORS_FILE)
            if card is not None:
                (staging / CARD_FILE).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise GriffinError.unwritable(folder, error) from error


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise GriffinError(
            f"{path}: is not a readable safetensors file ({GriffinError.reason(error)})"
        ) from error


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds here, and none of them is the user's business
        raise GriffinError(
            f"{path}: is not a plain PyTorch weights file; code in a pickle is never run "
            f"({GriffinError.reason(error)})"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise GriffinError.at(path, "content", type(state).__name__, "a state dict (names to tensors)")
    for name, value in state.items():
        if not _is_stored_whole(value):
            raise GriffinError.at(
                path, "a tensor's shape", {name: tuple(value.shape)}, "as many numbers in the file"
            )
    return state


def _is_stored_whole(tensor: torch.Tensor) -> bool:
    """False for what a pickle can claim at no cost in bytes: expanded, sparse and meta tensors."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _tensor_headers(path: Path) -> TensorHeaders:
    """Shape and dtype name of every tensor, without reading a safetensors file's data."""
    if path.suffix != ".safetensors":
        return {
            name: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in _load_pickle(path).items()
        }
    with _open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _check_tensors(path: Path, found: TensorHeaders, config: HeadConfig, kind: HeadKind) -> None:
    expected = tensor_shapes(config, kind)
    for name, shape in expected.items():
        if name not in found:
            raise GriffinError(f"{path}: tensor {name} is missing, expected shape {shape}")
        if found[name][0] != shape:
            raise GriffinError.at(path, f"tensor {name}", found[name][0], f"shape {shape}")
        dtypes, numbers = _DTYPES.get(name, _FLOATS)
        if found[name][1].upper() not in dtypes:
            raise GriffinError.at(path, f"dtype of {name}", found[name][1], numbers)
    extra = sorted(set(found) - set(expected) - {EMBEDDINGS})
    if extra:
        raise GriffinError.at(path, "tensors", extra[:3], f"none beyond those of {_TITLES[kind]}")
    if EMBEDDINGS in found and found[EMBEDDINGS][0] != (config.vocab_size, config.hidden_size):
        raise GriffinError.at(
            path,
            f"tensor {EMBEDDINGS}",
            found[EMBEDDINGS][0],
            f"shape {(config.vocab_size, config.hidden_size)}",
        )


def _check_draft_vocabulary(head: Head) -> None:
    target_ids, V = draft_vocabulary(head), head.config.vocab_size
    if target_ids is None:
        return
    outside = target_ids[(target_ids < 0) | (target_ids >= V)]
    if len(outside):
        raise GriffinError.at(
            head.weights,
            f"a target id in {DRAFT_TO_TARGET}",
            int(outside[0]),
            f"0 to {V - 1} (the target's vocabulary)",
        )
    # With ids in order the first of equally likely tokens is the same one in both vocabularies.
    falls = torch.nonzero(target_ids.diff() <= 0).flatten()
    if len(falls):
        first = int(falls[0])
        raise GriffinError.at(
            head.weights,
            f"the target id of draft id {first + 1} in {DRAFT_TO_TARGET}",
            int(target_ids[first + 1]),
            f"more than {int(target_ids[first])}, that of draft id {first}",
        )
    marked = load_tensors(head.weights, [TARGET_TO_DRAFT])[TARGET_TO_DRAFT]
    differs = torch.nonzero(marked != draft_vocabulary_tensors(target_ids, V)[TARGET_TO_DRAFT]).flatten()
    if len(differs):
        first = int(differs[0])
        raise GriffinError.at(
            head.weights,
            f"{TARGET_TO_DRAFT} at target id {first}",
            bool(marked[first]),
            f"what {DRAFT_TO_TARGET} says",
        )


def _other_model(names: set[str]) -> str:
    if MARKS["griffin"] in names:
        return "; it looks like a GRIFFIN head"
    if (
        any("hidden_norm" in name or "fc_norm" in name for name in names)
        or "midlayer.mlp.up_proj.weight" in names
    ):
        return "; it looks like an EAGLE-3 head (vLLM's method 'eagle3')"
    if MARKS["eagle"] in names or "fusion_fc.weight" in names:
        return "; it looks like an EAGLE or HASS head (vLLM's method 'eagle')"
    if any("medusa" in name for name in names) or any(re.fullmatch(r"\d+\.\d+\..*", n) for n in names):
        return "; it looks like Medusa heads (vLLM's method 'medusa')"
    if "model.norm.weight" in names or "lm_head.weight" in names:
        return "; it looks like a whole model"
    return ""


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=[CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE, CARD_FILE],
            )
        )
    except (
        Exception
    ) as error:  # offline, no such repository, no access: the Hub client has one class for each
        raise GriffinError(
            f"{PREFIX}{name}: is neither a folder here nor a repository that the Hugging Face Hub gave out "
            f"({GriffinError.reason(error)})"
        ) from error
