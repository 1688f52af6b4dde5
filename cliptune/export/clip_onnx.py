"""A CLIP as ONNX graphs, run with Pillow, numpy, tokenizers and onnxruntime alone.

model = CLIP(folder)
model.classify([Image.open("photo.jpg")], ["a photo of a cat", "a photo of a dog"])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tokenizers import Tokenizer


class CLIP:
    """The graphs of a folder, with what goes before them.

    Args:
        folder: where this file came from.
        int8: take the quantised graphs, if the export has them.
        providers: of onnxruntime.
    """

    def __init__(
        self, folder: str | Path, *, int8: bool = False, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        folder = Path(folder)
        paths = [path for path in sorted(folder.glob("*.onnx")) if path.stem.endswith("_int8") == int8]
        if not paths:
            raise FileNotFoundError(f"{folder}: no {'quantised ' if int8 else ''}graphs, *.onnx")
        self.sessions = [onnxruntime.InferenceSession(str(path), providers=list(providers)) for path in paths]
        self.settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.scale = float(json.loads((folder / "logits.json").read_text(encoding="utf-8"))["scale"])

    def preprocess(self, images: Iterable[Image.Image]) -> NDArray[np.float32]:
        """Set upright, lay on white, resize the short side, cut the centre out, normalise: `[B, 3, R, R]`."""
        side = self.settings["size"]["shortest_edge"]
        mean, std = (np.array(self.settings[key], dtype=np.float32) for key in ("image_mean", "image_std"))
        rows = []
        for image in map(_to_rgb, images):
            width, height = image.size
            short = min(width, height)
            size = int(side * width / short), int(side * height / short)
            left, top = (round((length - side) / 2) for length in size)
            resized = image.resize(size, Image.Resampling.BICUBIC)
            pixels = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32)
            rows.append(((pixels / 255 - mean) / std).transpose(2, 0, 1))
        return np.stack(rows)

    def encode_image(self, images: Iterable[Image.Image]) -> NDArray[np.float32]:
        """Encode images: unit-norm `[B, D]`."""
        return self.run(pixel_values=self.preprocess(images))

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts: unit-norm `[B, D]`."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        return self.run(input_ids=np.array(ids, dtype=np.int64))

    def classify(self, images: Iterable[Image.Image], texts: Sequence[str]) -> NDArray[np.float32]:
        """Return how likely each text is for each image, by the model's own scale: `[images, texts]`."""
        logits = self.scale * self.encode_image(images) @ self.encode_text(texts).T
        likely = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(likely / likely.sum(1, keepdims=True), dtype=np.float32)

    def run(self, **inputs: Any) -> NDArray[np.float32]:
        """Run one tower on `pixel_values` `[B, 3, R, R]` or `input_ids` `[B, L]`."""
        ((name, _),) = inputs.items()
        session = next(each for each in self.sessions if name in {one.name for one in each.get_inputs()})
        for one in session.get_inputs():  # one graph of both towers wants something of the other kind as well
            kind = np.float32 if one.name == "pixel_values" else np.int64
            inputs.setdefault(one.name, np.zeros((1, *one.shape[1:]), dtype=kind))
        output = "image_features" if name == "pixel_values" else "text_features"
        return np.asarray(session.run([output], inputs)[0], dtype=np.float32)


def _to_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return upright.convert("RGB")
