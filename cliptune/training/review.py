"""What the epochs of a run say about it: told once it lasts, and taken back where the run goes on otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from cliptune.training.advice import (
    collapse,
    is_at_chance,
    nothing_carries_over,
    overfitted_temperature,
    pretrained_at_chance,
    stuck_loss,
)

LASTING_EPOCHS = 2
"""After which features that are all alike are no passing state."""
TAKEN_BACK = {
    "collapse": "the features are told apart again",
    "stuck_loss": "the training loss has left chance",
    "nothing_carries_over": "the validation has left chance",
}
"""What may end by itself, and what is then so."""

Record = Mapping[str, Any]
"""An entry of the history."""


class Review:
    """Reads the history of a run, epoch by epoch.

    Args:
        warmup_steps: over which the rates rise.
        train_chance: `advice.chance_loss` of the training.
        is_pretrained: the model as loaded has been trained on images and captions before.
        past: the epochs that a resumed run has behind it; what they said is not said again.
        chance: of the validation, recalls, `rsum` and `val_loss`.
        num_images: of the validation.
    """

    def __init__(
        self,
        *,
        warmup_steps: int,
        train_chance: float,
        is_pretrained: bool,
        past: Sequence[Record] = (),
        chance: Mapping[str, float] | None = None,
        num_images: int = 0,
    ) -> None:
        self.warmup_steps, self.train_chance, self.is_pretrained = warmup_steps, train_chance, is_pretrained
        self.said: dict[str, int] = {}
        """Kinds of findings that stand, and the epochs that they were said at."""
        for end in range(1, len(past) + 1):
            self.news(past[:end], chance=chance or {}, num_images=num_images)

    def news(self, history: Sequence[Record], *, chance: Mapping[str, float], num_images: int) -> list[str]:
        """Return what is new with the last epoch of the history, a line each.

        Args:
            history: a record of each epoch; the first is the model as loaded.
            chance: of the validation.
            num_images: of the validation.
        """
        epoch = history[-1]["epoch"]
        found = self._findings(history, chance, num_images)
        lines = [f"epoch {epoch}: {text}" for kind, text in found.items() if text and kind not in self.said]
        self.said |= {kind: epoch for kind, text in found.items() if text and kind not in self.said}
        # of features that are all alike the loss is at chance, too: it says nothing of its own then
        ended = [kind for kind in TAKEN_BACK if kind in self.said and found.get(kind, "untold") is None]
        for kind in ended:
            since = self.said.pop(kind)
            lines.append(f"recovered at epoch {epoch}: {TAKEN_BACK[kind]}; what was said of epoch {since} has passed")
        return lines

    def _findings(
        self, history: Sequence[Record], chance: Mapping[str, float], num_images: int
    ) -> dict[str, str | None]:
        """Return what each kind of finding says now; a kind that cannot be told is missing."""
        if len(history) == 1:
            at_chance = pretrained_at_chance(history[0]["rsum"], chance, num_images=num_images)
            return {"pretrained_at_chance": at_chance if self.is_pretrained else None}
        found = {
            "collapse": self._collapse(history, chance),
            "overfitted_temperature": overfitted_temperature(history, chance, num_images=num_images),
        }
        # of epochs that began after the warm-up: before, a loss at chance is no news
        warm = [record for before, record in pairwise(history) if before["step"] >= self.warmup_steps]
        losses = [record["train_loss"] for record in warm]
        if found["collapse"] is None:
            found["stuck_loss"] = stuck_loss(losses, self.train_chance)
        carried = None
        if is_at_chance(max(record["rsum"] for record in history[1:]), chance, num_images=num_images):
            val_losses, val_chance = [record["val_loss"] for record in warm], chance.get("val_loss", 0.0)
            carried = nothing_carries_over(losses, val_losses, chance=self.train_chance, val_chance=val_chance)
        elif any(is_at_chance(record["rsum"], chance, num_images=num_images) for record in history[-2:]):
            return found  # one epoch above chance may be luck
        return {**found, "nothing_carries_over": carried}

    def _collapse(self, history: Sequence[Record], chance: Mapping[str, float]) -> str | None:
        """Find features that have been all alike for some epochs: a random start often goes through one such."""
        start = history[0]["image_cosine"], history[0]["text_cosine"]
        latest = [
            collapse(
                image_cosine=record["image_cosine"],
                text_cosine=record["text_cosine"],
                rsum=record["rsum"],
                chance=chance["rsum"],
                start=start,
            )
            for record in history[1:][-LASTING_EPOCHS:]
        ]
        if latest[-1] is None or "collapse" in self.said:
            return latest[-1]
        return latest[-1] if len(latest) == LASTING_EPOCHS and None not in latest else None
