"""Features on disk are whole, or the run that wants them does not start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from griffin_vllm.errors import GriffinError
from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.features import (
    MANIFEST,
    SHARED,
    CacheManifest,
    FeatureCache,
    check_caches,
    is_complete,
    target_digest,
    write_cache,
)
from griffin_vllm.training.sources import TargetSource
from griffin_vllm.training.target import Target, target_config
from tests.full_disk import full_disk

SHARD = "features-00000.safetensors"


def write(folder: Path, target: Path, data: Path) -> CacheManifest:
    dataset = TokenDataset(data, "train")
    manifest = CacheManifest.of(target, target_config(target), dataset, 4)
    tokens = [dataset[i][0] for i in range(len(dataset))]
    write_cache(folder, Target(target, torch.device("cpu")), tokens, manifest)
    return manifest


def test_processes_write_their_shards_of_one_cache_which_gives_every_sample_its_own_features(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("griffin_vllm.training.features.SHARD_TOKENS", 200)
    dataset, device = TokenDataset(data, "train"), torch.device("cpu")
    tokens = [dataset[i][0] for i in range(len(dataset))]
    manifest = CacheManifest.of(target, target_config(target), dataset, 4)
    for rank in (1, 0):
        assert not is_complete(tmp_path, manifest)
        write_cache(tmp_path, Target(target, device), tokens, manifest, rank=rank, ranks=2)
    assert is_complete(tmp_path, manifest)
    assert len(list(tmp_path.glob("features-*"))) > 2
    cache = FeatureCache(tmp_path, manifest)
    source = TargetSource(Target(target, device, torch.float32), 4)
    for i in range(len(dataset)):
        found, soft = cache[i]
        [(expected, expected_soft)] = source.features([i], [tokens[i]])
        torch.testing.assert_close(found.float(), expected.float(), atol=0.05, rtol=0.05)
        torch.testing.assert_close(soft.probabilities, expected_soft.probabilities, atol=0.02, rtol=0.05)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Copies: what is mapped to memory cannot be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lose_a_tensor(path: Path) -> None:
    save_file({name: tensor for name, tensor in read(path).items() if name != "top_ids"}, path)


def lose_a_row(path: Path) -> None:
    save_file({name: tensor[1:].clone() for name, tensor in read(path).items()}, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": truncate,
    "overwritten": lambda path: path.write_bytes(b"\xff" * 100),
    "without a tensor": lose_a_tensor,
    "with a row less": lose_a_row,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_shard_is_named_at_the_start_and_written_again_once_removed(
    name: str, target: Path, data: Path, tmp_path: Path
) -> None:
    manifest = write(tmp_path, target, data)
    shard = tmp_path / SHARD
    before = read(shard)
    DAMAGES[name](shard)
    with pytest.raises(
        GriffinError, match=rf"{SHARD}: (is damaged|content is) .*remove it and it is written"
    ):
        FeatureCache(tmp_path, manifest)
    shard.unlink()
    assert not is_complete(tmp_path, manifest)
    write(tmp_path, target, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(shard).items())


def test_damaged_shared_weights_are_named(target: Path, data: Path, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, write(tmp_path, target, data))
    truncate(tmp_path / SHARED)
    with pytest.raises(GriffinError, match=rf"{SHARED}: is damaged .*remove it and it is written again"):
        cache.shared_weights()
    (tmp_path / SHARED).unlink()
    assert not is_complete(tmp_path, cache.manifest)


def test_full_disk_leaves_no_half_of_a_shard(target: Path, data: Path, tmp_path: Path) -> None:
    with full_disk(4096), pytest.raises(GriffinError, match=r"safetensors: cannot be written \("):
        write(tmp_path, target, data)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert is_complete(tmp_path, write(tmp_path, target, data))


def test_room_on_the_disk_is_asked_for_all_splits_together_and_only_for_what_is_missing(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = target_config(target)
    caches = {
        tmp_path / "new" / split: CacheManifest.of(target, config, TokenDataset(data, split), 4)
        for split in ("train", "validation")
    }
    sizes = {folder.name: manifest.size_in_bytes() for folder, manifest in caches.items()}
    disk = SimpleNamespace(free=max(sizes.values()))
    monkeypatch.setattr("griffin_vllm.training.features.shutil.disk_usage", lambda path: disk)
    with pytest.raises(GriffinError, match=r"train, .*validation: the feature cache takes .* GB more"):
        check_caches(caches)
    assert not (tmp_path / "new").exists()
    disk.free = sum(sizes.values())
    check_caches(caches)
    write(tmp_path / "new" / "train", target, data)
    disk.free = sizes["validation"]
    check_caches(caches)
    disk.free -= 1
    with pytest.raises(GriffinError, match="the feature cache takes"):
        check_caches(caches)


def test_split_without_samples_has_an_empty_cache(target: Path, data: Path, tmp_path: Path) -> None:
    manifest = CacheManifest.of(target, target_config(target), TokenDataset(data, "train"), 4)
    manifest = replace(manifest, lengths=[])
    write_cache(tmp_path, Target(target, torch.device("cpu")), [], manifest)
    assert is_complete(tmp_path, manifest)
    assert FeatureCache(tmp_path, manifest).shared_weights().embed_tokens.shape[1] == manifest.hidden_size


def test_cache_of_another_target_in_a_folder_of_the_same_name_is_refused(
    target: Path, data: Path, tmp_path: Path
) -> None:
    write(tmp_path / "features", target, data)
    other = tmp_path / "other" / target.name
    shutil.copytree(target, other)
    assert target_digest(other) == target_digest(target)
    tensors = read(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GriffinError, match="holds features of another target or data set"):
        write(tmp_path / "features", other, data)


def test_cache_of_a_target_whose_folder_was_renamed_is_read(target: Path, data: Path, tmp_path: Path) -> None:
    write(tmp_path / "features", target, data)
    renamed = Path(shutil.copytree(target, tmp_path / "renamed"))
    asked = CacheManifest.of(renamed, target_config(renamed), TokenDataset(data, "train"), 4)
    assert is_complete(tmp_path / "features", asked)


def test_cache_of_the_same_weights_behind_another_config_is_refused(
    target: Path, data: Path, tmp_path: Path
) -> None:
    write(tmp_path / "features", target, data)
    other = Path(shutil.copytree(target, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(GriffinError, match="holds features of another target or data set"):
        write(tmp_path / "features", other, data)
    path = tmp_path / "features" / MANIFEST
    stored = json.loads(path.read_text())
    del stored["target_config"]
    path.write_text(json.dumps(stored))
    asked = CacheManifest.of(other, target_config(other), TokenDataset(data, "train"), 4)
    assert is_complete(tmp_path / "features", asked)


def test_a_process_that_was_killed_while_it_wrote_a_shard_leaves_nothing_behind_for_good(
    target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("griffin_vllm.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, target, data)
    manifest = write(tmp_path, target, data)
    assert is_complete(tmp_path, manifest)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix not in (".safetensors", ".json")]


def test_hub_ids_of_one_model_name_do_not_share_a_cache(target: Path, data: Path, tmp_path: Path) -> None:
    dataset, config = TokenDataset(data, "train"), target_config(target)
    one, other = (CacheManifest.of(Path(name), config, dataset, 4) for name in ("a/model", "b/model"))
    assert one.describes(json.loads(json.dumps(asdict(one))))
    assert not other.describes(json.loads(json.dumps(asdict(one))))


def test_cache_that_is_older_than_the_digest_of_the_weights_is_read(
    target: Path, data: Path, tmp_path: Path
) -> None:
    manifest = write(tmp_path, target, data)
    stored = json.loads((tmp_path / MANIFEST).read_text())
    assert stored.pop("target_weights") == manifest.target_weights
    (tmp_path / MANIFEST).write_text(json.dumps(stored))
    assert is_complete(tmp_path, manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(stored | {"top_k": 5}))
    assert not is_complete(tmp_path, manifest)
