"""JSON files: lists and lines of records, and objects whose keys tell their form (COCO, Karpathy, mappings)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from cliptune.data.columns import read_rows
from cliptune.data.index import IMAGE_COLUMNS, KNOWN_FORMS, NoCaptionsError, Records, count_columns, is_id, kind, quote
from cliptune.data.text_stream import TextFile, json_reason
from cliptune.data.token_lines import IMAGE_NAME
from cliptune.runtime.messages import shorten


def is_json_lines(text: TextFile) -> bool:
    """Tell whether the first two lines are objects each: never the start of one JSON document."""
    filled = (line.strip() for line in text.lines() if line.strip())
    first, second = next(filled, ""), next(filled, "")
    return first.startswith("{") and first.endswith("}") and second.startswith("{")


def json_lines(text: TextFile) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line that is not blank; the value of an invalid one is the ValueError."""
    for number, line in enumerate(text.lines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                value = ValueError(f"not valid JSON: {getattr(error, 'msg', None) or json_reason(error)}")
            yield number, value


def read_object(found: Records, text: TextFile) -> str:
    """Read one JSON object: the form is told by its keys."""
    try:
        document = json.loads(text.read())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{found.path}: not valid JSON: {json_reason(error)}") from None
    if isinstance(document.get("images"), list):
        if isinstance(document.get("annotations"), list):
            return _read_coco(found, document["images"], document["annotations"])
        if not any(isinstance(image, dict) and "sentences" in image for image in document["images"]):
            raise NoCaptionsError(
                f"{found.path}: images without captions: no annotations (COCO) and no sentences (Karpathy)"
            )
        return _read_karpathy(found, document["images"])
    if not document or any(IMAGE_NAME.search(name) for name in document):
        del document  # it is parsed once more, as pairs
        return _read_mapping(found, text)
    if not document.keys().isdisjoint(IMAGE_COLUMNS):
        return read_rows(found, "jsonl", lambda: iter([(1, document)]), unit="line")
    keys = ", ".join(shorten(key) for key in list(document)[:10])
    raise ValueError(f"{found.path}: a JSON object of no known form (keys: {keys}); {KNOWN_FORMS}")


def _read_coco(found: Records, images: list[Any], annotations: list[Any]) -> str:
    found.unit = "image"
    image_columns, caption_columns = count_columns(images), count_columns(annotations)
    name_column = found.choose(image_columns, ("file_name", *IMAGE_COLUMNS), "image")
    caption_column = found.choose_caption(caption_columns)
    found.ignore(image_columns, ("id", name_column, "split", "group"))
    found.ignore(caption_columns, ("id", "image_id", caption_column))
    listed: dict[int | str, tuple[int, dict[str, Any]]] = {}
    for number, image in found.objects(images, "image"):
        image_id: Any = image.get("id")
        if not is_id(image_id) or image_id in listed:
            found.issue(number, f"id {quote(image_id)} {'stands twice' if is_id(image_id) else 'is not an id'}")
        else:
            listed[image_id] = (number, image)
    captions: dict[int | str, list[str]] = {}
    for number, annotation in found.objects(annotations, "annotation"):
        image_id, location = annotation.get("image_id"), found.location(number, "annotation")
        if not is_id(image_id) or image_id not in listed:
            found.issue(location, f"image_id {quote(image_id)} is the id of no image")
        else:
            usable = found.captions(location, annotation.get(caption_column))
            captions.setdefault(image_id, []).extend(usable)
    for image_id, (number, image) in listed.items():
        if captions.get(image_id):
            found.add(number, image.get(name_column), captions[image_id], image.get("split"), image.get("group"))
    found.uncaptioned([number for image_id, (number, _) in listed.items() if image_id not in captions])
    return "coco"


def _read_karpathy(found: Records, images: list[Any]) -> str:
    found.unit = "image"
    columns = count_columns(images)
    lists = (image.get("sentences") for image in images if isinstance(image, dict))
    sentence_columns = count_columns(
        chain.from_iterable(sentences for sentences in lists if isinstance(sentences, list))
    )
    found.choose(columns, ("filename",), "image")
    caption_column = found.choose_caption(sentence_columns, ("raw",))
    found.ignore(columns, ("filename", "filepath", "split", "group", "sentences"))
    found.ignore(sentence_columns, (caption_column,))
    uncaptioned = []
    for number, image in found.objects(images, "image"):
        sentences = image.get("sentences")
        name, folder = image.get("filename"), image.get("filepath")
        if not sentences:
            uncaptioned.append(number)
        elif not isinstance(sentences, list):
            found.issue(number, f"sentences is {kind(sentences)}, not a list")
        else:
            captions = [value.get(caption_column) if isinstance(value, dict) else None for value in sentences]
            path = f"{folder}/{name}" if isinstance(name, str) and name.strip() and folder else name
            found.add(number, path, captions, image.get("split"), image.get("group"))
    found.uncaptioned(uncaptioned)
    return "karpathy"


def _read_mapping(found: Records, text: TextFile) -> str:
    found.refuse_caption_key("mapping")
    found.unit = "row"
    # read as pairs: a plain JSON object keeps only the last captions of a name that stands twice.
    for number, (image, captions) in enumerate(json.loads(text.read(), object_pairs_hook=tuple), 1):
        found.add(number, image, captions)
    return "mapping"
