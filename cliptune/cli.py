"""Flags, `config.json`, one-line errors and exit codes of the stages."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cliptune.flag_names import meant_flag
from cliptune.language.asked import language_asked, say_in
from cliptune.runtime.files import read_json_object
from cliptune.runtime.memory import explain_out_of_memory, out_of_memory, says_out_of_memory, try_imports
from cliptune.runtime.messages import first_few, message_line, one_line, printable, shorten
from cliptune.runtime.stopping import KilledWorkerError, Stopped, stoppable
from cliptune.runtime.streams import name_all_files, open_streams
from cliptune.settings import Config, Settings

logger = logging.getLogger(__name__)

CONFIG_PATH = Path("config.json")
MAY_CHANGE_ON_RESUME = {
    "data_dir", "image_dir", "val_data", "exclude", "allow_data_change",
    "watch_data", "interpolate", "compile", "num_epochs", "early_stopping_patience", "validate_every", "num_workers",
    "device", "precision", "output_dir", "cache_dir", "track",
    "micro_batch_size", "gradient_checkpointing", "parallel", "skip_nonfinite", "resume", "checkpoint_every",
    "keep_checkpoints", "profile", "report", "log_interval", "log_level", "language", "on_unreadable_image",
    "max_skipped_fraction",
}  # fmt: skip
"""Flags that change how a run is computed or what it writes, but not what it is."""
MAX_ISSUES = 10

HELP_GROUPS = {
    "everyday": (
        "config", "checkpoint", "results", "data_dir", "model_name", "freeze_backbone", "batch_size", "num_epochs",
        "learning_rate", "recipe", "output_dir", "resume", "device", "check", "num_samples", "images", "query_image",
        "top", "json", "serve", "port",
    ),
    "data": (
        "watch_data", "val_data", "split", "val_split", "folds", "split_seed", "near_duplicates", "image_dir",
        "image_key", "caption_key", "captions_from", "caption_template", "captions", "exclude", "augment",
        "on_unreadable_image", "max_skipped_fraction", "allow_data_change", "include_trained",
        "classes", "templates", "label_key",
    ),
    "model": (
        "pretrained", "projection_dim", "freeze_tower", "lora_rank", "lora_alpha", "lora_layers", "train_layers",
        "activation", "context_length", "image_resolution",
    ),
    "training": (
        "loss", "positives", "backbone_lr_scale", "layer_decay", "ema", "warmup_fraction", "weight_decay",
        "gradient_clip_norm", "early_stopping_patience", "validate_every", "interpolate",
        "skip_nonfinite", "seed",
    ),
    "speed and memory": (
        "precision", "micro_batch_size", "encode_batch_size", "gradient_checkpointing", "compile", "parallel",
        "num_workers", "fast_decode", "decode", "cache_images", "feature_views", "cache_dir",
    ),
    "shards": ("to_shards", "shard_size"), "export": ("to", "overwrite", "onnx_files", "quantize"),
    "output": ("report", "map", "suspects", "track", "checkpoint_every", "keep_checkpoints", "log_interval",
               "log_level", "language", "profile"),
}  # fmt: skip
"""The groups of `--help` and their flags, in their order; a flag that stands nowhere comes last, under "more"."""

METAVARS = {
    "checkpoint": "FILE", "checkpoint_every": "N|TIME", "config": "FILE", "data_dir": "DIR", "exclude": "FILE",
    "pretrained": "FILE", "results": "FILE", "resume": "FILE", "to_shards": "DIR", "val_data": "PATH",
    "to": "FORM DIR", "validate_every": "N|TIME", "watch_data": "PATH",
    "classes": "PATH", "templates": "FILE", "queries": "QUERY", "query_image": "FILE", "images": "DIR",
}  # fmt: skip
"""What stands for a value in `--help`, where neither type nor name of the flag tells it."""


class Flag(NamedTuple):
    """One command-line flag: its name without dashes, the key it sets (`("training", "seed")`), its field."""

    name: str
    key: tuple[str, ...]
    field: FieldInfo


class Started(NamedTuple):
    """What a run was started with."""

    config: Config
    given: dict[str, Any]
    """The flags that were given, by their own names, with their values as typed."""
    file_values: dict[str, Any]
    """What the config file holds."""

    def at(self, output_dir: Path) -> Started:
        """Return the same for another output folder."""
        return self._replace(config=override(self.config, {"output_dir": str(output_dir)}))


S = TypeVar("S", bound=Settings)


def flags_of(settings: type[Settings], parents: tuple[str, ...] = ()) -> Iterator[Flag]:
    """List a class's flags in the order of its fields, groups unfolded."""
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from flags_of(field.annotation, (*parents, name))
        else:
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            yield Flag(str(extra.get("flag", name)), (*parents, name), field)


def is_positional(field: FieldInfo) -> bool:
    """Tell whether a setting is given by words without a flag, such as the queries of a search."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("positional"))


def parse_settings(settings: type[S], argv: list[str] | None, *, description: str) -> tuple[S, dict[str, Any]]:
    """Read a stage's settings: defaults, then the file named by `--config`, then flags.

    The file is a run's, or holds the stage's own keys. What the stage has no use for is named on stderr.

    Args:
        settings: the stage's settings.
        argv: the flags; None: those of this process.
        description: what the stage does, for `--help`.

    Returns:
        The settings, and the given flags with their values as typed.

    Raises:
        ValueError: an unknown key or flag, or a value that does not fit, naming the place.
        FileNotFoundError: the file named by `--config` is not there.
        SystemExit: `--help` was given (code 0).
    """
    stage, given, unused = _parse_stage(settings, argv, description=description)
    if unused:
        notice = f"keys of the config file that this stage does not use: {', '.join(unused)}"
        print(say_in(getattr(stage, "language", "en"))(printable(notice)), file=sys.stderr)
    return stage, given


def _parse_stage(settings: type[S], argv: list[str] | None, *, description: str) -> tuple[S, dict[str, Any], list[str]]:
    """Do what `parse_settings` does; the keys of the config file that are not used are returned, too."""
    given = _parse_flags(settings, argv, description=description)
    named = given.pop("config", None)
    if named is None:
        return _validate(settings, {}, given, source=None), given, []
    values, unused = _of_run(settings, Path(named))
    return _validate(settings, values, given, source=Path(named)), given, unused


def _of_run(settings: type[Settings], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what a config file says of a stage's settings, and its keys that the stage has no use for."""
    values = _read_config(path)
    own = {name: value for name, value in values.items() if name in settings.model_fields}
    run = {name: value for name, value in values.items() if name not in own}
    _validate(Config, run, {}, source=path)  # a wrong key is an error in every stage
    unused: dict[str, list[str]] = {}
    for name, (group, key), _ in flags_of(Config):
        if key not in run.get(group, {}):
            continue
        value = run[group][key]
        if name in settings.from_config:
            own.setdefault(name, value)
        if name == "output_dir":
            own = {field: str(Path(value, below)) for field, below in settings.below_output_dir.items()} | own
        if name not in own and not (name == "output_dir" and settings.below_output_dir):
            unused.setdefault(group, []).append(f"{group}.{key}")
    whole = {group for group, keys in unused.items() if len(keys) == len(run[group])}
    return own, [shown for group, keys in unused.items() for shown in ([group] if group in whole else keys)]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--config: no such file: {path}")
    return read_json_object(path)


def load_config(argv: list[str] | None, *, description: str) -> Started:
    """Read a run's settings: defaults, then the file named by `--config`, then flags.

    Without `--config`, the `config.json` of the current folder is read if there is one.

    Raises:
        ValueError: an unknown key or flag, or a value that does not fit, naming the place.
        FileNotFoundError: the file named by `--config` is not there.
    """
    given = _parse_flags(Config, argv, description=description)
    named = given.pop("config", None)
    path = Path(named) if named is not None else CONFIG_PATH
    values = _read_config(path) if named is not None or path.is_file() else {}
    return Started(_validate(Config, values, given, source=path), given, values)


def check_command_line(settings: type[Settings], description: str) -> None:
    """Read a script's command line before its slow imports: `--help` and a wrong setting end the process here.

    Every stage calls this above its imports of PyTorch and the like, when it is run as a script. Its `main` reads the
    command line once more, which takes a few milliseconds and lets `main(argv)` work anywhere.

    Args:
        settings: the stage's settings.
        description: what the stage does, for `--help`: its docstring.
    """
    name_all_files()
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by PyTorch's import: what MPS has not runs on CPU

    def read() -> int:
        if settings is Config:
            load_config(None, description=description)
        else:
            _parse_stage(settings, None, description=description)
        return 0

    name, config = Path(sys.argv[0]).name, CONFIG_PATH if settings is Config else None
    code = run_stage(read, name=name, config=config) or run_stage(try_imports, name=name, config=config)
    if code:
        sys.exit(code)
    sys.excepthook = partial(explain_out_of_memory, say=say_in(language_asked(sys.argv[1:], config)))


def override(config: Config, given: dict[str, Any]) -> Config:
    """Return `config` with some flags set anew (`given` as `load_config` returned it)."""
    return _validate(Config, config.model_dump(), given, source=None)


def stored_config(stored: dict[str, Any], source: str | Path) -> Config:
    """Return the settings that a checkpoint holds.

    Raises:
        ValueError: they are none that a run can have; names the checkpoint and the key.
    """
    training = stored.get("training")
    if isinstance(training, dict):  # of a run of before there was a choice
        stored = {**stored, "training": {"positives": "image", **training}}
    return _validate(Config, stored, {}, source=Path(source))


def resumed_config(content: dict[str, Any], started: Started, *, source: str | Path) -> Config:
    """Return the settings of a run that is resumed: its own, but for flags that may change.

    Where it writes is not taken from them: a checkpoint is a file like any other, and may come from elsewhere. Nor is
    --allow_data_change: what one start allowed, the next one asks for again.

    Args:
        content: its checkpoint's `config`, and `config_file`: what the config file held when the run began.
        started: what this start was given.
        source: the checkpoint.

    Raises:
        ValueError: a flag changes what cannot change within a run, or the settings are none that a run can have.
    """
    here = {name: getattr(started.config.run, name) for name in ("output_dir", "cache_dir", "allow_data_change")}
    config = override(stored_config(content["config"], source), here)
    changed = {name: value for name, value in started.given.items() if override(config, {name: value}) != config}
    refused = sorted(set(changed) - MAY_CHANGE_ON_RESUME)
    if refused:
        flags = ", ".join(f"--{name}" for name in refused)
        raise ValueError(f"{flags} cannot change when a run is resumed: start a new one, or leave the flag away")
    for name, value in changed.items():
        if name != "resume":
            logger.info("resumed with --%s %s", name, value)
    config = override(config, changed)
    before, now, used = map(_flat, (content.get("config_file", {}), started.file_values, config.model_dump()))
    ignored = [
        f"{key} {now[key]!r} (it is {used[key]!r})" for key in now if now[key] not in (before.get(key), used[key])
    ]
    if ignored:
        logger.warning(
            "a resumed run goes on with its own settings; of the config file it does not use %s. What may change is "
            "changed by a flag",
            first_few(ignored, MAX_ISSUES),
        )
    return config


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings by their full keys: `{"training": {"seed": 1}}` as `{"training.seed": 1}`."""
    return {f"{group}.{name}": value for group, values_of in values.items() for name, value in values_of.items()}


def run_stage(
    stage: Callable[[], int], *, name: str, argv: Sequence[str] | None = None, config: Path | None = None
) -> int:
    """Run a stage's body; turn errors that a user can mend, and signals, into one line on stderr.

    The line is in the language that the command asks for, also where the settings themselves are wrong.

    Args:
        stage: the body.
        name: of the stage, with which the line begins.
        argv: the flags; None: those of this process.
        config: the config file that is read without `--config`.

    Returns:
        The stage's exit code; 2 for a wrong setting or a missing or malformed file, 1 for a non-finite loss, too little
        memory or a worker that was killed, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    open_streams()
    rank = printable(os.environ.get("RANK", "0"))[:20]
    name += "" if rank == "0" else f" (rank {rank})"
    say = say_in(language_asked(sys.argv[1:] if argv is None else argv, config))
    try:
        with stoppable(name, say=say):
            code = stage()
            sys.stdout.flush()  # on a disk that is full this fails, which Python itself would not tell
            return code
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
        no_memory, killed = says_out_of_memory(error), isinstance(error, KilledWorkerError)
        if isinstance(error, RuntimeError) and not (no_memory or killed):  # of PyTorch and of threads
            raise
        logging.getLogger(name).debug("traceback", exc_info=True)
        message = message_line(out_of_memory(error) if no_memory else one_line(error))
        print(say(f"{name}: error: ") + say(message), file=sys.stderr)
        return 1 if no_memory or killed or isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt as error:
        print(say(f"{name}: {error if isinstance(error, Stopped) else 'stopped'}"), file=sys.stderr)
        return error.exit_code if isinstance(error, Stopped) else 130


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, so that `main` has one way to report errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse_flags(settings: type[Settings], argv: list[str] | None, *, description: str) -> dict[str, Any]:
    unnamed_values = [name for name, _, field in flags_of(settings) if is_positional(field)]
    parser = _Parser(
        description=description.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=" ".join(["%(prog)s [--flag value ...]", *(f"[{METAVARS[name]} ...]" for name in unnamed_values)]),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    arguments = {name: _argument(name, field) for name, _, field in flags_of(settings)}
    for name in unnamed_values:
        parser.add_argument(name, nargs="*", metavar=METAVARS[name], help=arguments.pop(name)["help"])
    unnamed = "./config.json if there" if settings is Config else "none"
    arguments["config"] = {"metavar": METAVARS["config"], "help": f"JSON file with settings (default: {unnamed})"}
    for title, names in _help_groups(arguments):
        group = parser.add_argument_group(title)
        for name in names:
            group.add_argument(f"--{name}", dest=name, **arguments[name])
    found, unknown = _read_words(parser, settings, argv, unnamed_values)
    if unknown:
        word = unknown[0].partition("=")[0]
        hint = meant_flag(word.lstrip("-"), {name: f"--{name}" for name in arguments}) or "; --help lists the flags"
        raise ValueError(f"unknown flag {shorten(word)}{hint if word.startswith('-') else '; flags start with --'}")
    return vars(found)


def _read_words(
    parser: argparse.ArgumentParser, settings: type[Settings], argv: list[str] | None, unnamed_values: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Return what the words of a command line say, and those that nobody knows."""
    if not unnamed_values:
        return parser.parse_known_args(argv)
    switches = {f"--{name}" for name, _, field in flags_of(settings) if field.annotation is bool}
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    found, unknown = parser.parse_known_intermixed_args(_with_values(words[:end], switches))
    if behind := words[end + 1 :]:  # which are no flags, whatever they look like
        setattr(found, unnamed_values[-1], [*getattr(found, unnamed_values[-1], []), *behind])
    return found, unknown


def _with_values(words: Sequence[str], switches: Collection[str]) -> list[str]:
    """Give switches their value where a word without a flag follows: `--json heart` is `--json=true heart`."""
    return [
        f"{word}=true" if word in switches and after not in {"true", "false"} else word
        for word, after in zip(words, [*words[1:], ""], strict=False)
    ]


def _help_groups(known: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the groups of a stage's `--help` that are not empty."""
    left = list(known)
    for title, names in HELP_GROUPS.items():
        if found := [name for name in names if name in left]:
            yield title, found
        left = [name for name in left if name not in found]
    if left:
        yield "more", left


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    """Describe a flag to argparse: how it looks in `--help`, and what it means without a value."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    argument: dict[str, Any] = {"metavar": _metavar(name, field)}
    if field.annotation is bool or "bare" in extra:
        argument |= {"nargs": "?", "const": extra.get("bare", "true")}
    if get_origin(field.annotation) is list:  # --flag A B, and --flag A --flag B
        # where words without a flag may follow, a flag takes one value: --flag A word
        argument |= {"nargs": 1 if "single" in extra else "+", "action": "extend"}
        if " " in argument["metavar"]:  # values of several kinds: FORM [DIR ...]
            argument["metavar"] = tuple(argument["metavar"].split())
    text, default = str(field.description), "none" if field.default in (None, []) else str(field.default)
    default = " ".join(field.default) if isinstance(field.default, list) and field.default else default
    if field.default in (None, []) and "none: " in text:
        text = text.replace("none: ", "none (default): ")
    elif "(default: " not in text:
        text += f" (default: {default.lower() if field.annotation is bool else default})"
    return argument | {"help": text.replace("%", "%%")}


def _metavar(name: str, field: FieldInfo) -> str:
    """Return what stands for a value in `--help`: choices, N or X for a number, else the last word of the name."""
    if field.annotation is bool:
        return "true|false"
    if name in METAVARS:
        return METAVARS[name]
    options = get_args(field.annotation) if get_origin(field.annotation) in {Union, UnionType} else [field.annotation]
    options = [get_args(option)[0] if get_origin(option) is Annotated else option for option in options]
    choices = [choice for option in options for choice in get_args(option)]  # of a Literal
    if choices:
        others = {int: "N", NoneType: "none"}
        return "{" + ",".join([*choices, *(others[option] for option in options if option in others)]) + "}"
    return "X" if float in options else name.rpartition("_")[2].upper() if str in options else "N"


def _validate(settings: type[S], values: dict[str, Any], given: dict[str, Any], *, source: Path | None) -> S:
    # flags are laid over the file's values, {"training": {"seed": 1}} and --seed 2 -> {"training": {"seed": "2"}};
    # pydantic then turns texts into numbers and checks everything at once
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    flags = {name: (key, field) for name, key, field in flags_of(settings)}
    for name, value in given.items():
        # ("training", "seed") -> groups ["training"], last "seed"
        (*groups, last), field = flags[name]
        target = merged
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ValueError(f"{source}: {group}: expected an object, got {shorten(repr(target))}")
        if is_positional(field):
            target[last] = value  # a person may look for "none"
            continue
        # `--val_data none` undoes what config.json says; but `--augment none` is one of its choices
        optional = NoneType in get_args(field.annotation)
        is_none = optional and str(value).lower() in {"none", "null"}
        target[last] = [] if value in (["none"], ["null"]) else None if is_none else value
    try:
        return settings.model_validate(merged)
    except ValidationError as error:
        raise ValueError(first_few(_describe(error, flags_of(settings), given, source), MAX_ISSUES)) from None


def _describe(error: ValidationError, flags: Iterable[Flag], given: dict[str, Any], source: Path | None) -> list[str]:
    """Say in a line for each flag or key what is wrong with it."""
    names = {flag.key: flag.name for flag in flags}
    # an unknown key is looked up by the last part of a key and by the flag's name, and shown as it stands in the file:
    # {"lr": 1} means training.learning_rate, {"model": {"model_name": ...}} means model.name
    known = {name: ".".join(key[: depth + 1]) for key in names for depth, name in enumerate(key)}
    known |= {name: ".".join(key) for key, name in names.items()}
    lines: dict[str, str] = {}
    for issue in error.errors(include_url=False):
        loc = tuple(str(part) for part in issue["loc"])
        key = next((key for key in names if loc[: len(key)] == key), loc)  # of a union, `loc` names the option too
        in_file = ": ".join(str(part) for part in (source, shorten(".".join(key))) if part)
        # what is wrong with several settings together names them: those that were given as flags are meant
        meant = [names[key]] if key in names else [name for name in names.values() if name in issue["msg"].split()]
        where = ", ".join(f"--{name}" for name in meant if name in given) or in_file
        if issue["type"] == "extra_forbidden":
            lines[where] = f"unknown key{meant_flag(loc[-1], known)}"
        elif issue["type"] == "value_error":
            lines[where] = str(issue["ctx"]["error"])
        else:
            # a union has an issue for each of its options: "expected a valid integer or 'auto', got 'x'"
            wanted = issue["msg"].removeprefix("Input should be ").partition(", unable")[0]
            wanted = "an object" if issue["type"] == "model_type" else wanted
            before = f"{lines[where].rpartition(', got ')[0]} or " if where in lines else "expected "
            lines[where] = f"{before}{wanted}, got {shorten(repr(issue['input']))}"
    return [f"{where}: {message}".removeprefix(": ") for where, message in lines.items()]
