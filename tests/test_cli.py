import json
from pathlib import Path

import pytest

from cliptune.cli import flags_of, load_config, override, run_stage
from cliptune.settings import Config, seconds_of


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
        (["--batch_size", "x"], "--batch_size: expected a valid integer"),
        (["--batch_size", "0"], "--batch_size: expected greater than 0"),
        (["--checkpoint_every", "5x"], "--checkpoint_every: expected a number of steps, or a time such as 90s, 10m"),
        (["--checkpoint_every", "0m"], "--checkpoint_every: expected a number of steps"),
        (["--learning_rate", "nan"], "--learning_rate: expected a finite number"),
        (["--precision", "fp64"], "--precision: expected 'auto'"),
        (["--config", "gone.json"], "no such file: gone.json"),
        (["stray"], "unknown flag stray"),
        (["--freeze_backbone", "--freeze_tower", "text"], "choose one"),
        (["--freeze_tower", "both"], "--freeze_tower: expected 'image' or 'text'"),
        (["--feature_views", "2", "--augment", "crop"], "needs a frozen image tower"),
        (["--feature_views", "1", "--freeze_tower", "text"], "needs a frozen image tower"),
        (["--feature_views", "2", "--freeze_backbone"], "without augment all views of a picture are the same"),
    ],
)
def test_a_wrong_flag_is_named(argv: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("?", r"\?")):
        load(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"training": {"batchsize": 3}}', "training.batchsize: unknown key; did you mean batch_size"),
        ('{"trainig": {}}', "trainig: unknown key; did you mean training"),
        ('{"training": {"batch_size": true}}', "batch_size: true is not a value"),
        ('{"training": 3}', "training: expected an object"),
        ("[1]", "expected a JSON object"),
        ('{"a": \n,}', "line 2, column 1"),
        ("[" * 5000, "not valid JSON"),
    ],
)
def test_a_wrong_file_is_named_with_its_place(text: str, message: str) -> None:
    Path("config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load()


@pytest.mark.parametrize(
    ("text", "value"), [("500", 500), ("90s", "90s"), ("10m", "10m"), ("2h", "2h"), ("none", None)]
)
def test_an_interval_is_steps_or_a_time(text: str, value: object) -> None:
    assert load("--checkpoint_every", text).run.checkpoint_every == value
    assert isinstance(value, int | None) or seconds_of(str(value)) == {"90s": 90, "10m": 600, "2h": 7200}[text]


def test_every_flag_name_stands_once() -> None:
    names = [flag.name for flag in flags_of(Config)]
    assert len(names) == len(set(names))


def test_override_changes_only_what_is_given() -> None:
    config = load("--seed", "3")
    changed = override(config, {"num_epochs": "7"})
    assert (changed.training.num_epochs, changed.training.seed) == (7, 3)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a\nb"), 2),
        (FileNotFoundError("gone"), 2),
        (FloatingPointError("nan"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage() -> int:
        raise error

    assert run_stage(stage, name="stage.py") == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_message_stays_short_whatever_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**{f"key{number}": 1 for number in range(1000)}, "k" * 10_000: 1, "data": "x" * 10_000})
    )
    with pytest.raises(ValueError, match=r"and 992 more") as error:
        load_config(["--config", str(path)], description="")
    assert len(str(error.value)) < 5000
