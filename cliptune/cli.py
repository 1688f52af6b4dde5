"""Flags, `config.json`, one-line errors and exit codes of the stages."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cliptune.runtime.files import read_json_object
from cliptune.runtime.messages import nearest
from cliptune.settings import Config, Settings

CONFIG_PATH = Path("config.json")


_MAX_LINES = 10


_MAX_MESSAGE = 200


class Flag(NamedTuple):
    """One command-line flag: its name without dashes, the key it sets (`("training", "seed")`), its field."""

    name: str
    key: tuple[str, ...]
    field: FieldInfo


S = TypeVar("S", bound=Settings)


def flags_of(settings: type[Settings], parents: tuple[str, ...] = ()) -> Iterator[Flag]:
    """List a class's flags in the order of its fields, groups unfolded."""
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from flags_of(field.annotation, (*parents, name))
        else:
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            yield Flag(str(extra.get("flag", name)), (*parents, name), field)


def parse_settings(settings: type[S], argv: list[str] | None, *, description: str) -> tuple[S, dict[str, Any]]:
    """Read a stage's settings from its flags alone.

    Args:
        settings: the stage's settings.
        argv: the flags; None: those of this process.
        description: what the stage does; `--help` shows the first line.

    Returns:
        The settings, and the given flags with their values as typed.

    Raises:
        ValueError: an unknown flag or a value that does not fit, naming the flag.
        SystemExit: `--help` was given (code 0).
    """
    given = _parse_flags(settings, argv, description=description)
    return _validate(settings, {}, given, source=None), given


def load_config(argv: list[str] | None, *, description: str) -> tuple[Config, dict[str, Any]]:
    """Read a run's settings: defaults, then the file named by `--config`, then flags.

    Without `--config`, the `config.json` of the current folder is read if there is one.

    Returns:
        The settings, and the given flags (their own names) with their values as typed.

    Raises:
        ValueError: an unknown key or flag, or a value that does not fit, naming the place.
        FileNotFoundError: the file named by `--config` is not there.
    """
    given = _parse_flags(Config, argv, description=description, with_config=True)
    named = given.pop("config", None)
    path = Path(named) if named is not None else CONFIG_PATH
    if named is not None and not path.is_file():
        raise FileNotFoundError(f"--config: no such file: {path}")
    values = read_json_object(path) if path.is_file() else {}
    return _validate(Config, values, given, source=path), given


def check_command_line(settings: type[Settings], description: str) -> None:
    """Read a script's command line before its slow imports: `--help` and a wrong setting end the process here.

    Every stage calls this above its imports of PyTorch and the like, when it is run as a script. Its `main` reads the
    command line once more, which takes a few milliseconds and lets `main(argv)` work anywhere.

    Args:
        settings: the stage's settings.
        description: what the stage does: its docstring, of which `--help` shows the first line.
    """

    def read() -> int:
        if settings is Config:
            load_config(None, description=description)
        else:
            parse_settings(settings, None, description=description)
        return 0

    code = run_stage(read, name=Path(sys.argv[0]).name)
    if code:
        sys.exit(code)


def override(config: Config, given: dict[str, Any]) -> Config:
    """Return `config` with some flags set anew (`given` as `load_config` returned it)."""
    return _validate(Config, config.model_dump(), given, source=None)


def run_stage(stage: Callable[[], int], *, name: str) -> int:
    """Run a stage's body; turn errors that a user can mend into one line on stderr.

    Returns:
        The stage's exit code; 2 for a wrong setting or a missing or malformed file, 1 for a loss that is not finite or
        too little memory, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot show
    rank = os.environ.get("RANK", "0")
    name += "" if rank == "0" else f" (process {rank})"
    try:
        return stage()
    except (ValueError, OSError, ImportError) as error:
        logging.getLogger(name).debug("traceback", exc_info=True)
        print(f"{name}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, MemoryError) as error:
        print(f"{name}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, so that `main` has one way to report errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse_flags(
    settings: type[Settings], argv: list[str] | None, *, description: str, with_config: bool = False
) -> dict[str, Any]:
    summary = description.partition("\n")[0]
    parser = _Parser(description=summary, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if with_config:
        parser.add_argument("--config", metavar="PATH", help="JSON file with settings (default: ./config.json)")
    known = ["--config"] if with_config else []
    for name, _, field in flags_of(settings):
        parser.add_argument(f"--{name}", dest=name, metavar=name.upper(), help=_help(field), **_arity(field))
        known.append(f"--{name}")
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        hint = nearest(word, known) if word.startswith("-") else "; flags start with --"
        raise ValueError(f"unknown flag {word}{hint}")
    return vars(found)


def _arity(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if field.annotation is bool:
        return {"nargs": "?", "const": "true"}
    return {"nargs": "?", "const": extra["bare"]} if "bare" in extra else {}


def _help(field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"default: {json.dumps(field.default)}"
    return f"{field.description} ({default})".replace("%", "%%")


def _validate(settings: type[S], values: dict[str, Any], given: dict[str, Any], *, source: Path | None) -> S:
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    flags = {name: (key, field) for name, key, field in flags_of(settings)}
    for name, value in given.items():
        (*groups, last), field = flags[name]
        target = merged
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ValueError(f"{source}: {group}: expected an object, found {type(target).__name__}")
        optional = type(None) in get_args(field.annotation)
        target[last] = None if optional and str(value).lower() in {"none", "null"} else value
    try:
        return settings.model_validate(merged)
    except ValidationError as error:
        by_key = {key: f"--{name}" for name, (key, _) in flags.items() if name in given}
        lines = [_describe(settings, issue, by_key, source) for issue in error.errors()]
        more = f"; and {len(lines) - _MAX_LINES} more" if len(lines) > _MAX_LINES else ""
        raise ValueError("; ".join(lines[:_MAX_LINES]) + more) from None


def _short(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


def _describe(settings: type[Settings], issue: Any, by_key: dict[tuple[str, ...], str], source: Path | None) -> str:
    loc = tuple(str(part) for part in issue["loc"])
    flag_name = next((flag for key, flag in by_key.items() if loc[: len(key)] == key), None)
    place = flag_name or f"{source or 'settings'}: {_short('.'.join(loc))}".rstrip(": ")
    if issue["type"] == "extra_forbidden":
        group: type[Settings] = settings
        for part in loc[:-1]:
            group = group.model_fields[part].annotation  # type: ignore[assignment]
        return f"{place}: unknown key{nearest(loc[-1], list(group.model_fields))}"
    if issue["type"] == "missing":
        return f"--{loc[-1]} is required"
    if issue["type"] == "value_error":
        return f"{place}: {issue['ctx']['error']}"
    if issue["type"] == "model_type":
        return f"{place}: expected an object, got {_short(repr(issue['input']))}"
    message = issue["msg"].removeprefix("Input should be ")
    return f"{place}: expected {message}, got {_short(repr(issue['input']))}"
