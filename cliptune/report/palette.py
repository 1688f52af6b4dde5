"""Colours of figures and pages: those of Okabe and Ito (Color Universal Design, 2008), for colour-blind eyes too.

What a colour means is the same everywhere. Each also has another sign beside it: a dash, a marker, a label.
"""

from __future__ import annotations

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY, GRID = "#222222", "#6B6B6B", "#DDDDDD"
"""Text and marks; chance and what stays in the background; lines of the grid."""

BEST, LOADED = BLUE, "#8DBFE3"
"""The best model, and beside it the one as loaded."""
VALIDATION, TRAINING, CHOSEN = BLUE, GREY, GREEN
IMAGE_TO_TEXT, TEXT_TO_IMAGE = PURPLE, VERMILLION
MATCHED, UNMATCHED = GREEN, ORANGE
PHASES = {
    "start": GREEN, "data": VERMILLION, "step": BLUE, "validation": ORANGE, "saving": SKY, "rest": GREY,
}  # fmt: skip
"""Where a run's time went; neighbours differ."""
SERIES = (ORANGE, SKY, VERMILLION, GREEN, PURPLE)
"""Of curves whose number is not known beforehand, all dashed."""
