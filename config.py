"""What a run is: typed settings, read from defaults, then `config.json`, then command-line flags.

Every stage describes its settings as one frozen pydantic class. Its flags, its JSON keys, its `--help` and its
checks all come from that class, so that there is one place to add a setting. The classes stand here because nothing
here is slow to import: a stage answers `--help` and a wrong setting before it loads PyTorch.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

CONFIG_PATH = Path("config.json")
DEFAULT_MODEL_NAME = "ViT-B/32"
DEFAULT_DATA_DIR = "./data"
SAMPLE_SIZE = 1000
MAX_BAD_SHARE = 0.01
DATA_DIR_HELP = "folder with the data set, its index file, or shards (path/{00000..00099}.tar)"

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
BadShare = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
LogLevel = Literal["debug", "info", "warning", "error"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600}


def _check_interval(value: int | str | None) -> int | str | None:
    if value is None:
        return None
    text = str(value)
    number = text[:-1] if text[-1:] in SECONDS_OF_UNIT else text
    if not (number.isdecimal() and int(number)):
        raise ValueError(f"expected a number of steps, or a time such as 90s, 10m or 2h, got {value!r}")
    return int(number) if number == text else text


Interval = Annotated[int | str | None, AfterValidator(_check_interval)]
"""Steps (`500`), or a time (`"90s"`, `"10m"`, `"2h"`)."""


_MAX_LINES = 10
_MAX_MESSAGE = 200


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys are errors, numbers are not made from booleans."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key, value in values.items():
                field = cls.model_fields.get(key)
                if isinstance(value, bool) and field is not None and field.annotation is not bool:
                    raise ValueError(f"{key}: {json.dumps(value)} is not a value for this setting")
        return values


class ModelSettings(Settings):
    """Which network is trained and from which weights."""

    name: str = Field(
        DEFAULT_MODEL_NAME,
        description="backbone: ViT-B/32, ViT-B/16, ViT-L/14, RN50, RN101, ..., or ViT-Ti/32",
        json_schema_extra={"flag": "model_name"},
    )
    projection_dim: PositiveInt | None = Field(None, description="size of the shared space; none: the backbone's own")
    freeze_backbone: bool = Field(False, description="train only the projection layers and the temperature")
    freeze_tower: Literal["image", "text"] | None = Field(
        None, description="image or text: train everything but that tower; none: as freeze_backbone says"
    )
    pretrained: str = Field("auto", description="auto, openai, none (random start), or a file with weights")
    activation: Literal["quick_gelu", "gelu"] | None = Field(
        None, description="activation of a weights file that does not tell it; none: found from the file"
    )

    @model_validator(mode="after")
    def _freeze_once(self) -> ModelSettings:
        if self.freeze_backbone and self.freeze_tower is not None:
            raise ValueError(f"freeze_backbone freezes both towers, freeze_tower {self.freeze_tower} one: choose one")
        return self


class DataSettings(Settings):
    """Where the pairs come from and how they are split."""

    data_dir: str = Field(DEFAULT_DATA_DIR, description=DATA_DIR_HELP)
    val_data: str | None = Field(
        None, description="separate validation set, which shards need; none: split off from the data"
    )
    image_dir: str | None = Field(None, description="folder that image paths are relative to; none: the index file's")
    caption_key: str | None = Field(None, description="column that holds the captions; none: caption, captions, title")
    captions: Literal["random", "all"] = Field(
        "random", description="random: one caption an image each epoch; all: every pair each epoch"
    )
    val_split: Share = Field(0.1, description="share of the groups kept for validation (at most 5,000 images)")
    on_bad_image: Literal["skip", "stop"] = Field(
        "skip", description="skip: leave a bad picture or entry out and list it; stop: the first one ends the run"
    )
    max_bad_share: BadShare = Field(
        MAX_BAD_SHARE, description="share of the pictures and entries that may be bad; more of them end the run"
    )
    augment: Literal["none", "crop", "color"] = Field("none", description="random crops, or crops and colour changes")
    fast_decode: bool = Field(False, description="decode training JPEGs no larger than needed: faster, nearly the same")
    cache_images: bool = Field(False, description="decode pictures once and keep them small, see cache_dir")
    feature_views: NonNegativeInt | None = Field(
        None,
        description="views of a picture that a frozen tower keeps; none: 1, augmented 4; 0: keep no features",
    )
    num_workers: NonNegativeInt | None = Field(None, description="loading processes; none: chosen for the machine")

    @property
    def allowed_bad_share(self) -> float:
        """Share of the pictures and entries that may be bad before the run ends."""
        return self.max_bad_share if self.on_bad_image == "skip" else 0.0


class TrainingSettings(Settings):
    """How the weights are moved."""

    batch_size: PositiveInt = Field(
        32, description="pairs a step, over all processes: each is contrasted with all others of its batch"
    )
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="pairs in memory at once, in each process; the gradient is the same; auto: as many as fit"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute each layer again in the backward pass instead of keeping it: less memory, more time",
    )
    num_epochs: PositiveInt = Field(50, description="passes over the training images")
    learning_rate: PositiveFloat = Field(1e-4, description="peak rate of the projection layers")
    backbone_lr_scale: NonNegativeFloat | None = Field(
        None, description="rate of the towers over learning_rate; none: 0.01, or 1 for a random start"
    )
    weight_decay: NonNegativeFloat = Field(0.01, description="AdamW's decay (not on biases, norms, temperature)")
    gradient_clip_norm: NonNegativeFloat = Field(1.0, description="largest gradient norm a step; 0: no clipping")
    skip_nonfinite: NonNegativeInt = Field(
        0,
        description="steps in a row that may be left out since loss or gradient is not finite; 0: stop at the first",
    )
    warmup_share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.1, description="share of the steps over which the rates rise, before the cosine"
    )
    early_stopping_patience: NonNegativeInt = Field(
        10, description="epochs without a better validation RSum before the run stops; 0: never"
    )
    precision: Precision = Field("auto", description="auto: bf16 where the device has it, else fp32 (fp16 on old GPUs)")
    compile: bool = Field(False, description="torch.compile for the transformer layers; meant for GPUs")
    seed: NonNegativeInt = Field(42, description="seed of the split, the order, the captions, the augmentation")


class RunSettings(Settings):
    """Where the run happens and what it leaves."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="under torchrun: the whole model in each process, or (fsdp) a share of it"
    )
    output_dir: str = Field(".", description="holds model-checkpoint/, results/ and logs/")
    cache_dir: str | None = Field(None, description="folder for kept pictures and features; none: cache in output_dir")
    resume: str | None = Field(
        None,
        description="continue a run: alone, the one in output_dir; or a checkpoint file",
        json_schema_extra={"bare": "latest"},
    )
    checkpoint_every: Interval = Field(
        "10m",
        description="steps (500) or time (90s, 10m, 2h) between states saved within an epoch; none: only at its end",
    )
    keep_checkpoints: PositiveInt = Field(
        2, description="states kept: last_model.pth and the ones before it, in case it is damaged"
    )
    profile: NonNegativeInt = Field(0, description="steps to record with torch.profiler, to logs/profile.json")
    log_interval: PositiveInt = Field(10, description="steps between two log lines")
    log_level: LogLevel = Field("info", description="debug, info, warning, error")


class Config(Settings):
    """One training run, as stored in its checkpoint and its results."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _keep_only_views_that_there_are(self) -> Config:
        views = self.data.feature_views
        if views and not (self.model.freeze_backbone or self.model.freeze_tower == "image"):
            raise ValueError(f"feature_views {views} needs a frozen image tower: freeze_backbone, freeze_tower image")
        if views is not None and views > 1 and self.data.augment == "none":
            raise ValueError(f"feature_views {views}: without augment all views of a picture are the same one")
        return self


class InspectSettings(Settings):
    """Settings of the data stage."""

    data_dir: str = Field(DEFAULT_DATA_DIR, description=DATA_DIR_HELP)
    image_dir: str | None = Field(None, description="folder that image paths are relative to; none: the index file's")
    caption_key: str | None = Field(None, description="column that holds the captions; none: caption, captions, title")
    val_split: Share = Field(0.1, description="share of the groups kept for validation")
    max_bad_share: BadShare = Field(MAX_BAD_SHARE, description="share of the index's entries that may be bad")
    check: bool = Field(False, description="decode every picture, look at every caption, print all that is wrong")
    num_workers: NonNegativeInt | None = Field(None, description="loading processes of check; none: one a core")
    seed: NonNegativeInt = Field(42, description="seed of the split; of the sample data as well")
    num_samples: PositiveInt | None = Field(None, description=f"make that many samples (default there: {SAMPLE_SIZE})")
    to_shards: str | None = Field(None, description="write the data set as shards into this folder")
    shard_size: PositiveInt = Field(1000, description="samples of a shard that to_shards writes")
    split: Literal["train", "val", "test", "all"] = Field("train", description="which images to_shards takes")


class EvaluationSettings(Settings):
    """Settings of the evaluation stage."""

    checkpoint: str = Field("model-checkpoint/best_model.pth", description="checkpoint to evaluate")
    data_dir: str | None = Field(None, description="data set; none: the checkpoint's own validation images")
    split: Literal["train", "val", "test", "all"] | None = Field(
        None, description="split of data_dir; none: val if it declares one, else everything"
    )
    image_dir: str | None = Field(None, description="folder that image paths are relative to; none: the index file's")
    caption_key: str | None = Field(None, description="column that holds the captions; none: caption, captions, title")
    max_bad_share: BadShare | None = Field(
        None, description="share of the index's entries that may be bad; none: as the checkpoint's run"
    )
    batch_size: PositiveInt = Field(64, description="images or texts encoded at once")
    num_workers: NonNegativeInt | None = Field(None, description="loading processes; none: chosen for the machine")
    precision: Precision | None = Field(None, description="auto, fp32, bf16, fp16; none: as the checkpoint's run")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    output_dir: str = Field(".", description="evaluation_results.json goes to its results/")
    log_level: LogLevel = Field("info", description="debug, info, warning, error")


class VisualizationSettings(Settings):
    """Settings of the figure stage."""

    results: str = Field(
        "results/training_results.json", description="training_results.json or evaluation_results.json"
    )
    output_dir: str | None = Field(None, description="folder for the figures; none: beside the results file")


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


def seconds_of(interval: str) -> int:
    """Return how long a time such as `90s`, `10m` or `2h` is."""
    return int(interval[:-1]) * SECONDS_OF_UNIT[interval[-1]]


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object; errors name the file, line and column."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, endless nesting
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def nearest(word: str, known: list[str]) -> str:
    """Say which of `known` is meant, as the end of an error message."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


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
        lines = [_describe(settings, problem, by_key, source) for problem in error.errors()]
        more = f"; and {len(lines) - _MAX_LINES} more" if len(lines) > _MAX_LINES else ""
        raise ValueError("; ".join(lines[:_MAX_LINES]) + more) from None


def _short(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


def _describe(settings: type[Settings], problem: Any, by_key: dict[tuple[str, ...], str], source: Path | None) -> str:
    loc = tuple(str(part) for part in problem["loc"])
    flag_name = next((flag for key, flag in by_key.items() if loc[: len(key)] == key), None)
    place = flag_name or f"{source or 'settings'}: {_short('.'.join(loc))}".rstrip(": ")
    if problem["type"] == "extra_forbidden":
        group: type[Settings] = settings
        for part in loc[:-1]:
            group = group.model_fields[part].annotation  # type: ignore[assignment]
        return f"{place}: unknown key{nearest(loc[-1], list(group.model_fields))}"
    if problem["type"] == "missing":
        return f"--{loc[-1]} is required"
    if problem["type"] == "value_error":
        return f"{place}: {problem['ctx']['error']}"
    if problem["type"] == "model_type":
        return f"{place}: expected an object, got {_short(repr(problem['input']))}"
    message = problem["msg"].removeprefix("Input should be ")
    return f"{place}: expected {message}, got {_short(repr(problem['input']))}"
