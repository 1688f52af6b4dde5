"""A checkpoint whose model no longer gives the features that it was saved with is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_model import CLIPModel, add_self_test
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.model.self_test import TOLERANCE, check_self_test, compute_self_test
from cliptune.preprocess import tokens, transforms
from cliptune.preprocess.moments import CLIP_MEAN
from cliptune.preprocess.resize import Pixels
from cliptune.preprocess.transforms import CenterTransform

MODELS = ["ViT-Ti/32", "ViT-Ti/16@112px"]


def random_model(name: str = "ViT-Ti/32", **settings: Any) -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(name, pretrained="none", **settings).eval()


def state_of(model: CLIPModel) -> dict[str, Any]:
    return {
        "model_state_dict": model.state_dict(), "architecture": model.architecture.to_dict(), "epoch": 1,
        "global_step": 2,
    }  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "x.pth", add_self_test(state_of(random_model())))
    return tmp_path / "x.pth"


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a checkpoint anew, as intact as any, with something in it changed."""
    content = load_checkpoint(path)
    change(content)
    save_checkpoint(path, content)
    return path


def distances(model: CLIPModel, self_test: dict[str, Any]) -> list[float]:
    now = compute_self_test(model)
    return [(now[key] - self_test[key]).norm(dim=1).min().item() for key in ("image_features", "text_features")]


def test_a_checkpoint_holds_what_it_needs_to_be_understood(path: Path) -> None:
    content = load_checkpoint(path)
    assert content["activation"] == "quick_gelu"
    assert content["preprocessing"]["mean"] == list(CLIP_MEAN)
    assert content["preprocessing"]["version"] == transforms.VERSION
    assert content["temperature"] == pytest.approx(0.07, rel=1e-4)
    assert content["self_test"]["pixels"].dtype == torch.uint8
    assert content["self_test"]["image_features"].norm(dim=1).tolist() == pytest.approx([1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("projection_dim", [None, 32])
def test_every_way_of_loading_takes_an_untouched_one(path: Path, projection_dim: int | None) -> None:
    assert torch.equal(CLIPModel.from_checkpoint(path).image_projection.weight, torch.eye(256))
    assert CLIPModel(pretrained=path, projection_dim=projection_dim).projection_dim == (projection_dim or 256)
    random_model().load_checkpoint(path)


def ways_in(path: Path) -> list[Callable[[], Any]]:
    return [
        lambda: CLIPModel.from_checkpoint(path),
        lambda: CLIPModel(pretrained=path),
        lambda: CLIPModel(pretrained=path, projection_dim=32),
        lambda: random_model().load_checkpoint(path),
    ]


def swap_activation(content: dict[str, Any]) -> None:
    content["architecture"]["activation"] = "gelu"
    content["model_state_dict"]["_extra_state"] = torch.tensor(False)


def damage_weights(content: dict[str, Any]) -> None:
    content["model_state_dict"]["backbone.visual.transformer.resblocks.3.mlp.c_proj.weight"][7] += 1


def make_nan(content: dict[str, Any]) -> None:
    content["model_state_dict"]["text_projection.weight"][0, 0] = torch.nan


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(swap_activation, marks=pytest.mark.slow),
        damage_weights,
        pytest.param(make_nan, marks=pytest.mark.slow),
    ],
)
def test_every_way_of_loading_refuses_a_changed_one(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    changed(path, change)
    for load in ways_in(path):
        with pytest.raises(ValueError, match=r"x\.pth: its model does not give the features that it was saved with"):
            load()


@pytest.mark.slow
def test_parts_that_contradict_each_other_are_refused(path: Path) -> None:
    content = load_checkpoint(path)
    wrong: dict[str, dict[str, Any]] = {
        "holds no self_test": {"self_test": None},
        "no self_test that its model can be checked by": {"self_test": {**content["self_test"], "texts": 3}},
        "its model does not give": {"self_test": {**content["self_test"], "text_features": torch.ones(2, 3)}},
        "not those of its architecture": {"architecture": {**content["architecture"], "transformer_layers": 10**9}},
        "activation 'relu'": {"architecture": {**content["architecture"], "activation": "relu"}},
        "'six' is no size": {"architecture": {**content["architecture"], "vision_layers": "six"}},
        "damaged checkpoint": {"model_state_dict": {}},
    }
    for message, parts in wrong.items():
        save_checkpoint(path, {**content, **parts})
        for load in ways_in(path):
            with pytest.raises(ValueError, match=message) as error:
                load()
            assert "x.pth" in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_a_swapped_activation_shows_in_both_towers(name: str) -> None:
    model = random_model(name)
    self_test = compute_self_test(model)
    model.set_extra_state(torch.tensor(False))
    assert min(distances(model, self_test)) > 10 * TOLERANCE
    with pytest.raises(ValueError, match="another activation"):
        check_self_test(model, self_test, source="x.pth")


def bilinear(self: CenterTransform, image: Image.Image) -> Pixels:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda each, size, _: RESIZE(each, size, Image.Resampling.BILINEAR))
        return SHRINK(self, image)


def squeezed(self: CenterTransform, image: Image.Image) -> Pixels:
    return SHRINK(self, RESIZE(image, (self.resolution, self.resolution)))


def other_mean(pixels: Tensor, *moments: Any) -> Tensor:
    return NORMALIZE(pixels, *moments) + 0.01


def other_deviation(pixels: Tensor, *moments: Any) -> Tensor:
    return NORMALIZE(pixels, *moments) * torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1) / 0.225


SHRINK, RESIZE, NORMALIZE = CenterTransform.shrink, Image.Image.resize, transforms.normalize


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("target", "change"),
    [
        ("cliptune.preprocess.transforms.CenterTransform.shrink", bilinear),
        ("cliptune.preprocess.transforms.CenterTransform.shrink", squeezed),
        ("clip_model.normalize", other_mean),
        ("clip_model.normalize", other_deviation),
    ],
)
def test_changed_preprocessing_shows(name: str, target: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(name)
    self_test = compute_self_test(model)
    monkeypatch.setattr(target, change)
    assert distances(model, self_test)[0] > 10 * TOLERANCE
    with pytest.raises(ValueError, match="other preprocessing"):
        check_self_test(model, self_test, source="x.pth")


def test_another_tokeniser_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    self_test = compute_self_test(model)
    token_ids = tokens._token_ids
    monkeypatch.setattr(tokens, "_token_ids", lambda text, most: token_ids(text.upper() + "!", most))
    assert distances(model, self_test)[1] > 10 * TOLERANCE


def test_the_proof_does_not_depend_on_what_training_allows(path: Path) -> None:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    state = torch.get_rng_state()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            CLIPModel.from_checkpoint(path)
        add_self_test(state_of(random_model()))
    finally:
        torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(state)
    model = random_model().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    add_self_test(state_of(model))
    assert torch.equal(torch.rand(3), expected)
    assert model.training


def test_weights_that_are_not_finite_are_not_saved() -> None:
    model = random_model()
    model.text_projection.weight.data[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        add_self_test(state_of(model))


def test_a_model_whose_proof_fails_comes_back_in_its_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("out of memory")

    model = random_model().train()
    monkeypatch.setattr(model, "encode_text", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        compute_self_test(model)
    assert model.training


def test_a_model_in_training_holds_on_to_its_own_weights() -> None:
    model = random_model()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    add_self_test(state_of(model))
    for name, value in model.state_dict().items():
        if name != "_extra_state":
            assert (value.data_ptr(), True) == (before[name][0], torch.equal(value, before[name][1])), name
    assert all(parameter.requires_grad for parameter in model.parameters())
