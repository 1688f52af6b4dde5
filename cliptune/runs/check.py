"""`data_loader.py --check`: a data set looked at as a whole, what was found told, and its suspects listed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cliptune import results
from cliptune.data.diagnosis import KINDS, LIST, Examined, Finding, find_all, is_shared, leaks, suspects, table
from cliptune.data.doctor import CaptionFacts, look_at_captions, look_at_images
from cliptune.data.findings import data_findings
from cliptune.data.fingerprints import Fingerprints
from cliptune.data.identity import file_identities
from cliptune.data.issues import Issues
from cliptune.data.near_duplicates import (
    NearDuplicates,
    find_near_duplicates,
    identical_files,
    look_for_near_duplicates,
)
from cliptune.data.pairs import Pairs
from cliptune.data.splits import split_data
from cliptune.data.suspects import find_images, read_suspects, update_suspects
from cliptune.data.table import NO_SPLIT, SPLITS, IntArray, Strings
from cliptune.data.units import Units, find_units
from cliptune.model.architectures import Architecture, known_architecture
from cliptune.model.cost import cost_of
from cliptune.runtime.device import Precision, free_memory, resolve_device, resolve_precision
from cliptune.runtime.messages import count, printable
from cliptune.settings import TrainingSettings
from cliptune.stage_settings import InspectSettings
from cliptune.training.memory import FREE_MEMORY_FRACTION

logger = logging.getLogger(__name__)

MAX_ISSUES = 1000
"""In the results file."""
_MATRIX = 1024


def describe_data(pairs: Pairs, splits: Mapping[str, Pairs], settings: InspectSettings) -> list[str]:
    """Say what a data set holds, a line a fact; then what is odd about it, without looking at its images."""
    captions = look_at_captions(pairs.captions)
    context_length = _context_length(settings)
    files = {split: file_identities(part.paths) for split, part in splits.items()}
    found = data_findings(
        splits, files, val_split=settings.val_split, batch_size=settings.batch_size, context_length=context_length
    )
    num_repeated = int(is_shared(captions.wordings, pairs.text_to_image.numpy()).sum())
    num_cut = int((captions.num_tokens > context_length).sum())
    return [
        *_facts(pairs, splits, captions, settings),
        f"truncated   {count(num_cut, 'caption')} longer than {context_length} tokens",
        f"repeated    {100 * num_repeated / pairs.num_pairs:.1f}% of the captions are another image's, too",
        *(f"note        {finding}" for finding in found.values() if finding is not None),
    ]


def _facts(pairs: Pairs, splits: Mapping[str, Pairs], captions: CaptionFacts, settings: InspectSettings) -> list[str]:
    fewest, most = (int(limit(np.diff(pairs.starts))) for limit in (np.min, np.max))
    per_image = count(most, "caption") if fewest == most else f"{fewest} to {count(most, 'caption')}"
    parts = ", ".join(f"{name} {len(part)}" for name, part in splits.items())
    how = "as declared" if pairs.declared() else "by group"
    if settings.val_data is not None:
        how = "val: --val_data"
    lengths = captions.num_tokens
    return [
        f"images      {len(pairs)}, {count(pairs.num_pairs, 'pair')}, {per_image} an image",
        f"split       {parts} images ({how})",
        f"captions    {lengths.mean():.1f} tokens on average, longest {lengths.max()}; "
        f"{captions.tokens_per_word:.2f} tokens a word",
    ]


def _context_length(settings: InspectSettings) -> int:
    return settings.context_length or known_architecture(settings.model_name).context_length


class Check(NamedTuple):
    """What a check found: single issues, and what is odd about the whole."""

    issues: Issues
    lines: list[str]


def split_as_a_run(pairs: Pairs, val: Pairs | None, settings: InspectSettings) -> dict[str, Pairs]:
    """Split a data set as a run of these settings would.

    Only where shards are written of it, or a cache keeps them, fingerprints of near-duplicates are taken.

    Args:
        pairs: the data set.
        val: a separate validation set.
        settings: of the data stage.
    """
    paths = pairs.paths if val is None else Strings.concatenate([pairs.paths, val.paths])
    cache_dir = Path(settings.output_dir) / "cache"
    if cache_dir.is_dir() or settings.to_shards is not None:
        copies = look_for_near_duplicates(
            paths, cache_dir=cache_dir if cache_dir.is_dir() else None, num_workers=settings.num_workers
        )
    else:
        logger.info("near-duplicate images were not looked for: --check does, and a run")
        copies = identical_files(paths)
    return _split(pairs, val, copies, settings)[0]


def _split(
    pairs: Pairs, val: Pairs | None, copies: NearDuplicates, settings: InspectSettings
) -> tuple[dict[str, Pairs], Units]:
    return split_data(
        pairs, val, copies=copies, val_split=settings.val_split, seed=settings.seed_of_split,
        join=settings.near_duplicates == "join",
    )  # fmt: skip


def check(pairs: Pairs, val: Pairs | None, settings: InspectSettings) -> Check:
    """Look at every image and caption; write `results/data_check.json` and `results/suspects.csv`.

    Args:
        pairs: the data set.
        val: a separate validation set.
        settings: of the data stage.

    Raises:
        OSError: the results cannot be written.
        ValueError: an unknown model, or a list of suspects that somebody has damaged.
    """
    started_at = datetime.now().isoformat(timespec="seconds")
    architecture = known_architecture(settings.model_name)
    context_length = _context_length(settings)
    folder = Path(settings.output_dir) / "results"
    # what would fail at the end fails before the work
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "suspects.csv").exists():
        read_suspects(folder / "suspects.csv")
    examined, splits, units = _examine(pairs, val, settings)
    is_declared = val is not None or "val" in pairs.declared()
    findings = [
        *find_all(
            examined, batch_size=settings.batch_size, context_length=context_length,
            resolution=architecture.image_resolution,
        ),
        *whole_findings(splits, settings, context_length=context_length),
        *leaks(pairs, units, examined.sides[: len(pairs)], num_drawn=0 if is_declared else len(splits["val"])),
        *_cost(examined, architecture, settings.batch_size),
    ]  # fmt: skip
    findings = [each._replace(advice=each.advice.replace(LIST, str(folder / "suspects.csv"))) for each in findings]
    issues = Issues(list(examined.pairs.issues.first), examined.pairs.issues.count)
    issues.extend(examined.images.issues)
    record = results.DataCheckResults(
        started_at=started_at,
        finished_at=datetime.now().isoformat(timespec="seconds"),
        data=printable(_folder(settings.data_dir)),
        num_images=len(examined.pairs),
        num_texts=examined.pairs.num_pairs,
        splits={name: len(part) for name, part in splits.items()},
        num_issues=issues.count,
        issues=[
            {key: value and printable(value) for key, value in issue.to_dict().items()}
            for issue in issues.first[:MAX_ISSUES]
        ],
        findings=[
            results.CheckFinding.model_validate({**finding._asdict(), "text": printable(finding.text)})
            for finding in findings
        ],
    )
    _set_other_list_aside(folder, examined.pairs, record.data)
    results.write(folder / "data_check.json", record)
    rows = update_suspects(folder / "suspects.csv", suspects(examined), kinds=KINDS)
    lists = (
        f"written: {folder / 'data_check.json'}, and {folder / 'suspects.csv'}: {count(len(rows), 'row')}, "
        f"{sum(not row.keep for row in rows):,} of them with keep: no"
    )
    facts = _facts(examined.pairs, splits, examined.captions, settings)
    lines = [
        *_issue_lines(issues),
        *facts,
        "",
        *table(findings),
        "",
        lists,
        _last_line(issues, int(examined.images.is_readable.sum())),
    ]
    return Check(issues, lines)


def _folder(data_dir: str) -> str:
    return str(Path(data_dir).resolve())


def _set_other_list_aside(folder: Path, pairs: Pairs, data: str) -> None:
    """Rename a list that is about another data set: what a person wrote there counts.

    It is if the check before was of another one, whose images may well have the same names; or if no row is about
    this data.
    """
    path = folder / "suspects.csv"
    rows = read_suspects(path) if path.exists() else []
    if not rows:
        return
    checked = _checked_before(folder / "data_check.json")
    is_other = checked is not None and _folder(checked) != data
    if is_other or (find_images(pairs, [row.image for row in rows]) < 0).all():
        aside, number = path.with_name("suspects-of-other-data.csv"), 1
        while aside.exists():  # an earlier one, which may hold what somebody wrote, too
            number += 1
            aside = path.with_name(f"suspects-of-other-data-{number}.csv")
        path.rename(aside)
        about = checked if is_other else "other data"
        logger.warning(
            "%s is about %s, and is set aside as %s; if that data was only moved, rename it back", path, about, aside
        )


def _checked_before(path: Path) -> str | None:
    """Return the data set that a results file is about; None: there is no such file, or it cannot be read."""
    try:
        return results.DataCheckResults.model_validate_json(path.read_bytes()).data
    except (OSError, ValueError):
        return None


def _examine(pairs: Pairs, val: Pairs | None, settings: InspectSettings) -> tuple[Examined, dict[str, Pairs], IntArray]:
    """Look at all images, also those that are in no split, since a separate set validates; then split them."""
    everything = pairs
    if val is not None:
        others = val.select(np.flatnonzero(pairs.paths.find(val.paths) < 0))
        everything = Pairs.concatenate([pairs, others]) if len(others) else pairs
    cache_dir = Path(settings.output_dir) / "cache"
    fingerprints = Fingerprints(everything.paths, cache_dir)
    images = look_at_images(everything.paths, fingerprints=fingerprints, num_workers=settings.num_workers)
    copies = find_near_duplicates(everything.paths, cache_dir=cache_dir, num_workers=settings.num_workers)
    splits, units = _split(pairs, val, copies, settings)
    sides = np.full(len(everything), NO_SPLIT, dtype=np.int8)
    for split in ("train", "test", "val"):  # of what is in a validation set, too, nothing is trained on
        sides[everything.paths.find(splits[split].paths)] = SPLITS.index(split)
    captions = look_at_captions(everything.captions, num_workers=settings.num_workers)
    near = copies.pairs[~copies.identical]
    look_alikes = find_units(everything.groups, copies).lumps
    if look_alikes:
        near = near[~np.isin(near, np.concatenate(look_alikes)).all(axis=1)]
    return Examined(everything, sides, images, captions, near, look_alikes), splits, units.of


def whole_findings(splits: Mapping[str, Pairs], settings: InspectSettings, *, context_length: int) -> Iterator[Finding]:
    """Yield what a run would be told of the data as a whole, but for what `find_all` says with numbers."""
    files = {split: file_identities(part.paths) for split, part in splits.items()}
    found = data_findings(
        splits, files, val_split=settings.val_split, batch_size=settings.batch_size, context_length=context_length
    )
    for kind, text in found.items():
        if text is not None and kind not in {"repeated_captions", "other_language", "shared_images"}:
            yield Finding(kind, kind.replace("_", " "), None, text)


def _cost(examined: Examined, architecture: Architecture, batch_size: int) -> Iterator[Finding]:
    """Estimate time of training all of a model on this device, and memory of a step."""
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    train, captions, _ = examined.part("train")
    if not len(train):
        return
    cost = cost_of(architecture, text_tokens=float(captions.num_tokens.mean()))
    rate, read = _matrix_rate(device, precision), examined.images.per_second
    seconds = max(3 * cost.pair_flops / rate, 1 / read) * len(train)
    epochs = TrainingSettings().num_epochs
    yield Finding(
        "time", "seconds an epoch", float(f"{seconds:.2g}"),
        f"at least, for {architecture.name} on this {device.type} ({precision.name}, {rate / 1e9:,.0f} GFLOP/s; "
        f"{_rate(read)} images are read a second); {epochs} epochs take {_duration(epochs * seconds)}",
        "--freeze_backbone or a smaller --model_name takes less",
        {"flops_per_pair": 3 * cost.pair_flops, "flops_per_second": rate, "images_read_per_second": read},
    )  # fmt: skip
    pair_bytes = cost.pair_values * (4 if precision.dtype is None else 2)
    needed, free = cost.state_bytes + batch_size * pair_bytes, free_memory(device)
    fits = needed < FREE_MEMORY_FRACTION * free
    yield Finding(
        "memory", "GB for a step", float(f"{needed / 1e9:.2g}"),
        f"about, with a batch of {batch_size} at once: {cost.state_bytes / 1e9:.1f} for "
        f"{cost.num_parameters / 1e6:.0f} million parameters with gradients and moments, {pair_bytes / 1e6:.0f} MB a "
        f"pair; {free / 1e9:.1f} are free. A run takes more: the program itself, and the models that it loads, saves "
        "and compares",
        "" if fits else "a run takes its batches in pieces that fit; --freeze_backbone or a smaller model needs less",
        {"parameters": cost.num_parameters, "state_bytes": cost.state_bytes, "bytes_per_pair": pair_bytes},
    )  # fmt: skip


def _matrix_rate(device: torch.device, precision: Precision) -> float:
    """Measure the operations a second of a matrix product: no training is faster."""
    matrix = torch.ones(_MATRIX, _MATRIX, device=device, dtype=precision.dtype or torch.float32)
    best = math.inf
    for _ in range(4):  # the first one starts threads, or a GPU's library
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * _MATRIX**3 / best


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{_rate(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def _issue_lines(issues: Issues) -> Iterator[str]:
    yield from map(str, issues.first)
    if issues.num_untold:
        yield f"... and {count(issues.num_untold, 'more issue')}"


def _last_line(issues: Issues, num_readable: int) -> str:
    if issues.count:
        return f"{count(issues.count, 'issue')}; {count(num_readable, 'image')} can be read"
    return f"no issues; all {count(num_readable, 'image')} can be read"
