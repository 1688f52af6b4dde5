"""Weights as hubs publish them: shards, variants, folders with several models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clip_model import CLIPModel
from cliptune.model.weights import read_weights
from tests.helpers.peers import HuggingFace, OpenClip, assert_same_features


@pytest.fixture
def peer() -> HuggingFace:
    return HuggingFace()


def test_shards_are_read_by_their_index(peer: HuggingFace, tmp_path: Path) -> None:
    peer.save(tmp_path, max_shard_size="5MB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    for path in (tmp_path, tmp_path / "model.safetensors.index.json", shards[0]):
        assert_same_features(CLIPModel(pretrained=path), peer)
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[-1].name}: not there, but model"):
        CLIPModel(pretrained=tmp_path)


def test_shards_of_torch_files(peer: HuggingFace, tmp_path: Path) -> None:
    peer.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    files: dict[str, Any] = {}
    for number, (name, value) in enumerate(peer.state.items()):
        files.setdefault(f"pytorch_model-0000{number % 2 + 1}-of-00002.bin", {})[name] = value
    for file, tensors in files.items():
        torch.save(tensors, tmp_path / file)
    names = {name: file for file, tensors in files.items() for name in tensors}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert_same_features(CLIPModel(pretrained=tmp_path), peer)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("[", "not valid JSON at line 1, column 2"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "not an index of shards: it has no weight_map"),
        ('{"weights": {"a": "b.bin"}}', "not an index of shards: it has no weight_map"),
        ('{"weight_map": ["b.bin"]}', "not an index of shards: it has no weight_map"),
        ('{"weight_map": {}}', "not an index of shards: its weight_map lists no files of its folder"),
        ('{"weight_map": {"a": "../x.bin"}}', "not an index of shards: its weight_map lists no files of its folder"),
        ('{"weight_map": {"a": ["b"]}}', "not an index of shards: its weight_map lists no files of its folder"),
        (" " * 2**25, "not an index of shards: it has 34 MB"),
    ],
)
def test_an_index_that_is_none_is_refused_by_what_is_wrong_with_it(index: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: {reason}"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp16.bin", "my-own-name.safetensors"])
def test_variants_and_the_only_file(name: str, peer: HuggingFace, tmp_path: Path) -> None:
    peer.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(peer.state, tmp_path / name)
    else:
        save_file(peer.state, tmp_path / name)
    assert_same_features(CLIPModel(pretrained=tmp_path), peer)
    assert_same_features(CLIPModel(pretrained=tmp_path / name), peer)


def test_shards_of_a_variant(peer: HuggingFace, tmp_path: Path) -> None:
    peer.save(tmp_path, max_shard_size="5MB", variant="fp16")
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert_same_features(CLIPModel(pretrained=tmp_path), peer)


def test_the_whole_precision_goes_before_a_variant(peer: HuggingFace, tmp_path: Path) -> None:
    peer.save(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    assert_same_features(CLIPModel(pretrained=tmp_path), peer)


def test_a_folder_of_sentence_transformers(peer: HuggingFace, tmp_path: Path) -> None:
    peer.save(tmp_path / "0_CLIPModel")
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert_same_features(CLIPModel(pretrained=tmp_path), peer)


def test_of_two_models_the_whole_one_is_taken(peer: HuggingFace, tmp_path: Path) -> None:
    """timm's folders hold an image tower beside it; others a text tower under the name that comes first."""
    whole = OpenClip()
    whole.save(tmp_path / "timm")
    save_file({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "timm" / "model.safetensors")
    assert_same_features(CLIPModel(pretrained=tmp_path / "timm"), whole)
    peer.save(tmp_path / "bin")
    text = {name: value for name, value in peer.state.items() if name.startswith("text")}
    save_file(text, tmp_path / "bin" / "model.safetensors")
    with pytest.raises(ValueError, match="one tower"):
        CLIPModel(pretrained=tmp_path / "bin")
    torch.save(peer.state, tmp_path / "bin" / "pytorch_model.bin")
    assert_same_features(CLIPModel(pretrained=tmp_path / "bin"), peer)


def test_a_damaged_file_is_not_passed_over(peer: HuggingFace, tmp_path: Path) -> None:
    peer.save(tmp_path)
    torch.save(peer.state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        CLIPModel(pretrained=tmp_path)


def test_a_folder_without_weights_says_where_some_are(peer: HuggingFace, tmp_path: Path) -> None:
    for part in ("text_encoder", "image_encoder"):
        peer.save(tmp_path / part)
    with pytest.raises(FileNotFoundError, match=r"no weights file in this folder.*name one of .*text_encoder"):
        read_weights(tmp_path)
    shutil.rmtree(tmp_path / "text_encoder")
    for name in ("epoch_1.pt", "epoch_2.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"name one of .*epoch_1\.pt; .*epoch_2\.pt"):
        read_weights(tmp_path)
