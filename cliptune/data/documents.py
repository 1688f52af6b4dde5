"""JSON files: lists and lines of records, and objects whose keys tell their form (COCO, Karpathy, mappings)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from cliptune.data.columns import caption_cells, read_rows
from cliptune.data.index import KNOWN_FORMS, NoCaptionsError, Records, count_columns, is_id, kind, quote
from cliptune.data.json_tables import table_rows
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
    images = document.get("images")
    if isinstance(images, list) and isinstance(document.get("annotations"), list):
        return _read_coco(found, images, document["annotations"])
    if isinstance(images, list) and any(isinstance(sentence, dict) for sentence in _sentences(images)):
        return _read_karpathy(found, images)
    is_mapping = not document or any(IMAGE_NAME.search(name) for name in document)
    if is_mapping and not (document and all(isinstance(captions, dict) for captions in document.values())):
        del document  # it is parsed once more, as pairs
        return _read_mapping(found, text)
    if rows := _mapped_rows(document) if is_mapping else table_rows(found, document):
        return read_rows(found, "json", lambda: enumerate(rows(), 1), unit="row")
    if found.column_names.columns(document).image is not None:
        return read_rows(found, "jsonl", lambda: iter([(1, document)]), unit="line")
    if isinstance(images, list) and images:
        raise NoCaptionsError(
            f"{found.path}: images without captions: no annotations (COCO) and no sentences (Karpathy)"
        )
    if all(isinstance(texts, list) and texts and all(map(_is_text, texts)) for texts in document.values()):
        return _read_mapping(found, text)  # of names without an ending
    keys = ", ".join(shorten(key) for key in list(document)[:10])
    raise ValueError(f"{found.path}: a JSON object of no known form (keys: {keys}); {KNOWN_FORMS}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _sentences(images: list[Any]) -> Iterator[Any]:
    lists = (image.get("sentences") for image in images if isinstance(image, dict))
    return chain.from_iterable(sentences for sentences in lists if isinstance(sentences, list))


def _mapped_rows(document: dict[str, Any]) -> Callable[[], Iterator[Any]]:
    """Return the rows of {file name: {"caption": ...}}."""
    return lambda: ({**values, "image_path": image} for image, values in document.items())


def _read_coco(found: Records, images: list[Any], annotations: list[Any]) -> str:
    found.unit = "image"
    image_columns, caption_columns = count_columns(images), count_columns(annotations)
    name_column = found.choose_image(image_columns, ("file_name",))
    chosen = found.choose_captions(caption_columns)
    found.ignore(image_columns, ("id", name_column, "split", "group"))
    found.ignore(caption_columns, ("id", "image_id", *chosen))
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
            usable = found.captions(location, caption_cells(annotation, chosen))
            captions.setdefault(image_id, []).extend(usable)
    for image_id, (number, image) in listed.items():
        if captions.get(image_id):
            found.add(number, image.get(name_column), captions[image_id], image.get("split"), image.get("group"))
    found.uncaptioned([number for image_id, (number, _) in listed.items() if image_id not in captions])
    return "coco"


def _read_karpathy(found: Records, images: list[Any]) -> str:
    found.unit = "image"
    columns = count_columns(images)
    sentence_columns = count_columns(_sentences(images))
    name_column = found.choose_image(Counter({name: columns[name] for name in columns if name != "filepath"}))
    chosen = found.choose_captions(sentence_columns, ("raw",))
    found.ignore(columns, (name_column, "filepath", "split", "group", "sentences"))
    found.ignore(sentence_columns, chosen)
    uncaptioned = []
    for number, image in found.objects(images, "image"):
        sentences = image.get("sentences")
        name, folder = image.get(name_column), image.get("filepath")
        if not sentences:
            uncaptioned.append(number)
        elif not isinstance(sentences, list):
            found.issue(number, f"sentences is {kind(sentences)}, not a list")
        else:
            captions = [caption_cells(value, chosen) if isinstance(value, dict) else value for value in sentences]
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
