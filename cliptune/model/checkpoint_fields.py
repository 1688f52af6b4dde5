"""What a checkpoint holds beside its tensors, checked when it is read: its values were written by anyone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cliptune.runtime.messages import printable, shorten

CONFIG_KEYS = ("config", "val_images")
"""Of every checkpoint of a run."""
STATE_KEYS = (
    "run_state", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "micro_batch_size",
    "starts_random", "holds_batchnorm",
)  # fmt: skip
"""Of those that a run can be resumed from, as well."""
LATER_STATE_KEYS = ("weights_state_dict", "average_state_dict")
"""Of those, as well, but for runs of before there were adapters and averages."""
MAX_TEXT = 10_000
"""Characters of a text: names, paths and settings are shorter."""

Count = Annotated[int, Field(ge=0, lt=2**63)]


def _check_length(path: str) -> str:
    if len(path) > MAX_TEXT:
        raise ValueError(f"a path has more than {MAX_TEXT:,} characters")
    return path


ImagePath = Annotated[str, AfterValidator(_check_length)]
"""Not `max_length`, for which pydantic wants Unicode: file names are bytes, and odd ones are half characters here."""


class _Fields(BaseModel):
    """Types of what a checkpoint holds, where it holds it; other keys are not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model_state_dict: dict[str, Any]
    architecture: dict[str, Any]
    self_test: dict[str, Any]
    epoch: Count
    global_step: Count
    run_id: Annotated[str, Field(max_length=100)] = ""
    config: dict[str, Any] = {}
    config_file: dict[str, dict[str, Any]] = {}
    folder: ImagePath = ""
    data: dict[str, dict[str, Any]] = {}
    earlier_data: list[dict[str, Any]] = []
    positives: Literal["pair", "image", "caption"] = "image"
    val_images: list[ImagePath] = []
    run_state: dict[str, Any] = {}
    optimizer_state_dict: dict[str, Any] = {}
    scheduler_state_dict: dict[str, Any] | None = None
    scaler_state_dict: dict[str, Any] = {}
    weights_state_dict: dict[str, Any] = {}
    average_state_dict: dict[str, Any] = {}
    num_skipped_steps: Count = 0
    num_skipped_in_a_row: Count = 0
    micro_batch_size: Annotated[int, Field(gt=0, lt=2**63)] | None = None
    starts_random: bool = False
    holds_batchnorm: bool = False
    compiled: bool | None = None


def check_fields(content: dict[str, Any], path: str | Path, *, needs: Collection[str] = ()) -> None:
    """Check the keys of a checkpoint and the types of their values.

    Args:
        content: of the checkpoint.
        path: where it comes from.
        needs: keys that it must have beside those that every checkpoint has.

    Raises:
        ValueError: one is missing or of another type; names the file and the key.
    """
    validate(_Fields, content, path)
    missing = [key for key in needs if key not in content]
    if missing:
        raise ValueError(_damaged(path, f"it holds no {missing[0]}"))
    for key in ("architecture", "config", "config_file", "run_state"):
        try:
            is_long = _has_long_text(content.get(key))
        except RecursionError:
            raise ValueError(_damaged(path, f"its {key} is nested too deeply")) from None
        if is_long:
            raise ValueError(_damaged(path, f"a text of its {key} has more than {MAX_TEXT:,} characters"))


def validate(schema: type[BaseModel], values: Any, path: str | Path, *, inside: str = "") -> None:
    """Check values of a checkpoint against a schema.

    Args:
        schema: what they must be.
        values: what was read.
        path: of the checkpoint.
        inside: the key that they stand under.

    Raises:
        ValueError: they do not fit; names the file and the first key.
    """
    try:
        schema.model_validate(values)
    except ValidationError as error:
        issue = error.errors(include_url=False, include_input=False)[0]
        key = printable(shorten(".".join(str(part) for part in (inside, *issue["loc"]) if part != "")))
        reason = f"it holds no {key}" if issue["type"] == "missing" else f"its {key}: {issue['msg']}"
        raise ValueError(_damaged(path, reason)) from None


def _damaged(path: str | Path, reason: str) -> str:
    return f"{path}: damaged, or written by other means than this toolkit: {reason}"


def _has_long_text(values: Any) -> bool:
    """Look at keys and values, however deep."""
    if isinstance(values, dict):
        return any(_has_long_text(each) for pair in values.items() for each in pair)
    if isinstance(values, list | tuple):
        return any(map(_has_long_text, values))
    return isinstance(values, str | bytes) and len(values) > MAX_TEXT
