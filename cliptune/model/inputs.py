"""What people give a model to encode, taken as meant or refused by name: to pixels, and to tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cliptune.preprocess.decode import to_rgb
from cliptune.preprocess.transforms import PixelTransform
from cliptune.runtime.recording import is_recorded

AT_ONCE = 64
"""Images or texts of a list that are encoded at once."""

ImageInput = Tensor | NDArray[Any] | Image.Image | str | Path | bytes | BinaryIO | Mapping[str, Any] | Iterable[Any]
TextInput = Tensor | NDArray[Any] | str | Mapping[str, Any] | Iterable[Any]


def image_batches(images: Any, transform: PixelTransform, *, size: int | None = AT_ONCE) -> Iterator[Tensor]:
    """Bring images to pixels, a list of them in batches, so that no more of them are in memory at once.

    Args:
        images: pixels `[B, 3, R, R]` or `[3, R, R]`, uint8, or float and normalised, as a tensor or an array; one or
            several Pillow images, paths, files' bytes, open binary files, uint8 arrays `[H, W, 3]`, `[H, W, 4]` or
            `[H, W]`, or pixels `[3, R, R]`; or a mapping whose `pixel_values` these are.
        transform: preprocesses what are not pixels yet.
        size: images of a batch, at most; None: all. A tensor is a batch already, whatever its size.

    Yields:
        `[B, 3, R, R]`; for no image once `[0, 3, R, R]`.

    Raises:
        ValueError: something else; names type and shape.
        FileNotFoundError: no such file.
    """
    images = _plain(images, key="pixel_values", name="images")
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[-1] not in {1, 3, 4}:
        images = torch.from_numpy(np.array(images))
    if isinstance(images, Tensor):
        yield _checked_pixels(images[None] if images.ndim == 3 else images, transform.resolution)
        return
    is_one = isinstance(images, Image.Image | str | Path | bytes | bytearray) or hasattr(images, "read")
    if is_one or (isinstance(images, np.ndarray) and images.ndim < 4):
        yield _to_pixels_of_one(images, "images", transform)[None]
        return
    rows: list[Tensor] = []
    kinds = set()
    for n, image in enumerate(_iterable(images, "images")):
        rows.append(_to_pixels_of_one(image, f"images[{n}]", transform))
        kinds.add(rows[-1].dtype)
        if len(kinds) > 1:
            raise ValueError("images mixes pixels that are normalised with those that are not: normalise all, or none")
        if len(rows) == size:
            yield torch.stack(rows)
            rows = []
    side = transform.resolution
    if rows or not kinds:
        yield torch.stack(rows) if rows else torch.zeros(0, 3, side, side, dtype=torch.uint8)


def to_tokens(texts: Any, tokenize: Callable[[list[str]], Tensor], *, context_length: int, vocab_size: int) -> Tensor:
    """Bring texts to tokens.

    Args:
        texts: one or several strings; ids `[B, L]` or `[L]` of any integer type, as a tensor, an array or lists, which
            may differ in length; or a mapping whose `input_ids` these are, as tokenizers return it.
        tokenize: takes strings to tokens.
        context_length: the longest L.
        vocab_size: ids are below it.

    Returns:
        int64 `[B, L]`; for no text `[0, context_length]`.

    Raises:
        ValueError: something else; names type and shape, or the ids.
    """
    texts = _plain(texts, key="input_ids", name="texts")
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, np.ndarray):
        texts = torch.from_numpy(np.array(texts))
    if not isinstance(texts, Tensor):
        texts = list(_iterable(texts, "texts"))
        if all(isinstance(text, str) for text in texts):
            return tokenize(texts)
        texts = _padded_ids(texts)
    return _checked_tokens(texts[None] if texts.ndim == 1 else texts, context_length, vocab_size)


def _plain(value: Any, *, key: str, name: str) -> Any:
    """Take what a mapping holds, and a list of what are no numbers."""
    if isinstance(value, Mapping):
        if key not in value:
            raise ValueError(
                f"{name}: a mapping without {key!r}; it has {', '.join(map(str, value))[:200] or 'nothing'}"
            )
        value = value[key]
    is_list = isinstance(value, np.ndarray) and (value.dtype.kind in "OUS" or value.shape == (0,))
    return value.tolist() if is_list else value


def _iterable(value: Any, name: str) -> Iterable[Any]:
    if not isinstance(value, Iterable) or isinstance(value, bytes | bytearray):
        raise ValueError(f"{name} cannot be encoded: {_describe(value)}")
    return value


def _to_pixels_of_one(image: Any, name: str, transform: PixelTransform) -> Tensor:
    """Return `[3, R, R]`."""
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in {1, 3, 4})):
            image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        elif image.ndim == 3 and image.shape[0] == 3:
            image = torch.from_numpy(np.array(image))
    if isinstance(image, Tensor):
        return _checked_pixels(image[None], transform.resolution)[0]
    if isinstance(image, Image.Image):
        return transform(to_rgb(image))
    if isinstance(image, str) and re.match(r"\w+://", image):
        raise FileNotFoundError(f"{name}: {image[:200]} is an address, not a file: download it first")
    if isinstance(image, str | Path):
        return transform(transform.load(image))
    content = image.read() if hasattr(image, "read") else image
    if not isinstance(content, bytes | bytearray):
        raise ValueError(
            f"{name} cannot be encoded: {_describe(image)}; try a Pillow image, a path, a file's bytes, an array uint8 "
            "[H, W, 3], or pixels [3, R, R]"
        )
    if not content:
        raise ValueError(f"{name} has no bytes, or has been read to its end: seek(0) goes back")
    try:
        return transform(transform.load(bytes(content)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _checked_pixels(pixels: Tensor, side: int) -> Tensor:
    if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
        raise ValueError(
            f"pixels of shape {list(pixels.shape)}, {pixels.dtype}: this model takes [B, 3, {side}, {side}], uint8, or "
            "float and normalised; Pillow images, paths and arrays [H, W, 3] of any size are preprocessed"
        )
    return pixels


def _padded_ids(rows: list[Any]) -> Tensor:
    """Put lists of ids together, padded with 0, or make a row of ids."""
    if all(isinstance(row, int | np.integer) and not isinstance(row, bool) for row in rows):
        return torch.tensor(rows, dtype=torch.int64)
    tensors = []
    for number, row in enumerate(rows):
        is_ids = isinstance(row, Tensor | np.ndarray | list | tuple) and not any(isinstance(id_, str) for id_ in row)
        try:
            tensors.append(torch.as_tensor(row) if is_ids else None)
        except (TypeError, ValueError):
            tensors.append(None)
        if tensors[-1] is None or tensors[-1].ndim != 1:
            raise ValueError(f"texts[{number}] is neither a text nor a row of token ids: {_describe(row)}")
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)  # type: ignore[arg-type]


def _checked_tokens(tokens: Tensor, context_length: int, vocab_size: int) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens cannot be encoded: {_describe(tokens)}; ids are integers")
    if tokens.ndim != 2 or not 0 < tokens.shape[1] <= context_length:
        raise ValueError(f"tokens: {_describe(tokens)}; this model takes [B, L], L at most {context_length}")
    tokens = tokens.long()
    if not is_recorded() and tokens.numel():  # a program that is recorded will see others
        least, largest = (int(value) for value in tokens.aminmax())
        if least < 0 or largest >= vocab_size:
            raise ValueError(
                f"tokens: ids from {least} to {largest}, this model has those from 0 to {vocab_size - 1}; are they of "
                "another tokenizer?"
            )
    return tokens


def _describe(value: Any) -> str:
    """Name a value by its type, and its shape or its beginning."""
    if isinstance(value, np.ndarray | Tensor):
        return f"{type(value).__name__} of shape {list(value.shape)}, {value.dtype}"
    return f"{type(value).__name__} {value!r:.40}"
