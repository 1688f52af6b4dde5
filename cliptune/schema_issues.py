"""What is wrong with a value of a file that has a schema, in words."""

from __future__ import annotations

from typing import Any

from cliptune.runtime.messages import printable, shorten

_EXPECTED = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "named_tuple_type": "a list",
    "too_long": "3 values",  # a point of the schedule
    "string_type": "a text",
    "greater_than": "a number over {gt:g}",
    "greater_than_equal": "a number of {ge:g} or more",
    "less_than_equal": "a number of {le:g} or less",
}


def describe_issue(issue: Any) -> str:
    """Say what is wrong with one key, as it stands in the file: `history[3].val_loss`."""
    key = ""
    for part in issue["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{printable(shorten(part))}"
    key = key.removeprefix(".")
    if issue["type"] == "missing":
        return f"no key {key}, which training_results.json and evaluation_results.json have"
    if issue["type"] == "value_error":  # of a check across keys, which names the key within
        return f"{key}.{issue['ctx']['error']}".removeprefix(".")
    expected = _EXPECTED.get(issue["type"], "a number").format(**issue.get("ctx", {}))
    return f"{key}: expected {expected}, found {_kind(issue['input'])}"


def _kind(value: Any) -> str:
    """Name a JSON value in a few words; a number by its first digits."""
    if type(value) in (int, float):
        return str(value)[:12]
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)
