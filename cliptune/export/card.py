"""README.md of an export, its model card: what it is, how it did, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.export.verify import Differences
from cliptune.model.architectures import Architecture
from cliptune.runtime.messages import shown


class About(NamedTuple):
    """What is known of a model beside its weights."""

    title: str
    source: str
    """Name of the checkpoint's file or folder, without the path to it."""
    verdict: str
    """How it did, in a sentence; empty: nobody knows."""
    recalls: Mapping[str, Mapping[str, float]]
    """Recalls and `rsum` by the model that they are of; may be empty."""
    data: Sequence[str]
    """What it was trained on, a line each."""
    settings: Mapping[str, Any]
    """Of the run, by their flags."""


def model_card(
    form: str,
    shape: Architecture,
    about: About,
    differences: Differences,
    *,
    folder: Path,
    versions: Mapping[str, str],
    notes: Sequence[str] = (),
) -> str:
    """Return the card, Markdown.

    Args:
        form: of the export.
        shape: of the model without projection layers.
        about: the model.
        differences: between the export and the checkpoint.
        folder: of the export as it was named; of an absolute path only the name is shown.
        versions: of the packages that it was verified with.
        notes: what else is to be said of this export, a line each.
    """
    library = {"openai": "clip"}.get(form, form)
    head = ["---", f"library_name: {library}", "pipeline_tag: zero-shot-image-classification", "tags: [clip]", "---"]
    parts = [
        "\n".join(head),
        f"# {shown(about.title)}",
        f"A CLIP ({shape.name}, from {shown(about.source)}), exported for {form}. {_sizes(shape)}",
        "## How it did\n\n" + (about.verdict or "Nothing is recorded of it beside its weights."),
        _table(about.recalls),
        "## Data\n\n" + ("\n".join(f"- {line}" for line in about.data) or "Not recorded."),
        "## Use\n\n```python\n" + usage(form, folder) + "```",
        "## Preprocessing\n\n" + _preprocessing(form, shape, differences),
        "## How it was verified\n\n" + _verified(form, differences, versions),
        "\n".join(f"- {note}" for note in notes),
        "## Settings\n\n" + (_settings(about.settings) or "Not recorded."),
        "## Licence\n\nTo be filled in: under which licence this model may be used, and those of the weights and the "
        "data that it was trained from.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


USE = {
    "transformers": """\
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

folder = "exported/transformers"
model = CLIPModel.from_pretrained(folder).eval()
processor = CLIPProcessor.from_pretrained(folder, backend="pil")  # resizes as in training; without it, within 2/255
texts = ["a photo of a cat", "a photo of a dog"]
inputs = processor(text=texts, images=Image.open("photo.jpg"), padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(-1))
""",
    "open_clip": """\
import open_clip
import torch
from PIL import Image

folder = "exported/open_clip"
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)
    texts = model.encode_text(tokenizer(["a photo of a cat", "a photo of a dog"]), normalize=True)
    print((model.logit_scale.exp() * image @ texts.T).softmax(-1))
""",
    "sentence-transformers": """\
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("exported/sentence-transformers")
image = model.encode([Image.open("photo.jpg")])
texts = model.encode(["a photo of a cat", "a photo of a dog"])
print(model.similarity(image, texts))
""",
    "onnx": """\
import sys

from PIL import Image

folder = "exported/onnx"
sys.path.insert(0, folder)
from clip_onnx import CLIP  # a file of the export; needs Pillow, numpy, tokenizers and onnxruntime

model = CLIP(folder)
print(model.classify([Image.open("photo.jpg")], ["a photo of a cat", "a photo of a dog"]))
""",
    "openai": """\
import clip
import torch
from PIL import Image

model, preprocess = clip.load("exported/openai/model.pt", device="cpu")
texts = clip.tokenize(["a photo of a cat", "a photo of a dog"], context_length=model.context_length)
with torch.no_grad():
    logits_per_image, _ = model(preprocess(Image.open("photo.jpg"))[None], texts)
    print(logits_per_image.softmax(-1))
""",
}
"""How each library loads its export in `exported/FORM`; docs/EXPORT.md shows the same."""


def usage(form: str, folder: Path) -> str:
    """Return the code that loads an export from its folder."""
    # a card travels with its export: nobody else has the folders of this machine
    name = folder.name if folder.is_absolute() else folder.as_posix()
    # within the quotes " of the code: don"t -> don\"t
    return USE[form].replace(f"exported/{form}", repr(name)[1:-1].replace('"', '\\"'))


_NOT_MENDED = (
    " Before that training set photos upright by their EXIF orientation (`PIL.ImageOps.exif_transpose`) and laid "
    "transparent images on white; the library does neither."
)


def _sizes(shape: Architecture) -> str:
    side = shape.image_resolution
    return (
        f"Images of {side} x {side} pixels, texts of {shape.context_length} tokens, features of {shape.embed_dim} "
        "numbers."
    )


def _table(recalls: Mapping[str, Mapping[str, float]]) -> str:
    if not recalls:
        return ""
    keys = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)] + ["rsum"]
    rows = [f"| {name} | " + " | ".join(f"{row[key]:.1f}" for key in keys) + " |" for name, row in recalls.items()]
    names = [key.replace("i2t_r", "image to text R@").replace("t2i_r", "text to image R@") for key in keys[:-1]]
    return "\n".join(["| | " + " | ".join([*names, "RSum"]) + " |", "|---" * (len(keys) + 1) + "|", *rows])


def _preprocessing(form: str, shape: Architecture, differences: Differences) -> str:
    mean, std = (", ".join(f"{value:.8g}" for value in values) for values in (shape.mean, shape.std))
    mended = "" if form == "onnx" else _NOT_MENDED
    text = (
        f"RGB; the short side resized to {shape.image_resolution} pixels (bicubic, with antialiasing), the centre cut "
        f"out, then (value / 255 - mean) / std with mean {mean} and std {std}.{mended}"
    )
    if differences.is_shifted:
        text += (
            " Where the middle of an image lies between two pixels, this library cuts out one pixel beside where it "
            "was cut in training (it rounds down, CLIP to the even number)."
        )
    return text


def _verified(form: str, differences: Differences, versions: Mapping[str, str]) -> str:
    with_ = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = (
        f"Loaded in a process of its own, it gave the checkpoint's features: largest distance of unit vectors "
        f"{differences.images:.1e} for images and {differences.texts:.1e} for texts; pixels after its own "
        f"preprocessing differ by at most {255 * differences.pixels:.2f}/255. With {with_}."
    )
    if form not in {"open_clip", "openai"}:
        text += " Its tokenizer, other than training's, mends no broken Unicode and no HTML such as `&amp;`."
    return text


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [f"| `{name}` | `{shown(value).replace('|', '/')}` |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows]) if rows else ""
