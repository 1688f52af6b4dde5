import json
import os
import sys
from pathlib import Path

import pytest

from cliptune.cli import (
    HELP_GROUPS,
    check_command_line,
    flags_of,
    is_positional,
    load_config,
    override,
    parse_settings,
    run_stage,
)
from cliptune.flag_names import MEANT, RENAMED
from cliptune.settings import Config, Settings, seconds_of, steps_of
from cliptune.stage_settings import (
    EvaluationSettings,
    ExportSettings,
    InspectSettings,
    SearchSettings,
    VisualizationSettings,
)

STAGES = (Config, InspectSettings, EvaluationSettings, VisualizationSettings, SearchSettings, ExportSettings)


def load(*argv: str) -> Config:
    return load_config(list(argv), description="")[0]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_defaults_are_the_specs() -> None:
    config = load()
    assert (config.data.data_dir, config.model.name, config.run.device) == ("./data", "ViT-B/32", "auto")
    assert (config.training.batch_size, config.training.num_epochs, config.training.learning_rate) == (32, 50, 1e-4)
    assert (config.training.weight_decay, config.training.gradient_clip_norm) == (0.01, 1.0)
    assert config.model.freeze_backbone is False
    assert config.model.projection_dim is None


def test_flags_win_over_the_file_and_the_file_over_defaults() -> None:
    Path("config.json").write_text(json.dumps({"training": {"batch_size": 8, "seed": 1}}))
    config = load("--seed", "5")
    assert (config.training.batch_size, config.training.seed, config.training.num_epochs) == (8, 5, 50)


def test_the_specs_example_file_is_accepted() -> None:
    values = {
        "model": {"name": "ViT-B/32", "projection_dim": 512, "freeze_backbone": False},
        "training": {"batch_size": 32, "learning_rate": 1e-4, "weight_decay": 0.01, "gradient_clip_norm": 1.0},
    }
    Path("c.json").write_text(json.dumps(values))
    assert load("--config", "c.json").model.projection_dim == 512


def test_shipped_file_holds_every_setting_at_its_default() -> None:
    shipped = json.loads((Path(__file__).parent.parent / "config.json").read_text())
    expected = Config().model_dump()
    expected["run"].pop("resume")
    assert shipped == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["--freeze_backbone"], True), (["--freeze_backbone", "false"], False), (["--freeze_backbone", "true"], True)],
)
def test_booleans_can_be_switched_both_ways(argv: list[str], expected: bool) -> None:
    assert load(*argv).model.freeze_backbone is expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_sz", "3"], "did you mean --batch_size?"),
        (["--batch_size", "x"], "--batch_size: expected a valid integer, got 'x'"),
        (["--micro_batch_size", "x"], "--micro_batch_size: expected a valid integer or 'auto', got 'x'"),
        (["--freeze_backbone", "maybe"], "--freeze_backbone: expected a valid boolean, got 'maybe'"),
        (["--on_unreadable_image", "stop"], "--on_unreadable_image: expected 'skip' or 'fail', got 'stop'"),
        (["--batch_size", "0"], "--batch_size: expected greater than 0"),
        (["--batch_size", "1"], "--batch_size: expected 2 or more, got 1: a single pair has no negatives"),
        (["--checkpoint_every", "5x"], "--checkpoint_every: expected a number of steps, or a time such as 90s, 10m"),
        (["--checkpoint_every", "0m"], "--checkpoint_every: expected a number of steps"),
        (["--learning_rate", "nan"], "--learning_rate: expected a finite number"),
        (["--precision", "fp64"], "--precision: expected 'auto'"),
        (["--config", "gone.json"], "no such file: gone.json"),
        (["stray"], "unknown flag stray"),
        (["--freeze_backbone", "--freeze_tower", "text"], "--freeze_backbone, --freeze_tower: freeze_backbone freezes"),
        (["--freeze_tower", "both"], "--freeze_tower: expected 'image' or 'text'"),
        (["--feature_views", "2", "--augment", "crop"], "needs a frozen image tower"),
        (["--feature_views", "1", "--freeze_tower", "text"], "needs a frozen image tower"),
        (["--feature_views", "2", "--freeze_backbone"], "without augment all views of an image are the same"),
    ],
)
def test_a_wrong_flag_is_named(argv: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("?", r"\?")):
        load(*argv)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lr", "unknown flag --lr; did you mean --learning_rate?"),
        ("--bs", "unknown flag --bs; did you mean --batch_size?"),
        ("--epochs", "unknown flag --epochs; did you mean --num_epochs?"),
        ("--wd", "unknown flag --wd; did you mean --weight_decay?"),
        ("--model", "unknown flag --model; did you mean --model_name?"),
        ("--data", "unknown flag --data; did you mean --data_dir?"),
        ("--workers", "unknown flag --workers; did you mean --num_workers?"),
        ("--output", "unknown flag --output; did you mean --output_dir?"),
        ("--checkpoint_path", "unknown flag --checkpoint_path; did you mean --resume?"),
        ("--batch-size", "unknown flag --batch-size; did you mean --batch_size?"),
        ("--Num_Epochs", "unknown flag --Num_Epochs; did you mean --num_epochs?"),
        ("--lr_scale", "unknown flag --lr_scale; did you mean --backbone_lr_scale?"),
        ("--no_such_flag", "unknown flag --no_such_flag; --help lists the flags"),
        ("--size", "unknown flag --size; --help lists the flags"),  # of a batch, or of a micro-batch?
        ("--x", "unknown flag --x; --help lists the flags"),
        ("--", "unknown flag"),
        ("--max_bad_share", "unknown flag --max_bad_share; it is now --max_skipped_fraction"),
        ("--warmup_share", "unknown flag --warmup_share; it is now --warmup_fraction"),
        ("--on_bad_image", "unknown flag --on_bad_image; it is now --on_unreadable_image"),
    ],
)
def test_an_unknown_flag_names_the_one_that_is_meant(flag: str, message: str) -> None:
    for argv in ([flag, "3"], [f"{flag}=3"]):
        with pytest.raises(ValueError, match="unknown flag") as error:
            load(*argv)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batch_size", "it is now --encode_batch_size"),
        ("--bs", "did you mean --encode_batch_size?"),
        ("--checkpoint_path", "did you mean --checkpoint?"),
        ("--lr", "--help lists the flags"),  # it has no learning rate
    ],
)
def test_an_unknown_flag_of_evaluation(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match="unknown flag") as error:
        parse_settings(EvaluationSettings, [flag, "3"], description="")
    assert str(error.value) == f"unknown flag {flag}; {message}"


def test_hints_lead_to_flags_that_exist() -> None:
    names = {flag.name for settings in STAGES for flag in flags_of(settings)}
    assert {*MEANT.values(), *RENAMED.values()} <= names
    assert not {*RENAMED} & {flag.name for flag in flags_of(EvaluationSettings)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"training": {"batchsize": 3}}', "training.batchsize: unknown key; did you mean training.batch_size?"),
        ('{"training": {"lr": 3}}', "training.lr: unknown key; did you mean training.learning_rate?"),
        ('{"batch_size": 3}', "batch_size: unknown key; did you mean training.batch_size?"),  # in no group
        ('{"model": {"model_name": "RN50"}}', "model.model_name: unknown key; did you mean model.name?"),
        ('{"training": {"warmup_share": 0}}', "training.warmup_share: unknown key; it is now training.warmup_fraction"),
        ('{"data": {"max_bad_share": 0}}', "data.max_bad_share: unknown key; it is now data.max_skipped_fraction"),
        ('{"data": {"on_bad_image": 0}}', "data.on_bad_image: unknown key; it is now data.on_unreadable_image"),
        ('{"data": {"qqq": 0}}', "data.qqq: unknown key$"),
        ('{"training": {"micro_batch_size": "x"}}', "training.micro_batch_size: expected a valid integer or 'auto', g"),
        ('{"trainig": {}}', "trainig: unknown key; did you mean training"),
        ('{"training": {"batch_size": 1}}', "training.batch_size: expected 2 or more, got 1"),
        ('{"training": {"batch_size": 8, "batch_size": 16}}', "the key 'batch_size' occurs twice"),
        ('{"training": {"batch_size": 8}, "training": {}}', "the key 'training' occurs twice"),
        ('{"training": {"batch_size": true}}', "batch_size: true is not a value"),
        ('{"training": 3}', "training: expected an object"),
        ("[1]", "expected a JSON object"),
        ('{"a": \n,}', "line 2, column 1"),
        ("[" * 5000, "not valid JSON"),
    ],
)
def test_a_wrong_file_is_named_with_its_place(text: str, message: str) -> None:
    Path("config.json").write_text(text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load()


@pytest.mark.parametrize(
    ("text", "value", "steps", "seconds"),
    [
        ("500", 500, 500, None),
        ("90s", "90s", None, 90),
        ("10m", "10m", None, 600),
        ("2h", "2h", None, 7200),
        ("none", None, None, None),
    ],
)
def test_an_interval_is_steps_or_a_time(text: str, value: object, steps: int | None, seconds: int | None) -> None:
    interval = load("--checkpoint_every", text).run.checkpoint_every
    assert (interval, steps_of(interval), seconds_of(interval)) == (value, steps, seconds)


@pytest.mark.parametrize("settings", STAGES)
def test_every_flag_name_stands_once(settings: type[Settings]) -> None:
    names = [flag.name for flag in flags_of(settings)]
    assert len(names) == len(set(names))


def help_of(settings: type[Settings], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        if settings is Config:
            load("--help")
        else:
            parse_settings(settings, ["--help"], description="what it does")
    assert done.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("settings", STAGES)
def test_help_shows_every_flag_once_and_in_a_group(
    settings: type[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(settings, capsys).splitlines()
    shown = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    named = [flag.name for flag in flags_of(settings) if not is_positional(flag.field)]
    assert sorted(shown) == sorted([*named, "config"])
    assert "more:" not in lines


def test_help_shows_the_daily_flags_first_then_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(Config, capsys)
    titles = [line.removesuffix(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options", *(title for title in HELP_GROUPS if title not in {"shards", "export"})]
    assert text.index("--data_dir") < text.index("--batch_size") < text.index("--resume") < text.index("--val_split")


def test_help_shows_choices_kinds_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(Config, capsys).split())
    for part in (
        "--augment {none,crop,color}",
        "--freeze_tower {image,text,none}",
        "--micro_batch_size {auto,N}",
        "--freeze_backbone [true|false]",
        "--batch_size N",
        "--learning_rate X",
        "--backbone_lr_scale X",
        "--data_dir DIR",
        "--resume [FILE]",
        "--checkpoint_every N|TIME",
        "passes over the training images (default: 50)",
        "none (default): the backbone's own",
        "keep the best average (default: false)",
        "in a run that is long enough to pay for it (default: auto)",
    ):
        assert part in text


def test_override_changes_only_what_is_given() -> None:
    config = load("--seed", "3")
    changed = override(config, {"num_epochs": "7"})
    assert (changed.training.num_epochs, changed.training.seed) == (7, 3)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a\nb"), 2),
        (FileNotFoundError("gone"), 2),
        (FileNotFoundError(2, "No such file", "a\x1b[31mred\u202e\udcff.jpg"), 2),
        (FloatingPointError("the loss is nan"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage() -> int:
        raise error

    assert run_stage(stage, name="stage.py") == code
    printed = capsys.readouterr().err
    assert printed.startswith("stage.py: stopped" if code == 130 else "stage.py: error: ")
    assert printed.endswith("\n")
    assert printed[:-1].isprintable()
    assert code == 130 or len(printed) > len("stage.py: error: \n")


def test_a_message_stays_short_whatever_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**{f"key{number}": 1 for number in range(1000)}, "k" * 10_000: 1, "data": "x" * 10_000})
    )
    with pytest.raises(ValueError, match=r"and 992 more") as error:
        load_config(["--config", str(path)], description="")
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("seed", 2**64, "expected less than 18446744073709551616"),
        ("seed", 10**400, "expected"),
        ("seed", -1, "expected greater than or equal to 0"),
        ("projection_dim", 1, "expected greater than or equal to 2"),
        ("projection_dim", 10**9, "expected less than or equal to 65536"),
        ("batch_size", 2**70, "expected less than 2147483648"),
        ("num_epochs", 2**70, "expected less than 2147483648"),
        ("micro_batch_size", 2**70, "expected less than 2147483648 or 'auto'"),
        ("learning_rate", 10**300, "expected less than or equal to 1000000000000"),
        ("weight_decay", 10**300, "expected less than or equal to 1000000000000"),
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(flag: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--{flag}: {message}") as error:
        load(f"--{flag}", str(value))
    assert len(str(error.value)) < 400
    assert load("--seed", str(2**64 - 1)).training.seed == 2**64 - 1


def test_every_stage_takes_what_it_has_a_use_for_from_a_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    run = {
        "model": {"name": "RN50"},
        "data": {"data_dir": "pairs.csv", "val_split": 0.2},
        "training": {"seed": 7, "precision": "fp32"},
        "run": {"output_dir": "runs/a", "device": "cpu"},
    }
    Path("run.json").write_text(json.dumps(run))
    data, _ = parse_settings(InspectSettings, ["--config", "run.json", "--val_split", "0.3"], description="")
    assert (data.data_dir, data.val_split, data.seed) == ("pairs.csv", 0.3, 7)
    unused = "keys of the config file that this stage does not use: "
    assert capsys.readouterr().err == f"{unused}training.precision, run.device\n"
    # a run's data is what it was trained on: evaluation stays with the images that it validated on
    evaluation, _ = parse_settings(EvaluationSettings, ["--config", "run.json"], description="")
    assert (evaluation.data_dir, evaluation.precision, evaluation.device) == ([], "fp32", "cpu")
    assert evaluation.checkpoint == [str(Path("runs/a/model-checkpoint/best_model.pth"))]
    assert capsys.readouterr().err == f"{unused}model, data, training.seed\n"
    figures, _ = parse_settings(VisualizationSettings, ["--config", "run.json"], description="")
    assert Path(figures.results) == Path("runs/a/results/training_results.json")


@pytest.mark.parametrize(
    ("argv", "in_file", "expected"),
    [
        (["--checkpoint", "a", "b", "--checkpoint", "c d"], None, ["a", "b", "c d"]),
        ([], ["a", "b"], ["a", "b"]),
        ([], "a", ["a"]),
        (["--checkpoint", "x"], ["a", "b"], ["x"]),
        ([], None, ["model-checkpoint/best_model.pth"]),
    ],
)
def test_a_flag_that_takes_several_values(argv: list[str], in_file: object, expected: list[str]) -> None:
    Path("own.json").write_text(json.dumps({} if in_file is None else {"checkpoint": in_file}))
    settings, _ = parse_settings(EvaluationSettings, ["--config", "own.json", *argv], description="")
    assert settings.checkpoint == expected
    undone, _ = parse_settings(EvaluationSettings, [*argv, "--data_dir", "none"], description="")
    assert undone.data_dir == []


def test_a_config_file_may_hold_a_stages_own_keys_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.json").write_text(json.dumps({"data_dir": "test.csv", "encode_batch_size": 7}))
    settings, _ = parse_settings(EvaluationSettings, ["--config", "own.json"], description="")
    assert (settings.data_dir, settings.encode_batch_size) == (["test.csv"], 7)
    assert not capsys.readouterr().err
    Path("own.json").write_text(json.dumps({"data": {"data_dri": "test.csv"}}))
    with pytest.raises(ValueError, match=r"own\.json: data\.data_dri: unknown key; did you mean data\.data_dir\?"):
        parse_settings(EvaluationSettings, ["--config", "own.json"], description="")
    with pytest.raises(FileNotFoundError, match=r"--config: no such file: gone\.json"):
        parse_settings(InspectSettings, ["--config", "gone.json"], description="")


def test_only_training_reads_a_config_file_that_is_not_named() -> None:
    Path("config.json").write_text(json.dumps({"run": {"output_dir": "elsewhere"}}))
    assert parse_settings(EvaluationSettings, [], description="")[0].output_dir == "."
    assert load().run.output_dir == "elsewhere"


@pytest.mark.parametrize(
    ("argv", "queries", "others"),
    [
        (["a heart", "b"], ["a heart", "b"], {}),
        (["--json", "a heart", "--top", "5", "b"], ["a heart", "b"], {"json": "true", "top": "5"}),
        (["--json", "false", "true"], ["true"], {"json": "false"}),
        (["--query_image", "x.png", "a", "--query_image", "y.png"], ["a"], {"query_image": ["x.png", "y.png"]}),
        (["--top=5", "--", "--json", "a"], ["--json", "a"], {"top": "5"}),
        (["none"], ["none"], {}),
        (["null"], ["null"], {}),
    ],
)
def test_words_without_a_flag_are_taken_as_they_are(
    argv: list[str], queries: list[str], others: dict[str, object]
) -> None:
    settings, given = parse_settings(SearchSettings, argv, description="")
    assert settings.queries == queries
    assert given == {"queries": queries, **others}


def test_words_without_a_flag_are_refused_where_none_is_meant() -> None:
    with pytest.raises(ValueError, match="unknown flag heart; flags start with --"):
        parse_settings(EvaluationSettings, ["--split", "val", "heart"], description="")
    with pytest.raises(ValueError, match="unknown flag --jsn; did you mean --json"):
        parse_settings(SearchSettings, ["heart", "--jsn"], description="")


@pytest.mark.parametrize(("before", "wanted"), [(None, "1"), ("0", "0")])
def test_what_mps_has_not_runs_on_the_cpu(before: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", before or "")
    if before is None:
        monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    check_command_line(Config, "")
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == wanted


def test_a_command_without_a_word_is_told_what_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"^nothing to look for"):
        parse_settings(SearchSettings, [], description="")
