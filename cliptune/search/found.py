"""What queries have found: as text, as plain values, and as a table in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cliptune.runtime.messages import printable, shorten
from cliptune.search.gallery import MAX_QUERY_SHOWN, MAX_THUMBNAILS, Answer, picture, render
from cliptune.search.index import ImageIndex

THUMBNAIL_SIDE = 112


@dataclass(frozen=True, repr=False)
class Found:
    """The images that each query found; a notebook shows them."""

    answers: list[Answer]
    index: ImageIndex
    """The images that were looked through."""
    folder: str
    """How their folder was called."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a `{"query", "results": [{"path", "score"}]}` for each query, best first."""
        return [
            {
                "query": answer.query,
                "results": [
                    {"path": str(Path(self.folder, match.path)), "score": round(match.score, 6)}
                    for match in answer.matches
                ],
            }
            for answer in self.answers
        ]

    def __repr__(self) -> str:
        lines = []
        for answer in self.answers:
            lines.append(printable(answer.query))
            paths = (printable(str(Path(self.folder, match.path))) for match in answer.matches)
            lines += [f"  {match.score:.4f}  {path}" for match, path in zip(answer.matches, paths, strict=True)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Lay out a row for each query, as many as fit; the names of files and the queries are escaped."""
        each = max(1, MAX_THUMBNAILS // len(self.answers))
        rows = [
            {
                "query": printable(shorten(answer.query, MAX_QUERY_SHOWN)),
                "picture": picture(answer.query, THUMBNAIL_SIDE) if answer.is_image else None,
                "cells": [
                    {
                        "name": printable(match.path), "score": match.score,
                        "picture": picture(self.index.paths[match.image], THUMBNAIL_SIDE),
                    }
                    for match in answer.matches[:each]
                ],
            }
            for answer in self.answers[:MAX_THUMBNAILS]
        ]  # fmt: skip
        return render("table.html", rows=rows)
