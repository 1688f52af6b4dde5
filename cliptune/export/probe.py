"""Load an export as its library does, and write what it gives: the program of a process of its own.

It imports that library, numpy, Pillow and PyTorch, and nothing of this toolkit, whose classes must not be needed.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]


class Loaded(NamedTuple):
    """An export in the hands of its library; features need not have unit norm."""

    preprocess: Callable[[list[Image.Image]], Array]
    """Images to normalised pixels `[N, 3, R, R]`."""
    encode_pixels: Callable[[Array], Array]
    """Normalised pixels to features `[N, D]`."""
    encode_texts: Callable[[list[str]], Array]


def load_transformers(folder: Path) -> Loaded:
    """As README.md of the export shows."""
    import torch  # noqa: PLC0415
    from transformers import CLIPModel, CLIPProcessor  # noqa: PLC0415

    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder, backend="pil")

    def encode_texts(texts: list[str]) -> Array:
        inputs = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        return _array(model.get_text_features(**inputs))

    return Loaded(
        lambda images: np.concatenate(
            [_array(processor(images=image, return_tensors="pt")["pixel_values"]) for image in images]
        ),
        lambda pixels: _array(model.get_image_features(pixel_values=torch.from_numpy(pixels))),
        encode_texts,
    )


def load_sentence_transformers(folder: Path) -> Loaded:
    """As README.md of the export shows; pixels go into the model inside."""
    import torch  # noqa: PLC0415
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    model = SentenceTransformer(str(folder), device="cpu")
    first = model[0]
    clip = getattr(first, "auto_model", None) or first.model
    return Loaded(
        lambda images: np.concatenate(
            [_array(first.processor(images=image, return_tensors="pt")["pixel_values"]) for image in images]
        ),
        lambda pixels: _array(clip.get_image_features(pixel_values=torch.from_numpy(pixels))),
        lambda texts: np.asarray(model.encode(texts)),
    )


def load_open_clip(folder: Path) -> Loaded:
    """As README.md of the export shows."""
    import open_clip  # noqa: PLC0415
    import torch  # noqa: PLC0415

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    return Loaded(
        lambda images: torch.stack([preprocess(image) for image in images]).numpy(),
        lambda pixels: _array(model.encode_image(torch.from_numpy(pixels))),
        lambda texts: _array(model.encode_text(tokenizer(texts))),
    )


def load_openai(folder: Path) -> Loaded:
    """As README.md of the export shows."""
    try:
        import clip  # noqa: PLC0415
    except ModuleNotFoundError:  # its PyPI form asks for what setuptools no longer has
        import packaging.version  # noqa: PLC0415

        stand_in: Any = types.ModuleType("pkg_resources")
        stand_in.packaging = packaging
        sys.modules["pkg_resources"] = stand_in
        import clip  # noqa: PLC0415
    import torch  # noqa: PLC0415

    model, preprocess = clip.load(str(folder / "model.pt"), device="cpu")
    length = model.context_length
    return Loaded(
        lambda images: torch.stack([preprocess(image) for image in images]).numpy(),
        lambda pixels: _array(model.encode_image(torch.from_numpy(pixels))),
        lambda texts: _array(model.encode_text(clip.tokenize(texts, context_length=length, truncate=True))),
    )


def load_onnx(folder: Path) -> Loaded:
    """With the file that travels in the export."""
    sys.path.insert(0, str(folder))
    from importlib import import_module  # noqa: PLC0415

    model = import_module("clip_onnx").CLIP(folder)
    return Loaded(model.preprocess, lambda pixels: model.run(pixel_values=pixels), model.encode_text)


LOADERS = {
    "transformers": load_transformers, "open_clip": load_open_clip,
    "sentence-transformers": load_sentence_transformers, "openai": load_openai, "onnx": load_onnx,
}  # fmt: skip


def _array(values: Any) -> Array:
    values = getattr(values, "pooler_output", values)  # of transformers since 5
    return np.asarray(values.detach().cpu().float())


def _unit(features: Array) -> Array:
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True), dtype=np.float32)


def _images(content: Any) -> list[Image.Image]:
    names = sorted((name for name in content.files if name.startswith("image_")), key=lambda name: int(name[6:]))
    return [Image.fromarray(content[name]) for name in names]


def main(form: str, folder: Path, inputs: Path, outputs: Path) -> None:
    """Run an export.

    Args:
        form: a key of `LOADERS`.
        folder: of the export.
        inputs: `image_0`, ... (uint8 `[H, W, 3]`), `pixels` (normalised `[N, 3, R, R]`), `texts` (JSON), `batches`.
        outputs: gets `preprocessed`, `image_features`, `text_features`, and `image_features_B`, `text_features_B` of
            the first image and text repeated B times, for each B of `batches`.
    """
    loaded = LOADERS[form](folder)
    with np.load(inputs) as content:
        images, pixels, texts = _images(content), content["pixels"], json.loads(str(content["texts"]))
        batches = content["batches"].tolist()
    found: dict[str, Any] = {
        "preprocessed": loaded.preprocess(images),
        "image_features": _unit(loaded.encode_pixels(pixels)),
        "text_features": _unit(loaded.encode_texts(texts)),
    }
    for size in batches:
        found[f"image_features_{size}"] = _unit(loaded.encode_pixels(np.repeat(pixels[:1], size, axis=0)))
        found[f"text_features_{size}"] = _unit(loaded.encode_texts(texts[:1] * size))
    np.savez(outputs, **found)


if __name__ == "__main__":
    main(sys.argv[1], *(Path(argument) for argument in sys.argv[2:5]))
