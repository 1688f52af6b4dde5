"""Settings files beside weights: each setting is used, as the peer uses it, or refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_model import CLIPModel
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.hub_settings import read_settings
from cliptune.model.weights import read_weights
from cliptune.preprocess.tokens import vocabulary
from tests.helpers.peers import HuggingFace, OpenClip, assert_same_features

EPS = {"norm_kwargs": {"eps": 1e-3}}
TANH = {"act_kwargs": {"approximate": "tanh"}}
HALF = [0.5, 0.5, 0.5]
ARCHITECTURE = ARCHITECTURES["ViT-B/32"]


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "text", "quick_gelu"),
    [
        ({}, {}, True),
        ({}, {}, False),
        ({"pool_type": "avg"}, {}, True),
        ({"pool_type": "avg", "final_ln_after_pool": True}, {}, True),
        ({"final_ln_after_pool": True}, {"final_ln_after_pool": True}, True),
        ({}, {"no_causal_mask": True}, True),
        ({}, {"no_causal_mask": True, "pool_type": "last"}, False),
        ({}, {"pool_type": "last"}, True),
        ({}, {"pool_type": "first"}, True),
        ({}, {"pool_type": "eos", "eos_id": 49407}, True),
        ({}, {"heads": 2}, True),
        ({"head_width": 32}, {"heads": 4}, True),
        (EPS, EPS, True),
        (EPS, {}, True),
        ({}, EPS, True),
        (TANH, TANH, False),
        ({"mlp_ratio": 3.0}, {}, True),
        ({"mlp_ratio": 4.9231}, {"mlp_ratio": 2.0}, False),
        ({"width": 96, "head_width": 48}, {"width": 32, "heads": 4}, True),
        ({"image_size": 96, "pool_type": "avg"}, {"context_length": 16, "no_causal_mask": True}, True),
        ({"layers": [1, 1, 1, 1], "width": 16, "patch_size": None}, {}, True),
    ],
)
def test_open_clips_settings_are_used(
    vision: dict[str, Any], text: dict[str, Any], quick_gelu: bool, tmp_path: Path
) -> None:
    peer = OpenClip(vision, text, quick_gelu=quick_gelu)
    model = CLIPModel(pretrained=peer.save(tmp_path))
    assert_same_features(model, peer)
    other = CLIPModel(pretrained=tmp_path / "open_clip_model.safetensors")  # which the folder would be read from
    assert other.architecture == model.architecture


@pytest.mark.parametrize(
    ("text", "vision", "more"),
    [
        ({}, {}, {}),
        ({"num_attention_heads": 2}, {"num_attention_heads": 8}, {}),
        ({}, {}, {"layer_norm_eps": 1e-3}),
        ({"layer_norm_eps": 1e-2}, {}, {}),
        ({}, {}, {"hidden_act": "gelu"}),
        ({}, {}, {"hidden_act": "gelu_new"}),
        ({}, {}, {"hidden_act": "gelu_pytorch_tanh"}),
        ({"intermediate_size": 100}, {"intermediate_size": 300}, {}),
        ({"max_position_embeddings": 20}, {"image_size": 96}, {}),
        ({"eos_token_id": 2}, {}, {}),
        (
            {"hidden_size": 32, "num_attention_heads": 4},
            {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128},
            {},
        ),
    ],
)
def test_settings_of_transformers_are_used(
    text: dict[str, Any], vision: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    peer = HuggingFace(text, vision, **more)
    assert_same_features(CLIPModel(pretrained=peer.save(tmp_path)), peer)


@pytest.mark.parametrize("eos", [49407, 2])
def test_added_tokens_are_pooled_as_the_settings_say(eos: int, tmp_path: Path) -> None:
    """At the first end token; where that is 2, an old mistake, at the largest id, which may be an added one."""
    peer = HuggingFace({"vocab_size": 49410, "eos_token_id": eos})
    tokens = torch.zeros(3, 77, dtype=torch.int64)
    tokens[:, 0] = 49406
    tokens[0, 1:4], tokens[1, 1:3], tokens[2, 1:5] = (
        torch.tensor(row) for row in ([49409, 320, 49407], [500, 49407], [320, 49408, 49408, 49407])
    )
    assert_same_features(CLIPModel(pretrained=peer.save(tmp_path)), peer, tokens=tokens)


BAGGAGE: dict[str, Any] = {
    "_name_or_path": "x", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "finetuning_task": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "prefix": None, "problem_type": None, "pruned_heads": {},
    "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True, "sep_token_id": None,
    "temperature": 1.0, "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None,
    "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False, "transformers_version": "4.16.0.dev0",
    "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
"""What the files of 2022 hold beside the settings of a CLIP."""


def test_older_files_of_transformers_hold_a_second_description(tmp_path: Path) -> None:
    """`text_config_dict` goes before `text_config`, what it does not tell is transformers' default."""
    peer = HuggingFace(hidden_act="gelu")
    peer.save(tmp_path)

    def move(content: dict[str, Any]) -> None:
        for part in ("text_config", "vision_config"):
            content[f"{part}_dict"] = dict(content[part])
            content[part]["hidden_act"] = "quick_gelu"
            content[part] |= BAGGAGE

    edit(tmp_path / "config.json", move)
    assert_same_features(CLIPModel(pretrained=tmp_path), peer)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "pool_type", "none"),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "something_new", 3),
        ("text_cfg", "proj_bias", True),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "pool_type", "mean"),
        ("text_cfg", "hf_tokenizer_name", "google/mt5-base"),
        ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}),
    ],
)
def test_other_settings_of_open_clip_are_refused_by_name(part: str, key: str, value: Any, tmp_path: Path) -> None:
    peer = OpenClip()
    peer.settings["model_cfg"][part][key] = value
    shown = "clean 'canonicalize'" if key == "tokenizer_kwargs" else f"{key} {value!r}"
    with pytest.raises(ValueError, match=rf"open_clip_config\.json: {shown}: not supported"):
        CLIPModel(pretrained=peer.save(tmp_path))


@pytest.mark.parametrize(
    ("vision", "text", "reason"),
    [
        ({"approximate": "tanh"}, None, "act_kwargs of gelu_tanh and gelu"),
        ({"approximate": "other"}, {"approximate": "other"}, "act_kwargs .*other"),
        ({"inplace": True}, {"inplace": True}, "act_kwargs .*inplace"),
    ],
)
def test_other_activations_of_open_clip_are_refused(vision: Any, text: Any, reason: str, tmp_path: Path) -> None:
    peer = OpenClip(quick_gelu=False)
    peer.settings["model_cfg"]["vision_cfg"]["act_kwargs"] = vision
    peer.settings["model_cfg"]["text_cfg"]["act_kwargs"] = text
    with pytest.raises(ValueError, match=f"{reason}.*not supported"):
        CLIPModel(pretrained=peer.save(tmp_path))


def test_settings_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    peer = OpenClip()
    peer.settings["model_cfg"]["vision_cfg"] |= {"patch_dropout": 0.5, "qk_norm": False, "timm_model_name": ""}
    peer.settings["model_cfg"] |= {"custom_text": True, "init_logit_bias": None, "_note": "x"}
    peer.settings["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "openai/clip-vit-base-patch32", "pad_id": 0}
    assert_same_features(CLIPModel(pretrained=peer.save(tmp_path)), peer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(model_type="metaclip_2"), "model_type 'metaclip_2'"),
        (lambda c: c["text_config"].update(hidden_act="relu"), "hidden_act 'relu'"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act 'gelu' and 'quick_gelu'"),
        (lambda c: c["vision_config"].update(use_rope=True), "use_rope True"),
        (lambda c: c.update(quantization_config={"bits": 4}), "quantization_config"),
    ],
)
def test_other_settings_of_transformers_are_refused_by_name(change: Any, reason: str, tmp_path: Path) -> None:
    HuggingFace().save(tmp_path)
    edit(tmp_path / "config.json", change)
    with pytest.raises(ValueError, match=rf"config\.json: {reason}.*: not supported"):
        CLIPModel(pretrained=tmp_path)


def test_an_end_token_that_is_none_is_refused(tmp_path: Path) -> None:
    HuggingFace().save(tmp_path)
    edit(tmp_path / "config.json", lambda content: content["text_config"].update(eos_token_id=[1, 2]))
    with pytest.raises(ValueError, match=r"config\.json: .*end_token"):
        CLIPModel(pretrained=tmp_path)


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("moments", [(HALF, HALF), ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), (None, None)])
def test_open_clips_mean_and_deviation_are_used(moments: Any, picture: Image.Image, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    peer = OpenClip()
    if moments[0]:
        peer.settings["preprocess_cfg"] = {"mean": moments[0], "std": moments[1], "interpolation": "bicubic"}
    model = CLIPModel(pretrained=peer.save(tmp_path)).eval()
    pixels = open_clip.image_transform(64, is_train=False, mean=moments[0], std=moments[1])(picture)[None]
    with torch.no_grad():
        assert (model.encode_image(picture) - peer.model.encode_image(pixels, normalize=True)).norm() < 1e-5


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("change", [{"image_mean": HALF, "image_std": HALF}, {"do_normalize": False}, {}])
def test_the_processor_of_transformers_is_used(
    name: str, change: dict[str, Any], picture: Image.Image, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    peer = HuggingFace()
    peer.save(tmp_path)
    processor = transformers.CLIPImageProcessor(size=64, crop_size=64, **change)
    processor.save_pretrained(tmp_path)
    saved = (tmp_path / "preprocessor_config.json").read_text()
    (tmp_path / "preprocessor_config.json").unlink()
    whole = json.loads(saved) if name.startswith("pre") else {"image_processor": json.loads(saved)}
    (tmp_path / name).write_text(json.dumps(whole))
    model = CLIPModel(pretrained=tmp_path).eval()
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    want, _ = peer.features(pixels, torch.zeros(1, 77, dtype=torch.int64))
    with torch.no_grad():
        assert (model.encode_image(picture) - want).norm() < 1e-3  # its resize differs by a level here and there


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resample": 2}, "resample 2"),
        ({"do_center_crop": False}, "do_center_crop False"),
        ({"size": {"shortest_edge": 80}}, "size .*80.* for a crop of 64"),
        ({"size": {"height": 64, "width": 64}}, "size"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
    ],
)
def test_other_preprocessing_is_refused_by_name(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    HuggingFace().save(tmp_path)
    usual = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**usual, **change}))
    with pytest.raises(ValueError, match=rf"{reason}.*\(preprocessor_config\.json\): not supported"):
        CLIPModel(pretrained=tmp_path)


def test_open_clips_other_resizing_is_refused(tmp_path: Path) -> None:
    peer = OpenClip()
    peer.settings["preprocess_cfg"] = {"resize_mode": "squash", "interpolation": "bilinear"}
    with pytest.raises(ValueError, match="interpolation 'bilinear'; resize_mode 'squash': not supported"):
        CLIPModel(pretrained=peer.save(tmp_path))


@pytest.mark.slow
def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    for size in (1000, 250_100):
        peer = OpenClip(text={"vocab_size": size})
        with pytest.raises(ValueError, match=f"a vocabulary of {size:,} tokens is another tokeniser's"):
            CLIPModel(pretrained=peer.save(tmp_path / str(size)))
    other = HuggingFace()
    other.save(tmp_path / "hf")
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(vocabulary()))
    assert_same_features(CLIPModel(pretrained=tmp_path / "hf"), other)
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({word[::-1]: n for word, n in vocabulary().items()}))
    with pytest.raises(ValueError, match=r"a vocabulary of 4\d,\d+ tokens in vocab\.json .*not CLIP's: not supported"):
        CLIPModel(pretrained=tmp_path / "hf")
    (tmp_path / "hf" / "vocab.json").unlink()
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(ValueError, match=r"tokenizer_class .BertTokenizer. .*: not supported"):
        CLIPModel(pretrained=tmp_path / "hf")


@pytest.mark.slow
def test_a_setting_counts_only_if_its_file_is_of_these_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peer, other = OpenClip(), HuggingFace(hidden_act="gelu")
    other.save(tmp_path)
    torch.save(peer.state, tmp_path / "my_clip.pt")
    with pytest.raises(ValueError, match="does not tell its activation"):
        CLIPModel(pretrained=tmp_path / "my_clip.pt")
    assert_same_features(CLIPModel(pretrained=tmp_path / "my_clip.pt", activation="quick_gelu"), peer)
    assert "as asked for" not in caplog.text
    # two settings files in one folder: names of tensors tell whose are whose
    (tmp_path / "open_clip_config.json").write_text(json.dumps(peer.settings))
    assert_same_features(CLIPModel(pretrained=tmp_path), other)
    with pytest.raises(ValueError, match="does not tell its activation"):  # a loose file beside a model
        CLIPModel(pretrained=tmp_path / "my_clip.pt")
    assert (
        "open_clip_config.json is not used: my_clip.pt is not the file that its folder would be read from"
        in caplog.text
    )


def test_settings_of_other_sizes_are_another_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peer = OpenClip()
    folder = peer.save(tmp_path)
    edit(folder / "open_clip_config.json", lambda content: content["model_cfg"]["vision_cfg"].update(layers=12))
    with pytest.raises(ValueError, match="does not tell its activation"):
        CLIPModel(pretrained=folder)
    assert "describes another model (vision_layers 12 there, 2 in the tensors)" in caplog.text
    assert_same_features(CLIPModel(pretrained=folder, activation="quick_gelu"), peer)


def test_the_activation_asked_for_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peer = OpenClip(quick_gelu=False)
    peer.settings["model_cfg"]["quick_gelu"] = True  # a wrong settings file
    assert_same_features(CLIPModel(pretrained=peer.save(tmp_path), activation="gelu"), peer)
    assert "activation gelu as asked for, though the settings beside it say quick_gelu" in caplog.text


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    torch.save(OpenClip({"width": 96, "head_width": 48}).state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="image tower is 96 wide, and nothing tells how many heads"):
        CLIPModel(pretrained=tmp_path / "x.pt", activation="gelu")


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"model_cfg": 3}', b'{"model_cfg": {"vision_cfg": {"layers": {}}}}',
                                     b'{"model_cfg": {"vision_cfg": {"image_size": [64, 32]}}}',
                                     b'{"model_cfg": {"vision_cfg": {"head_width": 0}}}',
                                     b'{"model_cfg": {"text_cfg": 7}}'])  # fmt: skip
def test_a_damaged_settings_file_is_no_settings_file(content: bytes, tmp_path: Path) -> None:
    folder = OpenClip().save(tmp_path)
    (folder / "open_clip_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"not tell its activation|open_clip_config\.json: a setting that is none"):
        read_weights(folder)


JUNK = [None, True, -1, 0, 1.5, float("nan"), "x", [], [1, 2], {}, {"a": 1}, 10**30]


def paths_in(content: Any, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*inside, key)
        yield from paths_in(value, (*inside, key))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_any_value_of_any_setting_is_used_or_refused(kind: str, tmp_path: Path) -> None:
    peer: Any = HuggingFace() if kind == "transformers" else OpenClip(EPS | TANH, EPS | TANH, quick_gelu=False)
    peer.save(tmp_path)
    path = tmp_path / ("config.json" if kind == "transformers" else "open_clip_config.json")
    if kind == "open_clip":
        peer.settings["preprocess_cfg"] = {"mean": HALF, "std": HALF, "interpolation": "bicubic"}
        peer.settings["model_cfg"]["text_cfg"] |= {"tokenizer_kwargs": {"clean": "lower"}, "pool_type": "eos"}
        path.write_text(json.dumps(peer.settings))
    content = json.loads(path.read_text())
    for *inside, last in paths_in(content):
        for junk in JUNK:
            changed = json.loads(json.dumps(content))
            target = changed
            for key in inside:
                target = target[key]
            target[last] = junk
            path.write_text(json.dumps(changed))
            try:
                found = read_settings(tmp_path, hugging_face=kind == "transformers")
                if found is not None and not found.refused:
                    ARCHITECTURE.with_unseen(found.unseen)
            except ValueError as error:
                assert "config.json" in str(error) or "not the description" in str(error)
