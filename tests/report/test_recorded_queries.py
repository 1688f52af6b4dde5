"""What the recorded answers of a run are to their queries: right, the same, or wrong."""

from pathlib import Path

import numpy as np

from cliptune.report.recorded_queries import Queries, read_queries
from tests.helpers.reports import make_run


def test_the_same_are_equal_words_and_what_belongs_to_a_copy_of_the_image(tmp_path: Path) -> None:
    captions = [f"caption {index}" for index in range(8)]
    captions[4] = captions[0]
    path = make_run(tmp_path, num_images=4, captions=captions).with_name("retrieval.npz")
    values = dict(np.load(path))
    values["loaded_image_features"][3] = values["loaded_image_features"][1]
    values["loaded_image_features"][0] = np.nan  # could not be read
    np.savez(path, **values)
    queries = read_queries(path, run_id="a", best_step=20)
    assert isinstance(queries, Queries)
    # image i has the captions 2i and 2i + 1
    same = {
        way: [(query, answer) for query in range(num) for answer in range(12 - num)
              if not queries.is_right(way, query, answer) and queries.is_same(way, query, answer)]
        for way, num in (("i2t", 4), ("t2i", 8))
    }  # fmt: skip
    assert same["i2t"] == [(0, 4), (1, 6), (1, 7), (2, 0), (3, 2), (3, 3)]
    assert same["t2i"] == [(0, 2), (2, 3), (3, 3), (4, 0), (6, 1), (7, 1)]
