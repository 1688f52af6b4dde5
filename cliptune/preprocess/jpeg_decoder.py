"""Plain JPEGs that workers leave encoded, and what decodes and resizes many of them at once, on a GPU.

A GPU's decoder (nvJPEG, through torchvision) makes slightly other pixels of a JPEG than libjpeg does. All else about an
image, what is drawn for it and how it is resized, is as on the CPU.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from cliptune.preprocess.batch_resize import resize_batch
from cliptune.preprocess.decode import DecodedImage, EncodedJpeg, decode_image, open_image
from cliptune.preprocess.resize import Pixels, Span, resize
from cliptune.preprocess.transforms import PixelTransform
from cliptune.runtime.messages import one_line

# deprecated from 0.29 on, for TorchCodec: this stands for whoever has torchvision alone
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", DeprecationWarning)

logger = logging.getLogger(__name__)

DECODED_AT_ONCE, RESIZED_AT_ONCE = 2**24, 2**22
"""Pixels of the source images, for whose decoding 50 MB are taken on the device, and for their resizing 300."""


class JpegPart(NamedTuple):
    """A JPEG, not decoded yet, and what becomes of its pixels."""

    content: Tensor
    """uint8 `[bytes]`: of its file."""
    size: tuple[int, int]
    """Width and height."""
    columns: Span
    rows: Span
    name: str
    """By which an issue tells of it."""


class JpegsLeft(NamedTuple):
    """Several of them, in tensors: as they travel from a worker to the main process."""

    content: Tensor
    """uint8 `[all bytes]`: the files one after another."""
    facts: Tensor
    """int64 `[J, 14]`: row in the batch, bytes, width, height and both spans of each."""
    names: list[str]
    """`[J]`."""

    @classmethod
    def packed(cls, parts: dict[int, JpegPart]) -> JpegsLeft:
        """Pack JPEGs, given by their rows in the batch."""
        facts = [(row, len(part.content), *part.size, *part.columns, *part.rows) for row, part in parts.items()]
        content = torch.cat([part.content for part in parts.values()])
        return cls(content, torch.tensor(facts, dtype=torch.int64), [part.name for part in parts.values()])

    def unpacked(self) -> dict[int, JpegPart]:
        """Return them by their rows in the batch."""
        contents = self.content.split(self.facts[:, 1].tolist())
        return {
            row: JpegPart(content, (width, height), Span(*spans[:5]), Span(*spans[5:]), name)
            for (row, _, width, height, *spans), content, name in zip(
                self.facts.tolist(), contents, self.names, strict=True
            )
        }


class LeavesJpegs(PixelTransform):
    """Another transform, but for plain JPEGs: of them only what is to be done is decided, and what is random drawn.

    Args:
        inner: that transform.
    """

    def __init__(self, inner: PixelTransform) -> None:
        super().__init__(inner.resolution, shrunk_side=inner.shrunk_side, max_pixels=inner.max_pixels)
        self.inner = inner
        self.is_final = inner.is_final  # it draws nothing

    def load(self, source: str | Path | bytes) -> Any:
        """Open an image: an `EncodedJpeg`, or decoded; raises as `decode_image` does."""
        image = open_image(source, max_pixels=self.max_pixels)
        if isinstance(image, EncodedJpeg) and not self.is_one_resize(image.size):
            return self.inner.load(source)
        return image

    def __call__(self, image: Any) -> Any:
        """Return uint8 `[3, R, R]`, or of an `EncodedJpeg` a `JpegPart`."""
        if not isinstance(image, EncodedJpeg):
            return self.inner(image)
        content = torch.frombuffer(bytearray(image.content), dtype=torch.uint8)
        return JpegPart(content, image.size, *self.spans(image.size), image.name)

    def is_one_resize(self, size: tuple[int, int]) -> bool:
        """See `inner`."""
        return self.inner.is_one_resize(size)

    def spans(self, size: tuple[int, int]) -> tuple[Span, Span]:
        """See `inner`."""
        return self.inner.spans(size)

    def shrink(self, image: DecodedImage) -> Pixels:
        """See `inner`."""
        return self.inner.shrink(image)

    def finish(self, pixels: Pixels, size: tuple[int, int]) -> Tensor:
        """See `inner`."""
        return self.inner.finish(pixels, size)


class JpegDecoder:
    """Decodes and resizes JPEGs on a device; those that it refuses, on the CPU.

    Args:
        device: that `decoder_issue` has no word against.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # of its own: in the stream of training each piece would wait for the step
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._has_warned = False

    def decode(self, parts: Sequence[JpegPart]) -> tuple[Tensor, dict[int, ValueError]]:
        """Return the pixels of at least one JPEG, uint8 `[J, 3, R, R]` on the CPU, and by index why some have none."""
        pixels = torch.zeros(len(parts), 3, parts[0].rows.num_out, parts[0].columns.num_out, dtype=torch.uint8)
        errors: dict[int, ValueError] = {}
        for group in _groups([part.size for part in parts], DECODED_AT_ONCE):
            try:
                pixels[group] = self._decode_group(parts[group])
            except RuntimeError:  # of one of them, or the memory is full
                for index in range(group.start, group.stop):
                    try:
                        pixels[index] = self._decode_one(parts[index])
                    except ValueError as error:
                        errors[index] = error
        return pixels, errors

    def _decode_group(self, parts: Sequence[JpegPart]) -> Tensor:
        with self._on_stream():
            images = decode_jpegs([part.content for part in parts], self.device)
            for image, part in zip(images, parts, strict=True):
                if image.shape != (3, part.size[1], part.size[0]):
                    raise RuntimeError(f"{part.size} became {list(image.shape)}")
            resized = [
                resize_batch(images[some], [part.columns for part in parts[some]], [part.rows for part in parts[some]])
                for some in _groups([part.size for part in parts], RESIZED_AT_ONCE)
            ]
            # this waits for the stream: torchvision decodes in another, and the memory that it is given next is free
            return torch.cat(resized).cpu()

    def _decode_one(self, part: JpegPart) -> Tensor:
        try:
            return self._decode_group([part])[0]
        except RuntimeError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "--decode gpu: a JPEG that the decoder refuses is decoded on the CPU, as are others like it (%s)",
                    one_line(error),
                )
            return _decode_on_cpu(part)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def decode_jpegs(contents: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEGs, uint8 `[bytes]` each, to uint8 `[3, H, W]` each on a device, by torchvision.

    Raises:
        ImportError: this torchvision has no decoders any more.
        RuntimeError: it has none for that device, or refuses one of the files.
    """
    # here, so that a torchvision without them fails this flag alone, not every import of a loader
    from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415

    images: list[Tensor] = decode_jpeg(list(contents), mode=ImageReadMode.RGB, device=device)
    return images


def decoder_issue(device: torch.device) -> str | None:
    """Say why no JPEG can be decoded on a device; None: one was."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    try:
        content = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), dtype=np.uint8)))
        shape = decode_jpegs([torch.frombuffer(content, dtype=torch.uint8)], device)[0].cpu().shape
    except Exception as error:  # a library without it fails in many ways
        return f"torchvision decodes no JPEG on {device}: {one_line(error)}"
    return None if shape == (3, 16, 16) else f"torchvision's decoder made {list(shape)} of 16 x 16 pixels"


def _decode_on_cpu(part: JpegPart) -> Tensor:
    image = decode_image(part.content.numpy().tobytes())
    pixels = np.asarray(image.convert("RGBX")) if isinstance(image, Image.Image) else image
    return torch.from_numpy(np.ascontiguousarray(resize(pixels, part.columns, part.rows).transpose(2, 0, 1)))


def _groups(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[slice]:
    """Cut a sequence of images into parts whose widest width times highest height, for each, adds up to `most`."""
    begin, width, height = 0, 0, 0
    for index, size in enumerate(sizes):
        wider, higher = max(width, size[0]), max(height, size[1])
        if begin < index and wider * higher * (index + 1 - begin) > most:
            yield slice(begin, index)
            begin, (wider, higher) = index, size
        width, height = wider, higher
    yield slice(begin, len(sizes))
