"""A run as one page, `results/report.html`: it holds all that it shows and asks nothing of a network."""

from __future__ import annotations

import base64
import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cliptune.data.diagnosis import number_of
from cliptune.language.catalogue import language_of
from cliptune.language.pages import say_page
from cliptune.recorded import SPLIT_NAMES, GainInterval, Verdict, WallTime, comparable, shown_epoch
from cliptune.report import charts
from cliptune.report.analysis import analyse, listed_suspects
from cliptune.report.galleries import WAYS, galleries
from cliptune.report.recorded_queries import Missing, Queries, lacking, read_queries
from cliptune.report.thumbnails import Thumbnails
from cliptune.results import (
    RECALL_KEYS,
    DataCheckResults,
    Metrics,
    TestResults,
    TrainingResults,
    read,
    selection_key,
)
from cliptune.runtime.files import read_json_object, write_text
from cliptune.runtime.messages import count, one_line, printable, shorten

NAME = "report.html"
MAX_TEXT = 2000
"""Characters of a setting, a command or a finding."""
MAX_NAMED = 20
"""Images that cannot be read."""


class Row(NamedTuple):
    """A line of the table of numbers."""

    name: str
    loaded: float
    best: float
    gain: GainInterval | None
    chance: float | None
    whisker: tuple[float, float, float] | None
    """Low, gain and high between -1 and 1, for the drawing."""


def write_report(
    results_path: Path, output: Path | None = None, *, images: bool = True, umap: bool = False, language: str = "en"
) -> Path:
    """Write the page of a training run.

    Args:
        results_path: its `training_results.json`; what lies beside it, `retrieval.npz` and `data_check.json`, is shown.
        output: the page; None: `report.html` beside the results.
        images: False: with captions and names alone, so that no image leaves its place by accident.
        umap: lay out the map of features with UMAP in place of PCA.
        language: `en` or `zh`; what was recorded in English is shown in it, too.

    Returns:
        The page.

    Raises:
        FileNotFoundError: no such results file.
        ValueError: not the results of a training run; `umap` and its package is not installed.
        OSError: the page cannot be written.
    """
    results = read(results_path)
    if not isinstance(results, TrainingResults):
        raise ValueError(f"{results_path}: a report is of a training run; of an evaluation there are figures alone")
    output = results_path.with_name(NAME) if output is None else output
    thumbnails = Thumbnails(enabled=images)
    values = _values(results, results_path.parent, thumbnails, umap=umap)
    # what was not made is known only after all else was collected
    values |= {"thumbnails": thumbnails.made, "images": _images_said(thumbnails, images)}
    write_text(output, say_page(_render("report.html", **values), language_of(language)))
    return output


def _values(results: TrainingResults, folder: Path, thumbnails: Thumbnails, *, umap: bool) -> dict[str, Any]:
    best = shown_epoch(results.best_epoch)
    best_name = f"epoch {best}" if results.best_epoch else "as loaded"
    best_step = next(record.step for record in comparable(results.history) if record.epoch == results.best_epoch)
    queries = read_queries(folder / "retrieval.npz", run_id=results.run_id, best_step=best_step)
    histograms = (results.test or results).histograms
    return {
        "model": _text(results.model_name),
        "finished": results.finished_at,
        "verdict": _verdict(results),
        "rows": _rows(results),
        "details": _details(results),
        "epoch": best_name,
        "split": "test" if results.test else SPLIT_NAMES["val"],
        "results": results,
        "curves": charts.curves(results),
        "history": _history(results),
        "time": _time(getattr(results, "wall_time", None)),
        **_queries_said(queries, thumbnails, best_name, umap=umap),
        "density": charts.densities(
            histograms.baseline if results.best_epoch else None, histograms.best, name=best_name
        ),
        "listed": listed_suspects(folder / "suspects.csv"),
        "check": _check(folder / "data_check.json"),
        "settings": [(_text(name), _text(value)) for name, value in _flat(results.config.model_dump(mode="json"))],
        "run": results.run,
        "command": None if results.run is None else _text(f"python {results.run.command}"),
    }


def _queries_said(queries: Queries | Missing, thumbnails: Thumbnails, best_name: str, *, umap: bool) -> dict[str, Any]:
    if isinstance(queries, Missing):
        return {"no_queries": queries.reason, "galleries": [], "ways": WAYS, "has_captions": True, "analysis": None}
    reason = lacking(queries)
    found = [] if reason else galleries(queries, thumbnails, best_name=best_name)
    return {
        "no_queries": reason,
        "galleries": found,
        "ways": WAYS,
        "has_captions": queries.has_captions,
        "analysis": None if reason else analyse(queries, thumbnails, umap=umap),
    }


def _verdict(results: TrainingResults) -> dict[str, Any]:
    """Say whether the run has helped, in a word, in numbers and in a sentence."""
    verdict = results.verdict
    if verdict is None:
        reason = results.no_verdict or (
            "the run has not ended" if results.finished_at is None else "there is nothing to compare"
        )
        return {
            "kind": "none",
            "word": "No verdict",
            "sentence": _text(f"{reason[:1].upper()}{reason[1:]}."),
            "rsum": None,
            "hero": None,
        }
    word, _, sentence = verdict.sentence().partition(": ")
    return {
        "kind": verdict.verdict.replace(" ", "-"),
        "word": word,
        "sentence": f"{sentence}.",
        "rsum": verdict.rsum,
        "hero": _hero(verdict.rsum),
    }


def _hero(rsum: GainInterval) -> dict[str, Any]:
    """Place a gain, its interval and zero on a line of 400 units."""
    first, last = min(rsum.low, 0.0), max(rsum.high, 0.0)
    span = max(last - first, 1e-9)
    places = {name: round(12 + 376 * (value - first) / span, 1) for name, value in
              (("zero", 0.0), ("low", rsum.low), ("gain", rsum.gain), ("high", rsum.high))}  # fmt: skip
    # near an end of the line a text leans inwards, so that it is not cut there
    anchors = {
        f"{name}_anchor": "start" if places[name] < 30 else "end" if places[name] > 370 else "middle"
        for name in ("zero", "gain")
    }
    return {**places, **anchors, "is_apart": abs(places["gain"] - places["zero"]) > 70}


def _columns(results: TrainingResults) -> tuple[Metrics, Metrics, Any, str]:
    """Return the metrics that are compared: of the test split, if there is one, else of validation."""
    prefix = selection_key(results.baseline.model_dump()).removesuffix("rsum")
    if isinstance(results.test, TestResults):
        return results.test.baseline, results.test.metrics, results.test.chance, prefix
    verdict = results.verdict
    judged = results.best_epoch if verdict is None or verdict.split == "folds" else verdict.epoch
    trained = next((record for record in comparable(results.history) if record.epoch == judged), results.metrics)
    return results.baseline, trained, results.chance, prefix


def _rows(results: TrainingResults) -> list[Row]:
    loaded, best, chance, prefix = _columns(results)
    gains = _gains(results.verdict)
    recalls = [each for name, each in gains.items() if name != "rsum"]
    reach = max([1e-9, *(max(abs(each.low), abs(each.high)) for each in recalls)])
    rows = []
    for name in (*RECALL_KEYS, "rsum"):
        key, gain = f"{prefix}{name}", gains.get(name)
        whisker = None
        if gain is not None:
            scale = reach if name != "rsum" else max(abs(gain.low), abs(gain.high), 1e-9)
            whisker = (gain.low / scale, gain.gain / scale, gain.high / scale)
        values = (getattr(each, key, None) for each in (loaded, best, chance))
        before, after, at_chance = values
        if before is not None and after is not None:
            rows.append(Row(_said(key), before, after, gain, at_chance, whisker))
    return rows


def _gains(verdict: Verdict | None) -> dict[str, GainInterval]:
    return {} if verdict is None else {**verdict.recalls, "rsum": verdict.rsum}


def _said(key: str) -> str:
    """Return a metric's name as people say it."""
    plain = key.removeprefix("merged_")
    merged = ", merged" if plain != key else ""
    if plain == "rsum":
        return f"RSum{merged}"
    way, _, k = plain.partition("_r")
    return f"{'Image to text' if way == 'i2t' else 'Text to image'} R@{k}{merged}"


def _details(results: TrainingResults) -> list[tuple[str, str, str]]:
    """Return further numbers of the model as loaded and the best one."""
    loaded, best, _, _ = _columns(results)
    names = {
        "i2t_median_rank": "Median rank, image to text",
        "t2i_median_rank": "Median rank, text to image",
        "similarity_gap": "Similarity gap of matched and unmatched pairs",
        "val_loss": "Loss (nats)",
    }
    pairs = [(said, getattr(loaded, key), getattr(best, key)) for key, said in names.items()]
    return [(said, charts.shown_number(a), charts.shown_number(b)) for said, a, b in pairs if None not in (a, b)]


def _history(results: TrainingResults) -> list[tuple[str, ...]]:
    def number(value: float | None) -> str:
        return "" if value is None else charts.shown_number(value)

    return [
        (f"{shown_epoch(each.epoch)}{' (earlier data)' if each.earlier_data else ''}",
         *map(number, (each.train_loss, each.val_loss, each.i2t_r1, each.t2i_r1, each.rsum)),
         "" if each.learning_rate is None else f"{each.learning_rate:.3g}")
        for each in results.history
    ]  # fmt: skip


def _time(time: WallTime | None) -> dict[str, Any] | None:
    """Return where the run's time went: of each phase its name, its duration, its fraction and where it starts."""
    if time is None or time.total <= 0:
        return None
    start, parts = 0.0, []
    for phase, seconds in time.phases().items():
        parts.append((phase, _duration(seconds), seconds / time.total, start))
        start += seconds / time.total
    return {"total": _duration(time.total), "parts": parts}


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _check(path: Path) -> dict[str, Any] | None:
    """Return what the data's check has found; None: it was not run."""
    if not path.exists():
        return None
    try:
        found = DataCheckResults.model_validate(read_json_object(path))
    except (OSError, ValueError) as error:
        return {"failed": _text(f"{path.name} cannot be read: {one_line(error)}")}
    images, texts = count(found.num_images, "image"), count(found.num_texts, "caption")
    return {
        "failed": "",
        "summary": f"{images}, {texts}, {count(found.num_issues, 'issue')}; looked at on {found.finished_at[:10]}.",
        "findings": [
            (_text(each.name), number_of(each.number), _text(each.text), _text(each.advice)) for each in found.findings
        ],
    }


def _images_said(thumbnails: Thumbnails, images: bool) -> dict[str, Any]:
    named = list(thumbnails.unreadable.items())
    return {
        "enabled": images,
        "num_left_out": thumbnails.num_left_out,
        "num_unreadable": len(named),
        "unreadable": [(_text(name), _text(reason)) for name, reason in named[:MAX_NAMED]],
    }


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as `training.batch_size` and its value."""
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat


def _text(value: object) -> str:
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return printable(shorten(text, MAX_TEXT))


def _render(name: str, **values: Any) -> str:
    """Fill in a page; what is put into it is escaped, and only its own style and script may run."""
    environment = Environment(
        loader=PackageLoader("cliptune.report", "pages"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style, script = (_source(environment, file) for file in ("style.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    return environment.get_template(name).render(style=Markup(style), script=Markup(script), policy=policy, **values)


def _source(environment: Environment, file: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, file)[0]


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
