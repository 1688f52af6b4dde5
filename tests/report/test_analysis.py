"""What is wrong with the data stands on the page: swapped captions, hubs, and a map that is what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cliptune.data.suspects import Suspect, update_suspects
from cliptune.report.page import write_report
from tests.helpers.reports import make_run
from tests.report.test_page import Page

NUM_IMAGES = 80


def planted(folder: Path, *, swapped: bool = False, hub: bool = False) -> str:
    """Return the text of a page: two captions of 160 may be swapped, an image may be everybody's second answer."""
    captions = [f"caption number {index}" for index in range(2 * NUM_IMAGES)]
    results = make_run(folder, num_images=NUM_IMAGES, captions=captions)
    path = results.with_name("retrieval.npz")
    with np.load(path) as file:
        values = dict(file)
    rng = np.random.default_rng(1)
    images = rng.normal(size=(NUM_IMAGES // 4, 24)).repeat(4, axis=0) + 0.5 * rng.normal(size=(NUM_IMAGES, 24))
    texts = images[values["text_to_image"]] + 0.3 * rng.normal(size=(2 * NUM_IMAGES, 24))
    if swapped:
        texts[[20, 121]] = texts[[121, 20]]
    for name, features in (("image", images), ("text", texts)):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        values[f"best_{name}_features"] = unit.astype(np.float16)
    if hub:
        values["best_t2i_ids"][:, 1] = 7
    np.savez(path, **values)
    return " ".join(Page(write_report(results)).text.split())


@pytest.mark.slow
def test_clean_data_gives_no_suspects(tmp_path: Path) -> None:
    text = planted(tmp_path)
    assert "Pairs that look mislabelled 0 of 160 validation pairs None stands out." in text
    assert "Images returned for far too many captions 0 found" in text
    assert "80 of 80 images, 160 of 160 captions" in text


@pytest.mark.slow
def test_swapped_captions_and_hubs_are_listed(tmp_path: Path) -> None:
    text = planted(tmp_path, swapped=True, hub=True)
    listed = re.search(r"Pairs that look mislabelled.*?Images returned", text)
    assert listed is not None
    assert {"caption number 20", "caption number 121"} <= set(re.findall(r"caption number \d+", listed.group()))
    hubs = re.search(r"Images returned for far too many captions 1 found.*?Captions returned", text)
    assert hubs is not None
    assert "photo 7.png Among the first answers to" in hubs.group()


def test_training_pairs_of_the_list_are_shown(tmp_path: Path) -> None:
    results = make_run(tmp_path)
    path = results.with_name("suspects.csv")
    update_suspects(path, [Suspect("a.png", "a <b>dog</b>", "mislabelled: fits badly", False)], kinds=["mislabelled"])
    update_suspects(path, [Suspect("b.png", "a cat", "duplicate: of a.png", False)], kinds=["duplicate"])
    text = " ".join(Page(write_report(results)).text.split())
    assert "Training pairs that look mislabelled 1 in suspects.csv" in text
    assert "a.png a <b>dog</b> mislabelled: fits badly" in text
    assert "b.png" not in text


def test_a_point_of_the_map_is_an_image_or_a_caption(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    paths = [attributes for tag, attributes in page.elements if tag == "path"]
    drawn = {str(each["class"]): str(each["d"]) for each in reversed(paths)}  # the legend has the same after them
    assert drawn["images"].count("M") == 8
    assert drawn["texts"].count("M") == 16
    places = [float(place) for place in re.findall(r"-?\d+\.\d+", drawn["images"])]
    assert all(0 <= place <= 640 for place in places)
