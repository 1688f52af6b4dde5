"""What the stages beside training are told: typed settings, as those of a run are in `cliptune.settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from cliptune.settings import (
    DEFAULT_DATA_DIR,
    DEFAULT_MODEL_NAME,
    MAX_SKIPPED_FRACTION,
    SAMPLE_SIZE,
    Activation,
    BatchSize,
    CaptionKey,
    CaptionsFrom,
    CaptionTemplate,
    DataDir,
    Device,
    Fraction,
    ImageDir,
    ImageKey,
    LanguageName,
    LogLevel,
    MaxSkippedFraction,
    NearDuplicates,
    NonNegativeInt,
    NumWorkers,
    PositiveInt,
    Precision,
    Report,
    Seed,
    Settings,
    Several,
    Split,
    SplitSeed,
    ValSplit,
)

EXPORT_FORMS = ("transformers", "open_clip", "sentence-transformers", "onnx", "openai")


class InspectSettings(Settings):
    """Settings of the data stage."""

    from_config = frozenset((
        "data_dir", "image_dir", "caption_key", "val_split", "split_seed", "near_duplicates",
        "val_data", "max_skipped_fraction", "num_workers", "seed", "model_name", "context_length", "batch_size",
        "output_dir", "language",
    ))  # fmt: skip

    data_dir: DataDir = DEFAULT_DATA_DIR
    image_dir: ImageDir = None
    image_key: ImageKey = None
    caption_key: CaptionKey = None
    captions_from: CaptionsFrom = None
    caption_template: CaptionTemplate = None
    val_split: ValSplit = 0.1
    split_seed: SplitSeed = None
    near_duplicates: NearDuplicates = "join"
    val_data: str | None = Field(
        None, description="separate validation set that is compared with the data; none: split off"
    )
    max_skipped_fraction: MaxSkippedFraction = MAX_SKIPPED_FRACTION
    check: bool = Field(False, description="look at every image and caption; print issues, findings and what to do")
    model_name: str = Field(DEFAULT_MODEL_NAME, description="model that check estimates time and memory for")
    context_length: Annotated[int, Field(ge=3, le=4096)] | None = Field(
        None, description="tokens of a text that check goes by; none: the model's own"
    )
    batch_size: BatchSize = Field(32, description="pairs a step that check goes by")
    output_dir: str = Field(".", description="folder whose results/ gets data_check.json and suspects.csv")
    num_workers: NonNegativeInt | None = Field(None, description="worker processes of check; none: one a core")
    seed: Seed = 42
    num_samples: PositiveInt | None = Field(None, description=f"draw that many sample images (default: {SAMPLE_SIZE})")
    to_shards: str | None = Field(None, description="folder to write the data set to as shards")
    shard_size: PositiveInt = Field(1000, description="samples of a shard that to_shards writes")
    split: Split = Field("train", description="images that to_shards takes")
    language: LanguageName = "en"

    @property
    def seed_of_split(self) -> int:
        """Seed of the split."""
        return self.seed if self.split_seed is None else self.split_seed


class EvaluationSettings(Settings):
    """Settings of the evaluation stage."""

    # not the data: a run's data_dir is what it was trained on, and without one its own validation images are taken
    from_config = frozenset(
        ("max_skipped_fraction", "num_workers", "precision", "device", "output_dir", "log_level", "language")
    )
    below_output_dir: ClassVar[dict[str, str]] = {"checkpoint": "model-checkpoint/best_model.pth"}

    checkpoint: Several = Field(
        ["model-checkpoint/best_model.pth"],
        min_length=1,
        description="models to evaluate, several beside each other: checkpoints, folders of runs, weights files, hub "
        "folders, or names (ViT-B/32)",
    )
    data_dir: Several = Field([], description="data sets; none: the validation images that the checkpoints' runs had")
    split: Split | None = Field(
        None, description="split of data_dir, declared or the run's own; none: val or test if declared, else all"
    )
    exclude: str | None = Field(
        None, description="list of pairs (suspects.csv); evaluates with and without them; none: with all"
    )
    include_trained: bool = Field(False, description="evaluate images as well that the checkpoint was trained on")
    image_dir: ImageDir = None
    image_key: ImageKey = None
    caption_key: CaptionKey = None
    captions_from: CaptionsFrom = None
    caption_template: CaptionTemplate = None
    classes: str | None = Field(
        None,
        description="classify the images instead: file with a class a line, JSON {label: [names]}, or a folder whose "
        "folders are the classes",
    )
    templates: str | None = Field(
        None, description='file with a text a line in which {} stands for a class\'s name; none: "a photo of a {}"'
    )
    label_key: str | None = Field(
        None, description="column that holds the images' classes; none: their folders or captions name them"
    )
    max_skipped_fraction: Fraction | None = Field(
        None, description="fraction of the images and records that may be skipped; none: as in the checkpoint's run"
    )
    activation: Activation = None
    encode_batch_size: PositiveInt = Field(
        64,
        description="images or texts encoded at once, on a GPU at least 256 or 1024; in fp32 a fixed number, "
        "so that no result depends on it",
    )
    num_workers: NumWorkers = None
    precision: Precision | None = Field(None, description="none: as in the checkpoint's run, auto for other weights")
    device: Device = "auto"
    output_dir: str = Field(".", description="folder whose results/ gets evaluation_results.json, or those of classes")
    log_level: LogLevel = "info"
    language: LanguageName = "en"

    @model_validator(mode="after")
    def _check_classes(self) -> EvaluationSettings:
        for name in ("templates", "label_key"):
            if self.classes is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs classes, which are to be told apart")
        return self


class VisualizationSettings(Settings):
    """Settings of the figure stage."""

    from_config = frozenset(("language",))
    below_output_dir: ClassVar[dict[str, str]] = {"results": "results/training_results.json"}

    results: str = Field(
        "results/training_results.json", description="training_results.json or evaluation_results.json"
    )
    output_dir: str | None = Field(None, description="folder for what is drawn; none: beside the results file")
    report: Report = Field(
        "none",
        description="write report.html as well, of a training run; no-images: with captions and names alone",
        json_schema_extra={"bare": "full"},
    )
    suspects: Literal["train"] | None = Field(
        None, description="train: list training pairs that look mislabelled to the best model, in results/suspects.csv"
    )
    feature_map: Literal["pca", "umap"] = Field(
        "pca",
        description="how the report lays out features in a plane; umap: with umap-learn, which takes longer",
        json_schema_extra={"flag": "map"},
    )
    language: LanguageName = "en"

    @model_validator(mode="after")
    def _map_is_of_a_report(self) -> VisualizationSettings:
        if self.feature_map == "umap" and self.report == "none":
            raise ValueError("map umap is about the report: add --report")
        return self


class SearchSettings(Settings):
    """Settings of the search stage."""

    from_config = frozenset(("num_workers", "precision", "device", "output_dir", "cache_dir", "log_level", "language"))
    below_output_dir: ClassVar[dict[str, str]] = {"checkpoint": "model-checkpoint/best_model.pth"}

    queries: list[str] = Field(
        [], description="texts to look for; give each in quotes", json_schema_extra={"positional": True}
    )
    query_image: Several = Field(
        [], description="image files to look for, a flag each; none: texts alone", json_schema_extra={"single": True}
    )
    checkpoint: str = Field(
        "model-checkpoint/best_model.pth",
        description="model: a checkpoint, folder of a run, weights file, hub folder, or a name (ViT-B/32)",
    )
    images: str = Field(DEFAULT_DATA_DIR, description="folder whose images, and those below it, are looked through")
    top: PositiveInt = Field(10, description="images that each query gets")
    as_json: bool = Field(
        False,
        description='print a list of {"query", "results": [{"path", "score"}]}, and nothing else',
        json_schema_extra={"flag": "json"},
    )
    serve: bool = Field(False, description="open a page to search with, on this machine alone, until Ctrl-C")
    port: Annotated[int, Field(ge=0, lt=2**16)] = Field(8000, description="port of the page; 0: any that is free")
    activation: Activation = None
    encode_batch_size: PositiveInt = Field(
        64,
        description="images encoded at once, on a GPU at least 256; in fp32 a fixed number, "
        "so that no score depends on it",
    )
    num_workers: NumWorkers = None
    precision: Precision | None = Field(None, description="none: as in the checkpoint's run, auto for other weights")
    device: Device = "auto"
    output_dir: str = Field(".", description="folder whose results/ gets search.html")
    cache_dir: str | None = Field(None, description="folder for cached features; none: cache/ in output_dir")
    log_level: LogLevel = "info"
    language: LanguageName = "en"

    @model_validator(mode="after")
    def _check_queries(self) -> SearchSettings:
        if self.serve and (self.queries or self.query_image or self.as_json):
            raise ValueError("serve opens a page, which takes the queries: give none, and no json, or omit it")
        if not (self.serve or self.queries or self.query_image):
            raise ValueError('nothing to look for: give a text ("a red heart"), --query_image FILE, or --serve')
        if not all(query.strip() for query in self.queries):
            raise ValueError("an empty text finds nothing: omit it")
        return self


def _as_export(value: list[str]) -> list[str]:
    if len(value) not in {1, 2} or value[0] not in EXPORT_FORMS:
        raise ValueError(f"expected one of {', '.join(EXPORT_FORMS)}, and a folder behind it, got {' '.join(value)!r}")
    return value


class ExportSettings(Settings):
    """Settings of the export stage."""

    from_config = frozenset(("num_workers", "log_level", "language"))
    below_output_dir: ClassVar[dict[str, str]] = {"checkpoint": "model-checkpoint/best_model.pth"}

    checkpoint: str = Field(
        "model-checkpoint/best_model.pth",
        description="model: a checkpoint, folder of a run, weights file, hub folder, or a name (ViT-B/32)",
    )
    to: Annotated[Several, AfterValidator(_as_export)] = Field(
        ["transformers"],
        description="transformers, open_clip, sentence-transformers, onnx or openai, and the folder to write; without "
        "a folder exported/ and that name",
    )
    overwrite: bool = Field(False, description="replace an export that lies in the folder; nothing else is replaced")
    onnx_files: Literal["two", "one"] = Field("two", description="of onnx: two graphs, image and text, or one of both")
    quantize: Literal["int8"] | None = Field(
        None, description="of onnx, for processors: graphs of 8-bit integers as well; none: as trained alone"
    )
    activation: Activation = None
    num_workers: NumWorkers = None
    log_level: LogLevel = "info"
    language: LanguageName = "en"

    @property
    def form(self) -> str:
        """What it is exported to, one of `EXPORT_FORMS`."""
        return self.to[0]

    @property
    def folder(self) -> Path:
        """Folder of the export."""
        return Path(self.to[1] if len(self.to) > 1 else f"exported/{self.form}")

    @model_validator(mode="after")
    def _check_graphs(self) -> ExportSettings:
        for name in ("onnx_files", "quantize"):
            if self.form != "onnx" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is about graphs: it needs --to onnx")
        return self
