import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clip_model import MAX_LOGIT_SCALE, CLIPModel, MultimodalTrainer, add_self_test
from cliptune.model.checkpoint_file import save_checkpoint
from cliptune.preprocess.tokens import tokenize
from cliptune.runtime.device import resolve_precision
from cliptune.runtime.rng import draw_bits, seed_everything
from cliptune.training.loss import ContrastiveLoss
from cliptune.training.meters import EpochTotals, StepResult
from cliptune.training.optim import build_optimizer, build_scheduler
from tests.helpers.models import SMALL_RESNET, small_architectures

__all__ = ["small_architectures"]

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel("ViT-Ti/32").eval()


def test_features_are_the_towers_bit_for_bit(model: CLIPModel) -> None:
    images, (tokens, _) = torch.randn(3, 3, 224, 224), tokenize(["a dog", "a cat on a mat", "a"])
    with torch.no_grad():
        for features, own in (
            (model.encode_image(images), model.backbone.encode_image(images)),
            (model.encode_text(tokens), model.backbone.encode_text(tokens)),
        ):
            assert torch.equal(features, own / own.norm(dim=-1, keepdim=True))


def test_outputs_are_unit_norm_float32_also_in_bf16(model: CLIPModel) -> None:
    images, tokens = torch.randn(2, 3, 224, 224), tokenize(["a", "b"])[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for output in model(images, tokens):
            assert output.dtype == torch.float32
            assert torch.allclose(output.norm(dim=-1), torch.ones(2), atol=1e-5)


def test_images_paths_and_strings_are_encoded_as_in_training(model: CLIPModel, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    with torch.no_grad():
        by_path = model.encode_image(tmp_path / "x.png")
        assert torch.equal(by_path, model.encode_image(image))
        assert torch.equal(by_path, model.encode_image([str(tmp_path / "x.png")]))
        assert torch.allclose(model.encode_text("a dog"), model.encode_text(tokenize(["a dog"])[0]))


@pytest.mark.slow
def test_another_projection_size_keeps_most_of_the_similarities(
    model: CLIPModel, caplog: pytest.LogCaptureFixture
) -> None:
    same, small, large = (CLIPModel("ViT-Ti/32", size) for size in (256, 128, 300))
    assert torch.equal(same.image_projection.weight, torch.eye(256))
    assert torch.equal(small.image_projection.weight, small.text_projection.weight)
    visual, text = small.backbone.visual.proj, small.backbone.text_projection
    stacked = torch.cat([visual, text]).detach()
    captured = (stacked @ small.image_projection.weight.T).norm() ** 2
    best = torch.linalg.svdvals(stacked)[:128].square().sum()
    assert torch.allclose(captured, best, rtol=1e-4)
    rows = nn.functional.normalize(torch.randn(5, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert torch.allclose((large.image_projection(rows) @ large.text_projection(rows).T), rows @ rows.T, atol=1e-5)
    assert small.projection_dim == 128


def test_frozen_means_frozen() -> None:
    model = CLIPModel(SMALL_RESNET.name, freeze_backbone=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"logit_scale", "image_projection.weight", "text_projection.weight"}
    before = model.backbone.visual.bn1.running_mean.clone()
    assert model.training
    model.encode_image(torch.randn(2, 3, 64, 64))
    assert torch.equal(model.backbone.visual.bn1.running_mean, before)


@pytest.mark.parametrize(("tower", "other"), [("image", "text"), ("text", "image")])
def test_one_tower_can_be_frozen(tower: str, other: str) -> None:
    model = CLIPModel(SMALL_RESNET.name, freeze_tower=tower)
    assert model.frozen_towers == (tower,)
    assert not any(value.requires_grad for value in model.tower_state(tower).values())
    assert all(value.requires_grad for value in model.tower_state(other).values() if isinstance(value, nn.Parameter))
    before = {name: value.detach().clone() for name, value in model.state_dict().items() if name.startswith("backbone")}
    trainer = trainer_of(model)
    trainer.model.train()
    trainer.train_step(torch.randn(2, 3, 64, 64), tokenize(["a", "b"])[0])
    for side in (tower, other):
        moved = [name for name in model.tower_state(side) if not torch.equal(
            model.backbone.state_dict()[name], before[f"backbone.{name}"])]  # fmt: skip
        assert bool(moved) == (side == other), moved
    outputs = model.run_image_tower(torch.randn(2, 3, 64, 64)), model.run_text_tower(tokenize(["a", "b"])[0])
    assert [output.grad_fn is None for output in outputs] == [tower == "image", tower == "text"]


def test_freezing_twice_or_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one"):
        CLIPModel("ViT-Ti/32", freeze_backbone=True, freeze_tower="text")
    with pytest.raises(ValueError, match="must be 'image' or 'text', got 'both'"):
        CLIPModel("ViT-Ti/32", freeze_tower="both")


def test_a_towers_output_stands_for_its_input(model: CLIPModel) -> None:
    images, tokens = torch.randn(2, 3, 224, 224), tokenize(["a red circle", "b"])[0]
    with torch.no_grad():
        expected = model(images, tokens)
        image_output, text_output = model.run_image_tower(images), model.run_text_tower(tokens)
        for pair in ((image_output, tokens), (images, text_output), (image_output, text_output)):
            assert all(torch.equal(got, want) for got, want in zip(model(*pair), expected, strict=True))


def test_batchnorm_trains_from_random_and_is_held_when_loaded() -> None:
    model = CLIPModel(SMALL_RESNET.name)
    assert model.backbone.visual.bn1.training
    model.holds_batchnorm = True
    assert not model.train().backbone.visual.bn1.training


def test_activation_travels_with_the_state_dict() -> None:
    gelu = CLIPModel("ViT-Ti/32", activation="gelu").eval()
    other = CLIPModel("ViT-Ti/32").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        other.load_state_dict(gelu.state_dict())
        assert other.architecture.activation == "gelu"
        assert torch.equal(other.encode_image(images), gelu.encode_image(images))


def test_optimizer_groups(model: CLIPModel) -> None:
    optimizer = build_optimizer(model, learning_rate=1e-3, backbone_lr_scale=0.01, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(found) == len(names)
    assert found["image_projection.weight"] == (1e-3, 0.1)
    assert found["logit_scale"] == (1e-3, 0)
    assert found["backbone.visual.conv1.weight"] == (pytest.approx(1e-5), 0.1)
    assert all(decay == 0 for name, (_, decay) in found.items() if name.endswith("bias") or ".ln_" in name)


def test_schedule_rises_then_falls() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, total_steps=100, warmup_fraction=0.1)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1 / 11)
    assert rates.index(max(rates)) == 10
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def trainer_of(model: CLIPModel, rate: float = 1e-3, clip_norm: float = 1.0) -> MultimodalTrainer:
    optimizer = build_optimizer(model, learning_rate=rate, backbone_lr_scale=1.0, weight_decay=0.0)
    return MultimodalTrainer(model, ContrastiveLoss(), optimizer, precision=FP32, gradient_clip_norm=clip_norm)


@pytest.mark.slow
def test_it_learns_a_small_set_and_the_temperature_stays_clamped() -> None:
    torch.manual_seed(0)
    model = CLIPModel("ViT-Mini")
    trainer = trainer_of(model)
    images, tokens = torch.randn(8, 3, 64, 64), tokenize([f"image {word}" for word in "abcdefgh"])[0]
    with torch.no_grad():
        model.logit_scale.fill_(MAX_LOGIT_SCALE + 1)
    result = trainer.train_epoch([(images, tokens, torch.arange(8))])
    assert model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    with torch.no_grad():
        model.logit_scale.fill_(2.6)
    first = trainer.train_epoch([(images, tokens, torch.arange(8))])
    for _ in range(25):
        result = trainer.train_epoch([(images, tokens, torch.arange(8))])
    assert result.loss < 0.3 * first.loss
    assert result.accuracy > 90
    assert trainer.global_step == 27


def test_an_epoch_in_two_parts_has_the_means_of_the_whole() -> None:
    values = [torch.tensor([1 / 3 + n, n / 7, 1.0, 14.0]) for n in range(6)]
    results = [StepResult(n + 1, 5 + n, {}, values[n]) for n in range(6)]
    whole, first, second = (EpochTotals(CPU) for _ in range(3))
    for result in (*results[:2], None, *results[2:]):
        whole.add(result)
    for result in (*results[:2], None):
        first.add(result)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for result in results[2:]:
        second.add(result)
    assert second.state_dict() == whole.state_dict()
    assert second.mean() == whole.mean()
    assert (whole.num_batches, whole.num_pairs) == (7, 45)
    sizes = torch.arange(5.0, 11.0)
    assert whole.mean().loss == pytest.approx(((1 / 3 + torch.arange(6.0)) * sizes).sum().item() / 45)
    with pytest.raises(ValueError, match="no batch of pairs"):
        EpochTotals(CPU).mean()


def test_a_loss_that_is_not_finite_stops() -> None:
    model = CLIPModel("ViT-Ti/32")
    batch = (torch.full((2, 3, 224, 224), float("nan")), tokenize(["a", "b"])[0], torch.arange(2))
    with pytest.raises(FloatingPointError, match=r"step 1 has .*Lower --learning_rate"):
        trainer_of(model).train_epoch([batch])


def test_a_step_clips_the_gradient() -> None:
    model = CLIPModel("ViT-Ti/32")
    trainer = trainer_of(model, clip_norm=0.01)
    trainer.train_step(torch.randn(4, 3, 224, 224), tokenize(list("abcd"))[0])
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(gradients).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
def test_a_gradient_within_the_limit_is_left_alone() -> None:
    model = CLIPModel("ViT-Ti/32")
    images, tokens = torch.randn(4, 3, 224, 224), tokenize(list("abcd"))[0]
    norms = []
    for limit in (0.0, 1e6):
        model.zero_grad()
        trainer_of(model, rate=1e-12, clip_norm=limit).train_step(images, tokens)
        norms.append(model.backbone.visual.conv1.weight.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_unknown_names_and_missing_files_are_said() -> None:
    with pytest.raises(ValueError, match=r"'ViT-B32'; did you mean ViT-B/32\? known: RN50, .*ViT-L/14@336px"):
        CLIPModel("ViT-B32", pretrained="none")
    with pytest.raises(ValueError, match="'banana'; known: RN50, "):
        CLIPModel("banana")
    with pytest.raises(FileNotFoundError, match="no such file"):
        CLIPModel(pretrained="gone.pt")
    with pytest.raises(ValueError, match="no published weights"):
        CLIPModel("ViT-Ti/32", pretrained="openai")


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_loaded_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(1)
    other, model = CLIPModel("ViT-Ti/32", activation="gelu"), CLIPModel("ViT-Ti/32")
    state = {"architecture": other.architecture.to_dict(), "model_state_dict": other.state_dict()}
    content = add_self_test({**state, "epoch": 1, "global_step": 1})
    save_checkpoint(tmp_path / "x.pth", content)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {**content["self_test"], "text_features": -content["self_test"]["text_features"]}
    save_checkpoint(tmp_path / "wrong.pth", {**content, "self_test": wrong})
    with pytest.raises(ValueError, match=r"wrong\.pth: its model does not give the features"):
        model.load_checkpoint(tmp_path / "wrong.pth")
    assert model.architecture.activation == "quick_gelu"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.load_checkpoint(tmp_path / "x.pth")["epoch"] == 1
    assert model.architecture.activation == "gelu"
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    for another in (CLIPModel("ViT-Ti/32", projection_dim=32), CLIPModel("ViT-Ti/16@112px")):
        with pytest.raises(ValueError, match=r"holds a ViT-Ti/32 with projection_dim 256, .* builds the right one"):
            another.load_checkpoint(tmp_path / "x.pth")


def test_a_shared_space_of_one_number_is_refused() -> None:
    with pytest.raises(ValueError, match="projection_dim 1: a unit vector of one number"):
        CLIPModel("ViT-Ti/32", projection_dim=1)


def test_the_largest_seed_is_one() -> None:
    seed_everything(2**64 - 1)
    assert len(draw_bits(2**64 - 1, 1, np.arange(3))) == 3


def test_a_model_says_what_it_is_in_a_few_lines() -> None:
    model = CLIPModel("ViT-Ti/32", projection_dim=64, freeze_backbone=True)
    assert repr(model).splitlines() == [
        "CLIPModel ViT-Ti/32",
        f"  {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters, 0.0 M of them trained",
        "  images of 224 x 224 pixels, texts of up to 77 tokens",
        "  projection 256 -> 64",
        "  on cpu, in training mode",
    ]
    assert repr(model.eval()).endswith("in evaluation mode")
