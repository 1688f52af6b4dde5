"""Weights of every published format, made from random ones: the real files cannot be had without a network."""

import hashlib
import json
import pickle
import socket
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from clip_model import CLIPModel
from cliptune.model import weights as pretrained
from cliptune.model.architectures import ARCHITECTURES, Architecture
from cliptune.model.published import Patience, UnavailableError
from cliptune.model.weights import read_weights
from cliptune.runtime.openai_clip import import_clip
from tests.helpers.local_server import send, serving

clip = import_clip()
TEXTS = ["a diagram", "a dog on a mat", "a cat"]
SIZES: dict[str, tuple[Any, ...]] = {
    # embed, resolution, vision layers, width, patch, context, vocabulary, text width, heads, layers
    "vit": (64, 64, 2, 128, 32, 77, 49408, 64, 1, 2),
    "resnet": (64, 64, (1, 2, 1, 1), 16, None, 77, 49408, 64, 1, 2),
}


def random_clip(kind: str) -> nn.Module:
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
    eval_model: nn.Module = model.eval()
    return eval_model


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
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    with torch.no_grad():
        image = normalize(reference.encode_image(preprocess(picture)[None]), dim=-1)
        text = normalize(reference.encode_text(clip.tokenize(TEXTS)), dim=-1)
        assert torch.allclose(ours.encode_image(picture), image, atol=2e-6)
        assert torch.allclose(ours.encode_text(TEXTS), text, atol=2e-6)
    assert ours.logit_scale.item() == pytest.approx(4.6052, abs=1e-3)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    assert not ours.starts_random
    assert ours.holds_batchnorm


@pytest.mark.parametrize("form", ["pt", "training", "safetensors"])
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
        from safetensors.torch import save_file  # noqa: PLC0415

        save_file(state, path)
    elif form == "training":
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
def test_hugging_face_folder(activation: str, tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=f"made for activation {activation}"):
        CLIPModel(pretrained=tmp_path, activation={"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation])


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


NAME, REPO = "ViT-B/32", "openai/clip-vit-base-patch32"
ARCHIVE = b"weights" * 1000
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_proxy: None) -> Path:
    """An empty cache of huggingface_hub; no test looks into the real one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish_at(base: str, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"{base}/models/{SHA256}/ViT-B-32.pt"
    monkeypatch.setattr(pretrained, "published_url", lambda name: url)
    return url


def hang(name: str, *_: Any, **__: Any) -> None:
    threading.Event().wait(60)


@pytest.mark.usefixtures("hub_cache")
def test_the_mirror_is_asked_first_then_the_publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(handler: Any, n: int) -> None:
        if "models" in handler.path:
            send(handler, ARCHIVE)
        else:
            send(handler, status=404)

    with serving(answer) as server:
        publish_at(server.base, monkeypatch)
        monkeypatch.setenv("CLIP_MIRROR", f"{server.base}/mirror/")
        path = pretrained.published_weights(NAME, cache_dir=tmp_path / "cache")
        assert path.read_bytes() == ARCHIVE
        paths = [path for _, path in server.requests]
        assert paths == [f"/mirror/{SHA256}/ViT-B-32.pt", f"/models/{SHA256}/ViT-B-32.pt"]
        assert pretrained.published_weights(NAME, cache_dir=tmp_path / "cache") == path
        assert len(server.requests) == 2
        path.write_bytes(ARCHIVE[:-1])
        monkeypatch.setenv("CLIP_MIRROR", f"{server.base}/models")
        assert pretrained.published_weights(NAME, cache_dir=tmp_path / "cache").read_bytes() == ARCHIVE
        assert len(server.requests) == 3


@pytest.mark.usefixtures("hub_cache")
def test_weights_that_cannot_be_had_name_every_reason_and_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "download_hub_model", refuse)
    with serving(lambda handler, n: send(handler, b"another file")) as server:
        url = publish_at(server.base, monkeypatch)
        monkeypatch.setenv("CLIP_MIRROR", "http://127.0.0.1:9/mirror")
        with pytest.raises(OSError, match="no weights for ViT-B/32") as error:
            pretrained.published_weights(NAME, cache_dir=tmp_path)
    message = str(error.value)
    for part in (
        f"http://127.0.0.1:9/mirror/{SHA256}/ViT-B-32.pt cannot be had (Connection refused)",
        f"{url} cannot be had (not the file published",
        f"{REPO} on the Hugging Face Hub cannot be had (HTTP 500)", "SHA-256 " + SHA256, str(tmp_path / "ViT-B-32.pt"),
        "CLIP_MIRROR", "--pretrained none", "--pretrained FILE",
    ):  # fmt: skip
        assert part in message
    assert len(message.splitlines()) == 1


def refuse(repo: str, *, patience: Patience) -> Path:
    raise UnavailableError("HTTP 500")


@pytest.mark.usefixtures("hub_cache")
def test_sources_that_do_not_answer_share_one_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrained.ANSWER_SECONDS <= 9
    monkeypatch.setattr(pretrained, "ANSWER_SECONDS", 0.9)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    publish_at("http://weights.example", monkeypatch)
    monkeypatch.setenv("CLIP_MIRROR", "http://mirror.example")
    started = time.monotonic()
    with pytest.raises(OSError, match=r"mirror\.example.* \(no answer within 0\.3 s\).* \(no answer within 0\.3 s\)"):
        pretrained.published_weights(NAME, cache_dir=tmp_path)
    assert time.monotonic() - started < 30  # a look-up hangs for 60 s


def test_a_resnet_is_not_looked_for_on_the_hub(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(OSError, match="no weights for RN50") as error:
        pretrained.published_weights("RN50", cache_dir=tmp_path)
    assert "Hub" not in str(error.value)


def test_every_name_of_the_hub_is_a_published_one() -> None:
    for name in pretrained.HUB_REPOS:
        assert str(pretrained.published_url(name)).startswith("https://")
        assert ARCHITECTURES[name].is_vit


def test_weights_in_the_hubs_cache_need_no_network(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = hugging_face_clip("quick_gelu")
    peer.save_pretrained(tmp_path / "saved")
    content = (tmp_path / "saved" / "model.safetensors").read_bytes()
    folder = hub_cache / "models--openai--clip-vit-base-patch32"
    blob, snapshot = folder / "blobs" / hashlib.sha256(content).hexdigest(), folder / "snapshots" / ("1" * 40)
    for directory in (blob.parent, snapshot, folder / "refs"):
        directory.mkdir(parents=True)
    blob.write_bytes(content)
    (folder / "refs" / "main").write_text(snapshot.name)
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "config.json").write_bytes((tmp_path / "saved" / "config.json").read_bytes())
    publish_at("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(pretrained, "download_hub_model", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = CLIPModel("ViT-B/32").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = peer.visual_projection(peer.vision_model(pixel_values=images).pooler_output)
        assert torch.allclose(weights.encode_image(images), normalize(expected, dim=-1), atol=2e-6)
    blob.write_bytes(content[:-1])
    with pytest.raises(OSError, match="HTTP 500"):
        CLIPModel("ViT-B/32")
