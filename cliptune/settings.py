"""What a run is: typed settings, read from defaults, then `config.json`, then command-line flags.

Every stage describes its settings as one frozen pydantic class. Its flags, its JSON keys, its `--help` and its
checks all come from that class, so that there is one place to add a setting. The classes stand here because nothing
here is slow to import: a stage answers `--help` and a wrong setting before it loads PyTorch.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

DEFAULT_MODEL_NAME = "ViT-B/32"
DEFAULT_DATA_DIR = "./data"
SAMPLE_SIZE = 1000
MAX_SKIPPED_FRACTION = 0.01
SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600}

# the limits are far beyond any use; products of larger numbers would be too large for libraries and results files
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Split = Literal["train", "val", "test", "all"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


def _check_interval(value: int | str | None) -> int | str | None:
    if value is None:
        return None
    # what was typed is what is stored and shown; RunSettings gives it as plain numbers
    text = str(value)
    number = text[:-1] if text[-1:] in SECONDS_OF_UNIT else text
    if not (number.isdecimal() and int(number)):
        raise ValueError(f"expected a number of steps, or a time such as 90s, 10m or 2h, got {value!r}")
    return int(number) if number == text else text


def _check_batch_size(value: int) -> int:
    if value == 1:
        raise ValueError(
            "expected 2 or more, got 1: a single pair has no negatives, so its loss is 0 and nothing is learned. Where "
            "memory is short, --micro_batch_size bounds it instead"
        )
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


BatchSize = Annotated[PositiveInt, AfterValidator(_check_batch_size)]
Several = Annotated[list[str], BeforeValidator(_as_list)]
"""Of one, it may be given without its list."""
Interval = Annotated[int | str | None, AfterValidator(_check_interval)]
"""Steps (`500`), or a time (`"90s"`, `"10m"`, `"2h"`)."""

# Settings that several stages have. `--help` shows the text: name and meaning are the same wherever they stand.
DataDir = Annotated[
    str, Field(description="folder with the data set, its index file, or shards (path/{00000..00099}.tar)")
]
ImageDir = Annotated[
    str | None, Field(description="folder that image paths are relative to; none: the index file's folder")
]
ImageKey = Annotated[str | None, Field(description="column that holds the image paths; none: the first known one")]
CaptionKey = Annotated[
    str | None,
    Field(
        description="column that holds the captions, or several (en,de), or a text in it (caption.en); none: the first "
        "known one"
    ),
]
CaptionsFrom = Annotated[
    Literal["json", "txt", "caption", "folder", "filename"] | None,
    Field(
        description="captions of a folder of images: files json, txt or caption, or names of folder or filename; none: "
        "found by what it holds"
    ),
]
CaptionTemplate = Annotated[
    str | None,
    Field(description='caption in which {} stands for such a name; none: "a photo of a {}", or the file\'s name'),
]
ValSplit = Annotated[
    float,
    Field(
        gt=0, lt=1, allow_inf_nan=False, description="fraction of the images used for validation, 5,000 images at most"
    ),
]
SplitSeed = Annotated[int | None, Field(ge=0, lt=2**64, description="of the split alone; none: as seed")]
NearDuplicates = Annotated[
    Literal["join", "report"],
    Field(
        description="copies of an image that are not the same file: join: on one side of the split; report: only told"
    ),
]
MaxSkippedFraction = Annotated[
    Fraction, Field(description="fraction of the images and records that may be skipped; more of them end the run")
]
NumWorkers = Annotated[
    NonNegativeInt | None, Field(description="worker processes that load data; none: chosen for the machine")
]
Activation = Annotated[
    Literal["quick_gelu", "gelu", "gelu_tanh"] | None,
    Field(description="activation of a weights file that does not tell it; none: found from the file"),
]
Device = Annotated[str, Field(description="auto, cpu, cuda, cuda:1 or mps")]
Report = Literal["full", "no-images", "none"]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], Field(description="least level that is logged")]
LanguageName = Annotated[
    Literal["en", "zh"],
    Field(description="language of summary, figures, report and errors (logs stay English)"),
]
Seed = Annotated[
    int, Field(ge=0, lt=2**64, description="of the split, the order, captions, augmentation and sample data")
]


WRITTEN_OUT = BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool | str) else value)
"""Of a switch with a third choice: reads JSON's true and false, and what was stored before there was one."""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys are errors, numbers are not made from booleans."""

    # earlier versions of pydantic keep names that begin with `model_` to themselves
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    from_config: ClassVar[frozenset[str]] = frozenset()
    """Flags that a stage after training takes from a run's config file."""
    below_output_dir: ClassVar[dict[str, str]] = {}
    """Settings of such a stage that are files below the run's output folder, and where."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, values: Any) -> Any:
        if isinstance(values, dict):
            # pydantic takes true for 1, so {"batch_size": true} would train with batches of one pair
            for key, value in values.items():
                field = cls.model_fields.get(key)
                is_switch = field is not None and (field.annotation is bool or WRITTEN_OUT in field.metadata)
                if isinstance(value, bool) and field is not None and not is_switch:
                    raise ValueError(f"{key}: {json.dumps(value)} is not a value for this setting")
        return values


class ModelSettings(Settings):
    """Which network is trained and from which weights."""

    name: str = Field(
        DEFAULT_MODEL_NAME,
        description="backbone: ViT-B/32, ViT-B/16, ViT-L/14, RN50, RN101, ..., or ViT-Ti/32",
        json_schema_extra={"flag": "model_name"},
    )
    # of one number a unit vector is 1 or -1: whatever is learned, the features collapse
    projection_dim: Annotated[int, Field(ge=2, le=65_536)] | None = Field(
        None, description="size of the shared space, 2 to 65,536; none: the backbone's own"
    )
    freeze_backbone: bool = Field(False, description="train only the projection layers and the temperature")
    freeze_tower: Literal["image", "text"] | None = Field(
        None, description="image or text: train everything but that tower; none: as freeze_backbone says"
    )
    lora_rank: PositiveInt | None = Field(
        None, description="rank of LoRA's adapters beside the towers, which are held; none: no LoRA"
    )
    lora_alpha: PositiveFloat | None = Field(
        None, description="LoRA counts lora_alpha / lora_rank times; none: once, as with lora_rank"
    )
    lora_layers: Literal["all", "attention", "mlp"] = Field(
        "all", description="layers of the towers' blocks that LoRA adapts; of a ResNet's tower its attention pool"
    )
    train_layers: PositiveInt | None = Field(
        None, description="train only the last layers of each tower, that many, and what follows; none: all"
    )
    pretrained: str = Field("auto", description="auto, openai, none (random start), or a file with weights")
    activation: Activation = None
    context_length: Annotated[int, Field(ge=3, le=4096)] | None = Field(
        None, description="tokens of a text, 3 to 4096: positions are cut or interpolated; none: the weights' own"
    )
    image_resolution: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="pixels of an image's sides: positions are interpolated; none: the weights' own"
    )

    def sizes(self) -> dict[str, int | None]:
        """Return the sizes that the weights are to have, by the names that `CLIPModel` takes."""
        return {"context_length": self.context_length, "image_resolution": self.image_resolution}

    @model_validator(mode="after")
    def _freeze_once(self) -> ModelSettings:
        if self.freeze_backbone and self.freeze_tower is not None:
            raise ValueError(f"freeze_backbone freezes both towers, freeze_tower {self.freeze_tower} one: choose one")
        chosen = [name for name in ("freeze_backbone", "lora_rank", "train_layers") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} say different things of what trains in the towers: choose one")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_layers != "all"):
            raise ValueError("lora_alpha and lora_layers say how LoRA is done: they need lora_rank")
        return self


class DataSettings(Settings):
    """Where the pairs come from and how they are split."""

    data_dir: DataDir = DEFAULT_DATA_DIR
    val_data: str | None = Field(
        None, description="separate validation set, which shards need; none: split off from the data"
    )
    watch_data: Several = Field(
        [],
        description="other data sets evaluated beside validation: what the model forgets; no epoch is chosen by them",
    )
    image_dir: ImageDir = None
    image_key: ImageKey = None
    caption_key: CaptionKey = None
    captions_from: CaptionsFrom = None
    caption_template: CaptionTemplate = None
    captions: Literal["random", "all"] = Field(
        "random", description="random: one caption of each image an epoch; all: every pair each epoch"
    )
    val_split: ValSplit = 0.1
    folds: Annotated[int, Field(ge=2, le=20)] | None = Field(
        None,
        description="for small sets: hold out each of so many folds once, then train on everything for the length that "
        "they choose; none: one split",
    )
    split_seed: SplitSeed = None
    near_duplicates: NearDuplicates = "join"
    exclude: str | None = Field(
        None, description="list of pairs (suspects.csv of data_loader.py --check) that are left out of training"
    )
    on_unreadable_image: Literal["skip", "fail"] = Field(
        "skip", description="skip: go on without the image or record and list it; fail: the first one ends the run"
    )
    max_skipped_fraction: MaxSkippedFraction = MAX_SKIPPED_FRACTION
    augment: Literal["none", "crop", "color"] = Field("none", description="random crops; color: colour changes as well")
    fast_decode: bool = Field(False, description="decode training JPEGs no larger than needed: faster, nearly the same")
    decode: Literal["cpu", "gpu"] = Field(
        "cpu", description="where training JPEGs are decoded; gpu: by a CUDA device, for fewer cores, nearly the same"
    )
    cache_images: bool = Field(False, description="decode images once and cache them at the model's size (cache_dir)")
    feature_views: NonNegativeInt | None = Field(
        None,
        description="augmented views of an image cached by a frozen tower; none: 1, with augment 4; 0: cache nothing",
    )
    num_workers: NumWorkers = None

    @model_validator(mode="after")
    def _check_decode(self) -> DataSettings:
        refused = {
            "fast_decode": (self.fast_decode, "a GPU decodes at full size"),
            "cache_images": (self.cache_images, "cached images are decoded once, exactly, by the CPU"),
            "augment": (self.augment == "color", "color varies colours on the CPU, after decoding"),
        }
        for name, (value, reason) in refused.items():
            if self.decode == "gpu" and value:
                raise ValueError(f"decode gpu does not go with {name}: {reason}; leave one of the two away")
        return self

    @property
    def allowed_skipped_fraction(self) -> float:
        """Fraction of the images and records that may be skipped before the run ends."""
        return self.max_skipped_fraction if self.on_unreadable_image == "skip" else 0.0


class TrainingSettings(Settings):
    """How the weights are moved."""

    batch_size: BatchSize = Field(
        32, description="pairs a step, over all ranks: each is contrasted with all others of its batch"
    )
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="pairs in memory at once on each rank; the gradient is the same; auto: as many as fit"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute each layer again in the backward pass: less memory, more time"
    )
    loss: Literal["infonce", "siglip"] = Field(
        "infonce",
        description="infonce: a softmax over the batch, as CLIP; siglip: a sigmoid a pair, with a learned bias",
    )
    positives: Literal["auto", "pair", "image", "caption"] = Field(
        "auto",
        description="other texts of a batch that belong to an image. pair: none; image: those of the same image are no "
        "negatives; caption: those and equal ones are positives; auto: caption where captions repeat, else image",
    )
    recipe: Literal["auto", "full", "lora", "head"] | None = Field(
        None,
        description="picks what trains, rates and length for the data at hand, and says why; none: nothing",
    )
    num_epochs: PositiveInt = Field(50, description="passes over the training images")
    learning_rate: PositiveFloat = Field(1e-4, description="peak rate of the projection layers")
    backbone_lr_scale: NonNegativeFloat | None = Field(
        None, description="rate of the towers over learning_rate; none: 0.01, 1 for a random start, 2 with LoRA"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="rate of each layer of a tower over that of the layer above it, as 0.7; none: one rate"
    )
    ema: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        None, description="decay of the average of the weights that is evaluated and saved, as 0.999; none: no average"
    )
    weight_decay: NonNegativeFloat = Field(0.01, description="AdamW's decay (not on biases, norms, temperature)")
    gradient_clip_norm: NonNegativeFloat = Field(1.0, description="largest gradient norm of a step; 0: no clipping")
    skip_nonfinite: NonNegativeInt = Field(
        0, description="steps in a row that may be skipped for a non-finite loss or gradient; 0: the first ends the run"
    )
    warmup_fraction: Annotated[Fraction, Field(lt=1)] = Field(
        0.1, description="fraction of the steps over which the rates rise, before the cosine"
    )
    early_stopping_patience: NonNegativeInt = Field(
        10, description="evaluations without a better validation RSum before the run ends; 0: never"
    )
    validate_every: Interval = Field(
        None, description="steps (500) or time (90s, 10m, 2h) between evaluations within an epoch; none: each epoch's"
    )
    interpolate: bool = Field(
        False, description="after training, average the weights as loaded with the best ones and keep the best average"
    )
    precision: Precision = Field("auto", description="auto: bf16 where the device has it, else fp32 (fp16 on old GPUs)")
    compile: Annotated[Literal["auto", "true", "false"], WRITTEN_OUT] = Field(
        "auto",
        description="torch.compile for the towers in training; auto: on a CUDA device, in a run that is long enough to "
        "pay for it",
        json_schema_extra={"bare": "true"},
    )
    seed: Seed = 42


class RunSettings(Settings):
    """Where the run happens and what it leaves."""

    device: Device = "auto"
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="under torchrun: the whole model on each rank, or (fsdp) a shard of it"
    )
    output_dir: str = Field(".", description="folder for model-checkpoint/, results/ and logs/")
    cache_dir: str | None = Field(None, description="folder for cached images and features; none: cache/ in output_dir")
    resume: str | None = Field(
        None,
        description="continue a run: alone, the one in output_dir; or a run's folder, or a checkpoint file",
        json_schema_extra={"bare": "latest"},
    )
    checkpoint_every: Interval = Field(
        "10m",
        description="steps (500) or time (90s, 10m, 2h) between checkpoints within an epoch; none: only at its end",
    )
    keep_checkpoints: PositiveInt = Field(
        2, description="newest checkpoints to keep: last_model.pth, and earlier ones in case it is damaged"
    )
    profile: NonNegativeInt = Field(0, description="steps to record with torch.profiler, to logs/profile.json")
    report: Report = Field(
        "full", description="write results/report.html at the end; no-images: with captions and names alone"
    )
    track: Literal["wandb", "mlflow"] | None = Field(
        None, description="tell numbers, settings and verdict to a service, by its own library; no images or captions"
    )
    log_interval: PositiveInt = Field(10, description="steps between two log lines")
    log_level: LogLevel = "info"
    language: LanguageName = "en"

    allow_data_change: bool = Field(
        False, description="resume although the data is not what the run was trained and validated on"
    )


class Config(Settings):
    """One training run, as stored in its checkpoint and its results."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    run: RunSettings = RunSettings()

    @property
    def seed_of_split(self) -> int:
        """Seed of the split."""
        return self.training.seed if self.data.split_seed is None else self.data.split_seed

    @model_validator(mode="after")
    def _check_feature_views(self) -> Config:
        # views are cached outputs of the image tower, so it must be frozen; views of images that are never cropped or
        # recoloured would be copies of one
        views = self.data.feature_views
        if views and not (self.model.freeze_backbone or self.model.freeze_tower == "image"):
            raise ValueError(f"feature_views {views} needs a frozen image tower: freeze_backbone, freeze_tower image")
        if views is not None and views > 1 and self.data.augment == "none":
            raise ValueError(f"feature_views {views}: without augment all views of an image are the same")
        return self

    @model_validator(mode="after")
    def _check_folds(self) -> Config:
        refused = {
            "val_data": (self.data.val_data, "the folds validate"),
            "validate_every": (self.training.validate_every, "folds are compared after whole epochs"),
            "interpolate": (self.training.interpolate, "the last model has no validation images to choose by"),
            "allow_data_change": (self.run.allow_data_change, "folds of other data cannot be compared"),
        }
        for name, (value, reason) in refused.items():
            if self.data.folds is not None and value:
                raise ValueError(f"{name} does not go with folds: {reason}; leave one of the two away")
        return self

    @model_validator(mode="after")
    def _check_what_trains(self) -> Config:
        if self.training.layer_decay is not None and self.model.freeze_backbone:
            raise ValueError("layer_decay is about the towers' layers, and freeze_backbone holds them: choose one")
        if self.training.ema is not None and self.run.parallel == "fsdp":
            raise ValueError("ema does not go with parallel fsdp: use ddp")
        return self


def steps_of(interval: int | str | None) -> int | None:
    """Return the steps of an interval that is given in steps; None of a time, or of none."""
    return interval if isinstance(interval, int) else None


def seconds_of(interval: int | str | None) -> int | None:
    """Return the seconds of an interval that is a time such as `90s`, `10m` or `2h`; None of steps, or of none."""
    return int(interval[:-1]) * SECONDS_OF_UNIT[interval[-1]] if isinstance(interval, str) else None
