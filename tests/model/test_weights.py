"""Weights of every published format, made from random ones: the real files cannot be had without a network."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import normalize

from clip_model import CLIPModel
from cliptune.model import weights
from cliptune.model.architectures import ARCHITECTURES, Architecture
from cliptune.model.weights import read_weights
from cliptune.runtime.openai_clip import import_clip

clip = import_clip()
TEXTS = ["a diagram", "a dog on a mat", "a cat"]
SIZES: dict[str, tuple[Any, ...]] = {
    # embed, resolution, vision layers, width, patch, context, vocabulary, text width, heads, layers
    "vit": (64, 64, 2, 128, 32, 77, 49408, 64, 1, 2),
    "resnet": (64, 64, (1, 2, 1, 1), 16, None, 77, 49408, 64, 1, 2),
}


def random_clip(kind: str) -> Any:
    """OpenAI's class with random weights that could tell any mistake: also biases, norms and BatchNorm statistics."""
    torch.manual_seed(0)
    model = clip.model.CLIP(*SIZES[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter)).abs_()
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        model.logit_scale.fill_(4.6052)
    return model.eval()


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, Path]:
    """Archives as OpenAI publishes them: TorchScript, fp16, with three entries of sizes."""
    paths = {}
    for kind in SIZES:
        model = random_clip(kind)
        clip.model.convert_weights(model)
        for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
            if hasattr(model, name):
                delattr(model, name)
            model.register_buffer(name, torch.tensor(value))
        images, tokens = torch.rand(1, 3, 64, 64).half(), clip.tokenize(TEXTS[:1])
        example = {"encode_image": images, "encode_text": tokens, "forward": (images, tokens)}
        paths[kind] = tmp_path / f"{kind}.pt"
        torch.jit.trace_module(model, example, check_trace=False).save(str(paths[kind]))
    return paths


@pytest.mark.parametrize("kind", SIZES)
def test_openai_archive_gives_the_features_of_clip_load(kind: str, archives: dict[str, Path], tmp_path: Path) -> None:
    reference, preprocess = clip.load(str(archives[kind]), device="cpu")
    ours = CLIPModel(pretrained=archives[kind]).eval()
    image_file = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    with torch.no_grad():
        image = normalize(reference.encode_image(preprocess(image_file)[None]), dim=-1)
        text = normalize(reference.encode_text(clip.tokenize(TEXTS)), dim=-1)
        assert torch.allclose(ours.encode_image(image_file), image, atol=2e-6)
        assert torch.allclose(ours.encode_text(TEXTS), text, atol=2e-6)
    assert ours.logit_scale.item() == pytest.approx(4.6052, abs=1e-3)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    assert not ours.starts_random
    assert ours.holds_batchnorm


@pytest.mark.parametrize("form", ["pt", "ckpt", "safetensors"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_files(form: str, quick_gelu: bool, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    peer = open_clip.model.CLIP(64, vision, text, quick_gelu=quick_gelu).eval()
    state = {name: value.contiguous() for name, value in peer.state_dict().items()}
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "ckpt":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        torch.save(state, path)
    with pytest.raises(ValueError, match="does not tell its activation"):
        CLIPModel(pretrained=path)
    model = CLIPModel(pretrained=path, activation="quick_gelu" if quick_gelu else "gelu").eval()
    images, tokens = torch.randn(2, 3, 64, 64), clip.tokenize(TEXTS)
    with torch.no_grad():
        assert torch.allclose(model.encode_image(images), peer.encode_image(images, normalize=True), atol=2e-6)
        assert torch.allclose(model.encode_text(tokens), peer.encode_text(tokens, normalize=True), atol=2e-6)
    settings = {"model_cfg": {"quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    assert CLIPModel(pretrained=path).architecture.activation == ("quick_gelu" if quick_gelu else "gelu")


def hugging_face_clip(activation: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "hidden_act": activation, "projection_dim": 64}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, **shared}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "image_size": 64, **shared}
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": 49407, "vocab_size": 49408},
        vision_config={**vision, "patch_size": 32},
        projection_dim=64,
    )
    return transformers.CLIPModel(config).eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face_folder(activation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peer = hugging_face_clip(activation)
    peer.save_pretrained(tmp_path)
    model = CLIPModel(pretrained=tmp_path).eval()
    images, tokens = torch.randn(2, 3, 64, 64), clip.tokenize(TEXTS).long()
    with torch.no_grad():
        image = peer.visual_projection(peer.vision_model(pixel_values=images).pooler_output)
        text_features = peer.text_projection(peer.text_model(input_ids=tokens).pooler_output)
        assert torch.allclose(model.encode_image(images), normalize(image, dim=-1), atol=2e-6)
        assert torch.allclose(model.encode_text(tokens), normalize(text_features, dim=-1), atol=2e-6)
    assert model.architecture.activation == activation
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation]
    assert CLIPModel(pretrained=tmp_path, activation=other).architecture.activation == other
    assert f"activation {other} as asked for, though the settings beside it say {activation}" in caplog.text


def test_the_file_decides_and_an_explicit_name_that_disagrees_is_warned_of(
    archives: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = CLIPModel(pretrained=archives["vit"])
    assert model.image_resolution == 64
    assert "the file decides" not in caplog.text
    CLIPModel("ViT-B/32", pretrained=archives["vit"])
    assert "the file decides: the model name ViT-B/32 is not used" in caplog.text


def test_known_architectures_are_found_from_their_tensors() -> None:
    for name in ("ViT-Ti/32", "RN50"):
        architecture = ARCHITECTURES[name]
        assert Architecture.from_dict(architecture.to_dict()) == architecture
    with pytest.raises(ValueError, match="not the description"):
        Architecture.from_dict({"name": "x"})


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb-went-off"),))


def test_a_pickle_bomb_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Bomb()}, "bomb.pth")
    with zipfile.ZipFile("archive.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    for name in ("bomb.pth", "archive.pt"):
        with pytest.raises(ValueError, match=r"cannot be opened safely|unsafe TorchScript archive"):
            read_weights(Path(name))
    assert not Path("bomb-went-off").exists()


@pytest.mark.slow
def test_an_archive_cannot_unfold(archives: dict[str, Path], tmp_path: Path) -> None:
    """Neither compressed zeros nor one number told many times over may become more memory than the file has bytes."""
    with zipfile.ZipFile(archives["vit"]) as archive, zipfile.ZipFile(tmp_path / "small.pt", "w") as packed:
        for name in archive.namelist():
            kind = zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED
            packed.writestr(name, archive.read(name), compress_type=kind)
    with pytest.raises(ValueError, match=r"small\.pt: .*compressed tensors"):
        read_weights(tmp_path / "small.pt")
    module = nn.Module()
    module.register_buffer("x", torch.zeros(1).expand(10**6, 10**6))
    torch.jit.save(torch.jit.script(module), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"wide\.pt: .*more numbers than are stored"):
        read_weights(tmp_path / "wide.pt")


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 100, 5000, 0.5, 0.99])
def test_a_cut_archive_is_refused(keep: float, archives: dict[str, Path], tmp_path: Path) -> None:
    data = archives["vit"].read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        read_weights(path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not the weights of a CLIP"):
        read_weights(tmp_path / "x.pt", activation="gelu")


def test_of_a_folder_with_both_the_whole_model_is_read_not_timms_image_tower(tmp_path: Path) -> None:
    model = random_clip("vit")
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()},
              tmp_path / "open_clip_model.safetensors")  # fmt: skip
    assert read_weights(tmp_path, activation="gelu").source.endswith("open_clip_model.safetensors")


def test_published_weights_from_the_hub_are_openais_whatever_stands_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same features as OpenAI's class, and its activation, which the settings on the hub may not tell."""
    model = random_clip("resnet")
    path = tmp_path / "cache" / "open_clip_model.safetensors"
    path.parent.mkdir()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    (path.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 64}}))
    monkeypatch.setattr(weights, "published_weights", lambda name: path)
    ours = CLIPModel("RN50").eval()
    assert ours.architecture.activation == "quick_gelu"
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours.encode_image(images), normalize(model.encode_image(images), dim=-1), atol=2e-6)
        assert torch.allclose(
            ours.encode_text(TEXTS), normalize(model.encode_text(clip.tokenize(TEXTS)), dim=-1), atol=2e-6
        )
    with pytest.raises(ValueError, match="made for activation quick_gelu, not gelu"):
        CLIPModel("RN50", activation="gelu")


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("positional_embedding", (100_000, 1), "context length would be 100,000"),
        ("visual.positional_embedding", (1_000_001, 1), "image resolution would be 32,000"),
        ("visual.conv1.weight", (128, 3, 0, 0), "image resolution would be 0"),
    ],
)
def test_sizes_that_no_clip_has_are_refused(name: str, shape: tuple[int, ...], reason: str, tmp_path: Path) -> None:
    """A mask of 100,000 x 100,000 is 40 GB, an image of 32,000 x 32,000 12 GB."""
    torch.save({**random_clip("vit").state_dict(), name: torch.zeros(shape)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: its {reason}"):
        read_weights(tmp_path / "x.pt", activation="gelu")


def test_many_patches_are_refused(tmp_path: Path) -> None:
    state = random_clip("vit").state_dict()
    state |= {"visual.conv1.weight": torch.zeros(128, 3, 1, 1), "visual.positional_embedding": torch.zeros(40_001, 1)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="number of patches would be 40,000"):
        read_weights(tmp_path / "x.pt", activation="gelu")


@pytest.mark.parametrize("heads", [0, -1, 7, 10**9])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int, tmp_path: Path) -> None:
    hugging_face_clip("gelu").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["vision_config"]["num_attention_heads"] = heads
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: .*(heads do not divide|is no size)"):
        read_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_noticed(value: float, tmp_path: Path) -> None:
    state = random_clip("vit").state_dict()
    state["visual.conv1.weight"][0, 0, 0, :3] = value
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: 3 values of visual\.conv1\.weight are not finite"):
        read_weights(tmp_path / "x.pt", activation="gelu")


@pytest.mark.parametrize(
    ("stored", "scale", "said"),
    [
        (4.6052, 100, None),
        (2.659, 14.3, None),
        (5.0, 148.4, None),
        (0.0, 1, None),
        (100.0, 100, "taken as the scale itself"),
        (14.3, 14.3, "taken as the scale itself"),
        (0.07, 14.3, "taken as the temperature"),
        (0.01, 100, "taken as the temperature"),
        (-2.659, 14.3, "taken as the logarithm of the temperature"),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_temperature_that_is_no_logarithm_is_converted_and_said(
    stored: float,
    scale: float,
    said: str | None,
    shape: tuple[int, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.save({**random_clip("vit").state_dict(), "logit_scale": torch.full(shape, stored)}, tmp_path / "x.pt")
    model = CLIPModel(pretrained=tmp_path / "x.pt", activation="gelu")
    assert model.logit_scale.exp().item() == pytest.approx(scale, rel=1e-2)
    assert (said in caplog.text) if said else not caplog.records


@pytest.mark.parametrize("stored", [torch.tensor(1e5), torch.tensor(-50.0), torch.tensor(torch.nan), torch.ones(2)])
def test_a_temperature_that_is_none_is_refused(stored: torch.Tensor, tmp_path: Path) -> None:
    torch.save({**random_clip("vit").state_dict(), "logit_scale": stored}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: logit_scale"):
        read_weights(tmp_path / "x.pt", activation="gelu")


@pytest.mark.slow
def test_a_torchscript_archive_of_others_does_not_tell_its_activation(tmp_path: Path) -> None:
    """Only OpenAI's have their sizes in them; open_clip traces models with GELU, too."""
    model = random_clip("vit")
    example = torch.zeros(1, 3, 64, 64), clip.tokenize(TEXTS[:1])
    torch.jit.trace(model, example, check_trace=False).save(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match="does not tell its activation"):
        read_weights(tmp_path / "x.pt")
