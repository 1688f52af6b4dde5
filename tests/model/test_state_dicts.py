"""State dicts of others: wrapped, prefixed, of one tower, of another model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_model import CLIPModel
from cliptune.model.architectures import GELU_TANH
from cliptune.model.state_dicts import read_extra_state
from cliptune.model.weights import read_weights
from tests.helpers.models import SMALL_RESNET, SMALL_VIT, small_architectures
from tests.helpers.peers import HuggingFace, OpenClip, assert_same_features

__all__ = ["small_architectures"]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def peer() -> OpenClip:
    return OpenClip()


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def wrapped(key: str) -> Callable[[State], Any]:
    return lambda state: {key: state, "epoch": 3}


def inside(state: State) -> State:
    """As towers that were compiled or sharded by themselves are named."""
    return {
        name.replace("visual.", "visual._orig_mod.").replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): value
        for name, value in state.items()
    }


WRAPPED: dict[str, Callable[[State], Any]] = {
    **{prefix: prefixed(prefix) for prefix in (
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "clip.", "model.module.", "net.",
        "clip_model.", "model.clip.", "module.module.", "student.",
    )},
    **{key: wrapped(key) for key in (
        "state_dict", "model", "module", "state_dict_ema", "model_ema", "model_state_dict",
    )},
    "Lightning": lambda state: {"state_dict": prefixed("model.")(state), "hyper_parameters": {"lr": 1e-3}},
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.")(state)},
    "nested": lambda state: {"model": {"state_dict": prefixed("module.")(state)}},
    "weights and their mean": lambda state: {
        "state_dict_ema": {name: value + 1 for name, value in state.items()}, "state_dict": state,
    },
    "beside a loss": lambda state: {**prefixed("model.")(state), "loss.weight": torch.zeros(3)},
    "inside": inside,
    "text.": lambda state: {
        name if name.startswith(("visual.", "logit")) else f"text.{name}": value for name, value in state.items()
    },
    "prefixed text.": lambda state: prefixed("module.")(WRAPPED["text."](state)),
}  # fmt: skip


@pytest.mark.parametrize("form", WRAPPED)
def test_a_model_is_found_whatever_it_is_wrapped_in(form: str, peer: OpenClip, tmp_path: Path) -> None:
    torch.save(WRAPPED[form](peer.state), tmp_path / "x.pt")
    assert_same_features(CLIPModel(pretrained=tmp_path / "x.pt", activation="quick_gelu"), peer)


def test_of_several_models_one_must_be_chosen(peer: OpenClip, tmp_path: Path) -> None:
    torch.save({**prefixed("student.")(peer.state), **prefixed("teacher.")(peer.state)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"holds 2 models, student\., teacher\.: save one"):
        CLIPModel(pretrained=tmp_path / "x.pt", activation="gelu")


def test_what_is_not_used_is_said(peer: OpenClip, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({**prefixed("clip.")(peer.state), "head.weight": torch.zeros(3)}, tmp_path / "x.pt")
    read_weights(tmp_path / "x.pt", activation="quick_gelu")
    assert "the model is taken from clip.; not used: head.weight" in caplog.text


TEXT_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda s: {k: v for k, v in s.items() if not k.startswith("visual.")}, "its text tower, without the image"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith(TEXT_PARTS)}, "its image tower, without the text"),
        (lambda s: {k[7:]: v for k, v in s.items() if k.startswith("visual.")}, "its image tower, without the text"),
        (
            lambda s: {"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)},
            r"they are conv1\.weight; fc\.weight",
        ),
        (lambda s: {**s, "visual.trunk.x": torch.zeros(3)}, r"no place for visual\.trunk\.x"),
        (lambda s: {"visual.trunk.x": torch.zeros(3), "token_embedding.weight": torch.zeros(3)}, "tower of timm's"),
        (lambda s: {**s, "transformer.resblocks.0.ls_1.gamma": torch.zeros(3)}, r"resblocks\.0\.ls_1\.gamma"),
        (lambda s: {"base_model.x.lora_A.weight": torch.zeros(3)}, "merge_and_unload"),
        (lambda s: {**s, "visual.transformer.resblocks.0.attn.lora_A.x": torch.zeros(3)}, "merge_and_unload"),
        (
            lambda s: (
                {k: v for k, v in s.items() if not k.startswith(TEXT_PARTS)}
                | {"text_model.embeddings.word_embeddings.weight": torch.zeros(3)}
            ),
            "text tower of another kind",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "text_projection"}, "no text_projection"),
    ],
)
def test_other_models_are_told_before_anything_is_asked(
    make: Callable[[State], State], reason: str, peer: OpenClip, tmp_path: Path
) -> None:
    torch.save(make(peer.state), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"not the weights of a CLIP.*{reason}"):
        read_weights(tmp_path / "x.pt")


def test_what_is_missing_is_told_before_anything_is_asked(peer: OpenClip, tmp_path: Path) -> None:
    state = {name: value for name, value in peer.state.items() if "ln_pre" not in name}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r'do not fit .*Missing key.*"visual\.ln_pre\.weight"'):
        CLIPModel(pretrained=tmp_path / "x.pt")


def test_quantised_weights_are_refused(peer: OpenClip, tmp_path: Path) -> None:
    torch.save({name: value.to(torch.int8) if value.ndim > 1 else value for name, value in peer.state.items()},
               tmp_path / "x.pt")  # fmt: skip
    with pytest.raises(ValueError, match=r"is of torch\.int8: quantised weights are not supported"):
        CLIPModel(pretrained=tmp_path / "x.pt", activation="gelu")


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel",
                                  "CLIPVisionModelWithProjection"])  # fmt: skip
def test_one_tower_of_transformers_is_told(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = HuggingFace().model.config
    is_text = "Text" in kind
    getattr(transformers, kind)(config.text_config if is_text else config.vision_config).save_pretrained(tmp_path)
    found, missing = ("text", "image") if is_text else ("image", "text")
    with pytest.raises(ValueError, match=f"of one tower: its {found} tower, without the {missing} tower"):
        CLIPModel(pretrained=tmp_path)


def test_a_bias_of_the_logits_changes_no_feature(tmp_path: Path) -> None:
    peer = OpenClip(init_logit_scale=2.3, init_logit_bias=-10.0)
    assert "logit_bias" in peer.state
    model = CLIPModel(pretrained=peer.save(tmp_path))
    assert_same_features(model, peer)
    assert model.logit_bias is not None
    assert (model.logit_bias.item(), model.logit_bias.requires_grad) == (-10, False)


def test_a_bias_of_the_logits_travels_in_the_toolkits_own_state_dict(tmp_path: Path) -> None:
    model = own_model()
    model.learn_bias()
    model.logit_bias.data.fill_(-7.5)  # type: ignore[union-attr]
    torch.save(model.state_dict(), tmp_path / "own.pt")
    again = CLIPModel(pretrained=tmp_path / "own.pt")
    assert again.logit_bias is not None
    assert again.logit_bias.item() == -7.5
    other = CLIPModel(SMALL_VIT.name, projection_dim=32, activation=GELU_TANH)
    other.load_state_dict(model.state_dict())
    assert other.logit_bias is not None
    assert other.logit_bias.item() == -7.5


def test_a_bias_that_is_none_is_not_taken(peer: OpenClip, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({**peer.state, "logit_bias": torch.zeros(3)}, tmp_path / "x.pt")
    assert CLIPModel(pretrained=tmp_path / "x.pt", activation="quick_gelu").logit_bias is None
    assert "its logit_bias of 3 values is not used" in caplog.text


def test_positions_of_long_clip_are_put_together(peer: OpenClip, tmp_path: Path) -> None:
    """Its first 20 come from one tensor, the others from the one that it trains."""
    longer = OpenClip(text={"context_length": 248})
    state, positions = longer.state, longer.state["positional_embedding"]
    state["positional_embedding_res"] = positions.clone()
    state["positional_embedding_res"][:20] = torch.nan
    state["positional_embedding"] = torch.cat([positions[:20], torch.full((228, 64), torch.nan)])
    torch.save(state, tmp_path / "longclip.pt")
    assert_same_features(CLIPModel(pretrained=tmp_path / "longclip.pt", activation="quick_gelu"), longer)


def own_model() -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(SMALL_VIT.name, projection_dim=32, activation=GELU_TANH)
    with torch.no_grad():
        model.image_projection.weight.mul_(2).add_(0.1)
        model.logit_scale.fill_(3.0)
    return model.eval()


@pytest.mark.parametrize("form", ["bare", "model_state_dict", "module.", "Lightning", "safetensors"])
def test_the_toolkits_own_state_dict(form: str, tmp_path: Path) -> None:
    model = own_model()
    state = model.state_dict()
    content = {
        "bare": state, "model_state_dict": {"model_state_dict": state, "epoch": 3},
        "module.": prefixed("module.")(state), "Lightning": {"state_dict": prefixed("model.")(state)},
        "safetensors": state,
    }[form]  # fmt: skip
    path = tmp_path / "own.pt"
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file({k: v.contiguous() for k, v in content.items()}, path)
    else:
        torch.save(content, path)
    again = CLIPModel(pretrained=path).eval()
    assert again.architecture == model.architecture
    assert again.projection_dim == 32
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(again.encode_text(["a dog"]), model.encode_text(["a dog"]))
    assert again.logit_scale.item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="made for activation gelu_tanh, not gelu"):
        CLIPModel(pretrained=path, activation="gelu")


def test_an_own_state_dict_that_is_damaged_is_refused(tmp_path: Path) -> None:
    state = own_model().state_dict()
    for change, reason in (
        ({"_extra_state": None}, "without its _extra_state"),
        ({"_extra_state": torch.tensor([1, 2, 3])}, "_extra_state cannot be read"),
        ({"image_projection.weight": torch.zeros(32, 5)}, "its tensors are not those of its architecture"),
    ):
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=rf"x\.pt: .*{reason}"):
            CLIPModel(pretrained=tmp_path / "x.pt")


UNSEEN = {
    "activation": "gelu_tanh", "vision_heads": 4, "transformer_heads": 1, "vision_eps": 1e-3, "text_eps": 1e-2,
    "causal": False, "image_pooling": "average", "text_pooling": "end", "end_token": 49407, "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
}  # fmt: skip


@pytest.mark.parametrize("name", [SMALL_VIT.name, SMALL_RESNET.name])
def test_what_encoding_depends_on_travels_with_the_state_dict(name: str) -> None:
    """As the snippet that everybody writes loads it: `load_state_dict(checkpoint["model_state_dict"])`."""
    model = CLIPModel(name).eval()
    unseen = UNSEEN if model.architecture.is_vit else {**UNSEEN, "vision_heads": 2, "image_pooling": "class"}
    least = 0.01 if model.architecture.is_vit else 1e-3
    other = CLIPModel(name, pretrained="none")
    assert other.architecture.unseen() != unseen
    model.set_extra_state(torch.tensor(list(str(unseen).replace("'", '"').replace("False", "false").encode())))
    assert model.architecture.unseen() == unseen
    other.load_state_dict(model.state_dict())
    other.eval()
    assert other.architecture == model.architecture
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    plain = CLIPModel(name).eval()
    plain.backbone.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        assert torch.equal(other.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(other.encode_text(["a dog", "b"]), model.encode_text(["a dog", "b"]))
        assert (plain.encode_image(pixels) - model.encode_image(pixels)).norm() > least
        assert (plain.encode_text(["a dog"]) - model.encode_text(["a dog"])).norm() > 0.01


def test_the_extra_state_is_as_robust_as_a_tensor(tmp_path: Path) -> None:
    state = own_model().state_dict()["_extra_state"]
    assert state.dtype == torch.uint8
    torch.save({"x": state}, tmp_path / "x.pt")
    told = read_extra_state(torch.load(tmp_path / "x.pt", weights_only=True)["x"])
    assert told["activation"] == GELU_TANH
    for changed in (state.clone(), state.float(), state.half(), sum(0.25 * state for _ in range(4))):
        assert read_extra_state(changed) == told
    assert read_extra_state(torch.tensor(True)) == {"activation": "quick_gelu"}  # as it was once
    assert read_extra_state(torch.tensor(0.0)) == {"activation": "gelu"}
    with pytest.raises(ValueError, match="cannot be read"):
        read_extra_state(state + 100)
    with pytest.raises(ValueError, match="not the description"):
        CLIPModel(SMALL_VIT.name).set_extra_state(torch.tensor(list(b'{"vision_heads": 0}')))


def test_parameters_that_are_shared_do_not_matter(peer: OpenClip, tmp_path: Path) -> None:
    torch.save({name: nn.Parameter(value) for name, value in peer.state.items()}, tmp_path / "x.pt")
    assert_same_features(CLIPModel(pretrained=tmp_path / "x.pt", activation="quick_gelu"), peer)
