"""Another context length or resolution: positions as open_clip and Long-CLIP make them; in checkpoint and run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evaluation
import train
from clip_model import CLIPModel, add_self_test
from cliptune.model.checkpoint_file import save_checkpoint
from cliptune.model.positions import resize_image_positions, resize_text_positions
from data_loader import create_sample_dataset
from tests.helpers.launch import run_ranks
from tests.helpers.models import SMALL_RESNET, SMALL_VIT, small_architectures
from tests.helpers.peers import OpenClip, assert_same_features

__all__ = ["small_architectures"]


@pytest.mark.parametrize(("old", "new"), [(7, 7), (7, 10), (14, 7), (7, 16), (2, 3), (16, 24)])
def test_image_positions_are_open_clips(old: int, new: int) -> None:
    open_clip = pytest.importorskip("open_clip")
    positions = torch.randn(1 + old * old, 24)
    state = {"visual.positional_embedding": positions.clone()}
    open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(new, new))))
    found = resize_image_positions(positions, new)
    assert torch.allclose(found, state["visual.positional_embedding"], atol=1e-6)
    assert torch.equal(found[0], positions[0])


def long_clips(positions: Tensor) -> Tensor:
    """Long-CLIP's own loop (`load_from_clip`), written out."""
    length, kept = len(positions), 20
    new = torch.zeros(4 * length - 3 * kept, positions.shape[1])
    new[:kept] = positions[:kept]
    for i in range(length - 1 - kept):
        for quarter in range(4):
            one, other = positions[i + kept], positions[i + 1 + kept]
            new[4 * i + quarter + kept] = (4 - quarter) * one / 4 + quarter * other / 4
    for quarter in range(4):
        new[4 * length - 3 * kept - 4 + quarter] = positions[-1] + quarter * (positions[-1] - positions[-2]) / 4
    return new


def test_text_positions_are_long_clips() -> None:
    positions = torch.randn(77, 16)
    found = resize_text_positions(positions, 248)
    assert torch.allclose(found, long_clips(positions), atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"), [(77, 78), (77, 128), (77, 512), (32, 77), (16, 77), (3, 10), (21, 22), (22, 99)]
)
def test_longer_text_positions_keep_their_beginning_and_go_on_evenly(old: int, new: int) -> None:
    line = torch.arange(old, dtype=torch.float32)[:, None].repeat(1, 2)
    found = resize_text_positions(line, new)
    kept = 20 if old > 21 else old // 2
    assert len(found) == new
    assert torch.equal(found[:kept], line[:kept])
    steps = found[kept:].diff(dim=0)
    assert torch.allclose(steps, steps[0].expand_as(steps), atol=1e-4)  # of a line comes a line
    assert 0 < steps[0, 0] < 1


def test_shorter_text_positions_are_the_first_ones() -> None:
    positions = torch.randn(77, 16)
    assert torch.equal(resize_text_positions(positions, 20), positions[:20])


@pytest.mark.slow
def test_a_shorter_context_is_exact_for_texts_that_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = OpenClip().save(tmp_path)
    whole, short = CLIPModel(pretrained=folder).eval(), CLIPModel(pretrained=folder, context_length=8).eval()
    texts = ["a", "a dog on a mat", "two"]
    with torch.no_grad():
        assert torch.allclose(short.encode_text(texts), whole.encode_text(texts), atol=1e-6)
        short.encode_text(["a dog on a mat and a cat under it"])
    assert "1 text truncated to 8 tokens" in caplog.text
    assert "context length 77 -> 8: text positions are cut" in caplog.text


def test_a_longer_context_reads_more_of_a_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = OpenClip().save(tmp_path)
    model = CLIPModel(pretrained=folder, context_length=120).eval()
    assert "context length 77 -> 120: text positions are interpolated" in caplog.text
    same = "a red cat " * 28
    with torch.no_grad():
        one, other = model.encode_text([f"{same} dog", f"{same} boat"])
    assert (one - other).norm() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_another_resolution_gives_open_clips_features(
    pool: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_clip = pytest.importorskip("open_clip")
    folder = OpenClip({"image_size": 128, "pool_type": pool}).save(tmp_path)
    peer = OpenClip({"image_size": 192, "pool_type": pool})
    state = OpenClip({"image_size": 128, "pool_type": pool}).state
    open_clip.model.resize_pos_embed(state, peer.model)
    peer.model.load_state_dict(state)
    model = CLIPModel(pretrained=folder, image_resolution=192)
    assert "image resolution 128 -> 192: image positions are interpolated" in caplog.text
    assert model.image_resolution == 192
    assert_same_features(model, peer)


def test_attention_pooling_of_a_resnet_is_resized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = CLIPModel(SMALL_RESNET.name).eval()
    torch.save(whole.state_dict(), tmp_path / "x.pt")
    model = CLIPModel(pretrained=tmp_path / "x.pt", image_resolution=128).eval()
    positions = whole.backbone.visual.attnpool.positional_embedding
    found = model.backbone.visual.attnpool.positional_embedding
    assert torch.allclose(found, resize_image_positions(positions, 4))
    with torch.no_grad():
        assert model.encode_image(torch.zeros(1, 3, 128, 128, dtype=torch.uint8)).shape == (1, 64)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"image_resolution": 100}, "image_resolution 100: .* takes multiples of 32, such as 96"),
        ({"image_resolution": 8}, "multiples of 32, such as 32"),
        ({"context_length": 2}, "context_length 2: at least 3"),
        ({"context_length": 5000}, "its context length would be 5,000"),
        ({"image_resolution": 4096, "model_name": "ViT-Ti/16@112px"}, "its number of patches would be 65,536"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CLIPModel(**{"model_name": SMALL_VIT.name, "pretrained": "none", **sizes})


def test_random_weights_have_the_sizes_asked_for() -> None:
    model = CLIPModel(SMALL_VIT.name, context_length=12, image_resolution=96).eval()
    assert model.architecture.name == "ViT-Mini@96px"
    with torch.no_grad():
        assert model.encode_image(torch.zeros(2, 3, 96, 96)).shape == (2, 64)
        assert model.encode_text(["a dog " * 20]).shape == (1, 64)
    assert len(model.backbone.positional_embedding) == 12


def test_a_checkpoint_is_checked_as_it_was_saved_and_then_resized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CLIPModel(SMALL_VIT.name)
    nn.init.normal_(model.image_projection.weight)
    content = {"model_state_dict": model.state_dict(), "architecture": model.architecture.to_dict()}
    save_checkpoint(tmp_path / "x.pth", add_self_test({**content, "epoch": 0, "global_step": 0}))
    resized = CLIPModel(pretrained=tmp_path / "x.pth", image_resolution=128, context_length=100)
    assert torch.equal(resized.image_projection.weight, model.image_projection.weight)
    assert len(resized.backbone.visual.positional_embedding) == 17
    assert len(resized.backbone.positional_embedding) == 100


@pytest.fixture
def data(tmp_path: Path) -> Path:
    create_sample_dataset(str(tmp_path / "data"), num_samples=60)
    index = json.loads((tmp_path / "data" / "data.json").read_text())
    for row in index:
        row["caption"] = [f"{caption}, and more words after it " * 4 for caption in row["caption"]]
    (tmp_path / "data" / "data.json").write_text(json.dumps(index))
    return tmp_path / "data"


def run(main: Any, *flags: object) -> int:
    return int(main([str(flag) for flag in flags]))


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["none", "text", "image"])
def test_a_run_with_other_sizes_is_trained_resumed_and_evaluated(freeze: str, data: Path, tmp_path: Path) -> None:
    folder, out = OpenClip().save(tmp_path / "hub"), tmp_path / "out"
    flags = [
        "--data_dir", data, "--output_dir", out, "--device", "cpu", "--num_workers", 0, "--batch_size", 16,
        "--freeze_tower", freeze,
    ]  # fmt: skip
    sizes = ["--pretrained", folder, "--context_length", 90, "--image_resolution", 96]
    assert run(train.main, *flags, *sizes, "--num_epochs", 1) == 0
    assert run(train.main, *flags[2:4], "--resume", "latest", "--num_epochs", 2) == 0
    checkpoint = torch.load(out / "model-checkpoint" / "last_model.pth", weights_only=True)
    assert checkpoint["architecture"]["image_resolution"] == 96
    assert checkpoint["architecture"]["context_length"] == 90
    assert checkpoint["preprocessing"]["resolution"] == 96
    assert checkpoint["config"]["model"]["context_length"] == 90
    assert run(evaluation.main, "--checkpoint", out / "model-checkpoint" / "last_model.pth", "--output_dir", out) == 0
    found = json.loads((out / "results" / "evaluation_results.json").read_text())
    assert found["run"]["model_settings"]["image_resolution"] == 96


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [None, "ddp", "fsdp"])
def test_a_run_goes_by_all_that_its_weights_were_made_with(parallel: str | None, data: Path, tmp_path: Path) -> None:
    """Pooling, mask, mean and the like are in its checkpoints, whose self-test every reader repeats."""
    peer = OpenClip({"pool_type": "avg", "norm_kwargs": {"eps": 1e-3}}, {"no_causal_mask": True, "pool_type": "last"})
    peer.settings["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    folder, out = peer.save(tmp_path / "hub"), tmp_path / "out"
    flags = ["--data_dir", data, "--pretrained", folder, "--output_dir", out, "--device", "cpu", "--num_workers", 0,
             "--num_epochs", 1, "--batch_size", 16]  # fmt: skip
    if parallel is None:
        assert run(train.main, *flags) == 0
    else:
        done = run_ranks(2, "train.py", *map(str, flags), "--parallel", parallel)
        assert done.returncode == 0, done.stderr
    checkpoint = torch.load(out / "model-checkpoint" / "best_model.pth", weights_only=True)
    model = CLIPModel(pretrained=out / "model-checkpoint" / "last_model.pth")
    assert model.architecture.image_pooling == "average_of_normed"
    assert not model.architecture.causal
    assert checkpoint["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    loaded = CLIPModel(pretrained=folder)
    loaded.load_state_dict(checkpoint["model_state_dict"])
    assert loaded.architecture.unseen() == model.architecture.unseen()


@pytest.mark.slow
@pytest.mark.parametrize("length", [16, 248])
@pytest.mark.parametrize("freeze", ["none", "image"])
def test_training_cuts_captions_to_the_models_context(length: int, freeze: str, data: Path, tmp_path: Path) -> None:
    folder = OpenClip(text={"context_length": length}).save(tmp_path / "hub")
    flags = ["--data_dir", data, "--output_dir", tmp_path / "out", "--device", "cpu", "--num_workers", 0]
    assert run(train.main, *flags, "--pretrained", folder, "--num_epochs", 1, "--freeze_tower", freeze) == 0
