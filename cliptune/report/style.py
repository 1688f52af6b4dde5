"""What all figures share: paper, fonts that have the letters, titles, the legend."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from cliptune.language.catalogue import Language
from cliptune.recorded import SPLIT_NAMES, VERDICTS, shown_epoch
from cliptune.report.palette import GREY, GRID, INK
from cliptune.results import TrainingResults, selection_key
from cliptune.runtime.messages import count, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

NAME = "name"
"""Marks a text (its gid) that is somebody's name for something, and the same in every language."""
DPI = 100
MAX_NAME, MAX_TITLE = 60, 200
"""Characters of a name from the file, and of a title."""
MAX_ROWS = 17
"""Of a legend with letters of the usual size; of more rows they are smaller."""
TITLE_SIZE = 14.0
"""Points."""
CJK_FONT = "Noto Sans CJK SC"
"""The one to install where there is none."""
CJK_FONTS = (
    CJK_FONT, "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Sans CJK KR", "Noto Sans SC",
    "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "AR PL UMing CN", "Microsoft YaHei", "SimHei", "SimSun", "PingFang SC", "Hiragino Sans GB", "Hiragino Sans",
    "Heiti TC", "Yu Gothic", "Meiryo", "MS Gothic", "IPAGothic", "TakaoGothic", "Malgun Gothic",
    "Apple SD Gothic Neo", "NanumGothic", "Unifont", "Arial Unicode MS",
)  # fmt: skip
"""Fonts of Linux, Windows and macOS that have Chinese, Japanese or Korean letters; the first that is there is taken."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, whose panels make room for what stands around them."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow; --help needs no figures)

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    return figure


def set_title(figure: Figure, text: str) -> None:
    """Write a title in one line from the left edge on, small enough for the figure's width."""
    text, families = drawable(shorten(text, MAX_TITLE))
    length = sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)
    # a letter is about 0.56 of the font's size wide, on average
    size = min(TITLE_SIZE, 72 * figure.get_figwidth() * 0.98 / (0.56 * max(length, 1)))
    where: dict[str, Any] = {"x": 0.008, "ha": "left", "fontsize": size, "color": INK}
    figure.suptitle(text, parse_math=False, fontfamily=families, **where)  # a name with two $ is not a formula


def set_head(axes: Axes, title: str, *notes: str) -> None:
    """Write a panel's title and under it, small, its unit and what else a reader needs."""
    axes.set_title(title, loc="left", pad=24, fontsize=12, fontweight="bold", color=INK)
    text = " · ".join(note for note in notes if note)
    where: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 8), "textcoords": "offset points"}
    # a long note must not take width from the panel
    axes.annotate(text, **where, ha="left", va="bottom", fontsize=9, color=GREY, in_layout=False, parse_math=False)


def finish(axes: Axes) -> None:
    """Draw a panel's frame in the background."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def add_legend(owner: Axes | Figure, panels: Sequence[Axes], **options: Any) -> None:
    """Explain in one legend what these panels show; what several of them show stands once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    size = 10 * min(MAX_ROWS * options.get("ncols", 1) / max(len(found), 1), 1)
    legend = owner.legend(list(found.values()), list(found), frameon=False, fontsize=size, **options)
    for text in legend.get_texts():
        letters, families = drawable(text.get_text())
        text.set(text=letters, fontfamily=families, parse_math=False)


def say_figure(figure: Figure, language: Language) -> None:
    """Say a figure's titles, labels and legends in a language, as far as a font is there that has its letters."""
    from matplotlib.text import Text  # noqa: PLC0415  (as above)

    if language.name == "en":
        return
    texts = [each for each in figure.findobj(Text) if isinstance(each, Text) and each.get_gid() != NAME]
    said = {each: language.say(each.get_text()) for each in texts}
    fonts = {each: _fonts_for(text) for each, text in said.items() if text != each.get_text()}
    if any(missing for missing, _ in fonts.values()):
        _tell_once("figures are labelled in English: no font with Chinese letters is installed, such as %s")
        return
    for each, (_, families) in fonts.items():
        each.set(text=said[each], fontfamily=families)
    if figure.get_suptitle():  # whose size goes by its length
        set_title(figure, figure.get_suptitle())


def merged_prefix(results: TrainingResults) -> str:
    """Return what keys of the recalls begin with that a run has gone by: `merged_` where captions are classes."""
    return selection_key(results.baseline.model_dump()).removesuffix("rsum")


def headline(results: TrainingResults) -> str:
    """Say in one line how a run ended."""
    best, verdict = results.best_epoch, results.verdict
    text = f"epoch {shown_epoch(best)} is the best" if best else "no epoch beat the model as loaded"
    if verdict is None:
        return text
    images = count(verdict.num_images, f"{SPLIT_NAMES[verdict.split]} image")
    return f"{text}. {VERDICTS[verdict.verdict]}: RSum {verdict.rsum} on {images}"


def drawable(text: str) -> tuple[str, list[str]]:
    """Return a text with each letter escaped that no font has, which would be a box, and the fonts to draw it with."""
    missing, families = _fonts_for(text)
    if missing:
        _tell_once("letters that no installed font has are drawn as codes: many are in a font such as %s")
    return "".join(ascii(letter)[1:-1] if ord(letter) in missing else letter for letter in text), families


def _fonts_for(text: str) -> tuple[set[int], list[str]]:
    """Return the letters of a text that no font has, and the fonts to draw the others with."""
    from matplotlib import font_manager, rcParams  # noqa: PLC0415  (as above)

    families = list(rcParams["font.family"])
    default = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    missing = set(map(ord, text)) - default.get_charmap().keys()
    if not missing:
        return missing, families
    found, left = _known_fonts(missing)
    if left:
        _add_new_fonts()
        found, left = _known_fonts(missing)
    return left, families + found


def _known_fonts(letters: set[int]) -> tuple[list[str], set[int]]:
    """Return fonts of matplotlib's list that have these letters, and the letters that none of them has."""
    from matplotlib import font_manager  # noqa: PLC0415  (as above)

    families, left = [], set(letters)
    known = {font.name for font in font_manager.fontManager.ttflist}
    for name in filter(known.__contains__, CJK_FONTS):
        with suppress(OSError, RuntimeError, ValueError):  # matplotlib's list is cached: a font may be gone since
            # of a family's faces the one that will draw: an italic or a bold one may have other letters
            face = font_manager.findfont(font_manager.FontProperties(family=name), fallback_to_default=False)
            has = font_manager.get_font(face).get_charmap().keys()
            families += [] if left.isdisjoint(has) else [name]
            left -= has
    return families, left


@cache
def _tell_once(message: str) -> None:
    logger.warning(message, CJK_FONT)


@cache
def _add_new_fonts() -> None:
    """Tell matplotlib of fonts that were installed after it made its list, which it keeps for good."""
    from matplotlib import font_manager  # noqa: PLC0415  (as above)

    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            with suppress(OSError, RuntimeError, ValueError):  # no font, or one of a form that cannot be drawn
                font_manager.fontManager.addfont(path)
