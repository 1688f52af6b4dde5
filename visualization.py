"""Recorded numbers to figures, and to the report of a run. As a stage it redraws them from a results file:

python visualization.py --results results/training_results.json --report
"""

from __future__ import annotations

if __name__ == "__main__":
    from cliptune.runtime.stopping import leave_at_signals

    leave_at_signals()  # the imports take seconds

import sys
from pathlib import Path

from cliptune.cli import check_command_line, parse_settings, run_stage
from cliptune.stage_settings import VisualizationSettings

if __name__ == "__main__":
    check_command_line(VisualizationSettings, str(__doc__))

from cliptune import results as results_file
from cliptune.language.catalogue import language_of
from cliptune.report.bars import comparison_figure, evaluation_metrics_figure, model_metrics_figure
from cliptune.report.curves import interpolation_figure, training_curves_figure
from cliptune.report.style import DPI, say_figure
from cliptune.results import SeveralEvaluations, TrainingResults
from cliptune.runtime.files import atomic_writer
from cliptune.runtime.messages import printable


def main(argv: list[str] | None = None) -> int:
    """Draw the figures of a results file; returns the exit code."""
    return run_stage(lambda: _draw(argv), name="visualization.py", argv=argv)


def _draw(argv: list[str] | None) -> int:
    settings, _ = parse_settings(VisualizationSettings, argv, description=str(__doc__))
    output_dir = None if settings.output_dir is None else Path(settings.output_dir)
    results_path = Path(settings.results)
    if settings.suspects is not None:
        print(language_of(settings.language).say_lines(_list_suspects(results_path)))
    pages = []  # before the figures: of what it asks for, something may not be installed
    if settings.report != "none":
        from cliptune.report.page import NAME, write_report  # noqa: PLC0415  (--help needs none of it)

        page = (results_path.parent if output_dir is None else output_dir) / NAME
        is_umap = settings.feature_map == "umap"
        pages.append(
            write_report(results_path, page, images=settings.report == "full", umap=is_umap, language=settings.language)
        )
    for path in [*draw_figures(results_path, output_dir, language=settings.language), *pages]:
        print(printable(str(path)))
    return 0


def _list_suspects(results_path: Path) -> str:
    # the only part that needs a model, and PyTorch
    from clip_model import CLIPModel  # noqa: PLC0415
    from cliptune.runs.suspects import find_suspects  # noqa: PLC0415
    from data_loader import ImageTextDataset  # noqa: PLC0415

    return str(find_suspects(results_path, build=CLIPModel, open_dataset=ImageTextDataset))


def draw_figures(results_path: Path, output_dir: Path | None = None, *, language: str = "en") -> list[Path]:
    """Draw what a results file holds: two or three figures of a training run, one of an evaluation or of several.

    A figure of an interpolation that the results do not hold any more is deleted.

    Args:
        results_path: a `training_results.json` or `evaluation_results.json`.
        output_dir: where the PNG files go; None: beside the results.
        language: of titles, labels and legends, `en` or `zh`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a results file; names the file and the key that is missing or wrong.
    """
    results = results_file.read(results_path)
    if isinstance(results, TrainingResults):
        curves, metrics = training_curves_figure(results), model_metrics_figure(results)
        figures = {"training_curves.png": curves, "model_metrics.png": metrics}
        if results.interpolation is not None:
            figures["interpolation.png"] = interpolation_figure(results, results.interpolation)
    elif isinstance(results, SeveralEvaluations):
        figures = {"evaluation_comparison.png": comparison_figure(results)}
    else:
        figures = {"evaluation_metrics.png": evaluation_metrics_figure(results)}
    folder = results_path.parent if output_dir is None else output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        say_figure(figure, language_of(language))
        with atomic_writer(folder / name) as file:
            figure.savefig(file, format="png", dpi=DPI)
    if isinstance(results, TrainingResults) and results.interpolation is None:
        (folder / "interpolation.png").unlink(missing_ok=True)  # of an average that the run has set aside since
    return [folder / name for name in figures]


if __name__ == "__main__":
    sys.exit(main())
