"""Colours that share a panel are told apart by colour-blind people, too."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cliptune.report.palette import (
    BEST,
    IMAGE_TO_TEXT,
    LOADED,
    MATCHED,
    PHASES,
    TEXT_TO_IMAGE,
    TRAINING,
    UNMATCHED,
    VALIDATION,
)

Array = np.ndarray[Any, Any]
SEEN = {  # what people see who lack a kind of cone (Machado et al., IEEE TVCG 15, 2009), in linear RGB
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]])  # of white: 1, 1, 1


def lab(color: str, seen: Any) -> Array:
    """CIELAB of a colour, as somebody sees it."""
    values = np.array([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(np.asarray(seen) @ linear, 1e-3, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_of_a_panel_differ(eyes: str) -> None:
    pairs = [(BEST, LOADED), (VALIDATION, TRAINING), (IMAGE_TO_TEXT, TEXT_TO_IMAGE), (MATCHED, UNMATCHED)]
    for first, second in [*pairs, *pairwise(PHASES.values())]:
        assert np.linalg.norm(lab(first, SEEN[eyes]) - lab(second, SEEN[eyes])) > 25, (first, second)
