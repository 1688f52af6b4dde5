"""Our errors in Chinese: complete, true to their values, and shown by every stage that is asked for it."""

import argparse
import errno
import json
import os
import re
import signal
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, Field, ValidationError

import data_loader
import evaluation
import export
import search
import train
import visualization
from cliptune.cli import run_stage
from cliptune.language.asked import language_asked, say_in
from cliptune.language.catalogue import language_of, make_template
from cliptune.runtime.stopping import KilledWorkerError, Stopped
from tests.helpers.datasets import make_images, write_files
from tests.helpers.messages import ROOT, keys_of, messages
from tests.helpers.runs import SMALL, small_runs

ZH = language_of("zh")
CHINESE = re.compile("[\u4e00-\u9fff]")
FLAG = re.compile(r"(?<![\w-])--[a-z_]+")
NAMES_ALONE = {
    "--data_dir '{0}'{1}",
    "JSON lines",
    "DICOM: {0}",
    "image_pooling {0}, text_pooling {1}, causal {2}",
    "[Errno {0:n}] {1}",
    "[Errno {0:n}] {1}: {2}",
}
OWN = "errors_"


def entries(begins_with: str = "") -> dict[str, str]:
    """The entries of all catalogues whose names begin so."""
    folder = files("cliptune.language").joinpath("zh")
    named = [file for file in folder.iterdir() if file.name.startswith(begins_with)]
    return {key: said for file in named for key, said in json.loads(file.read_text(encoding="utf-8")).items()}


def templates(begins_with: str = "") -> set[str]:
    """Their keys as the sources have them: without the kinds of their values."""
    return {key.replace(":n}", "}") for key in entries(begins_with)}


@pytest.mark.slow
def test_every_error_has_its_translation() -> None:
    known = templates()
    missing = {
        key: message.place
        for message in messages()
        for key in keys_of(message)
        if key not in known and f"{{0}} {key}" not in known
    }
    lines = "\n".join(f"{place}: {json.dumps(key, ensure_ascii=False)}" for key, place in missing.items())
    assert not missing, f"add a line with the Chinese text to cliptune/language/zh/errors_<room>.json for\n{lines}"


def test_no_translation_is_of_a_text_that_is_gone() -> None:
    wanted = {key for message in messages() for key in keys_of(message)}
    own = templates(OWN) - templates(f"{OWN}library") - templates(f"{OWN}words")
    assert not sorted(own - wanted)


def test_words_are_those_of_the_sources() -> None:
    """Texts of one word, and those that a word is filled into, are not told from names by the sources' syntax."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("cliptune/**/*.py"))
    said = {word for key in entries(f"{OWN}words") for word in re.findall(r"[A-Za-z]+", re.sub(r"\{.*?\}", "", key))}
    assert not {word for word in said if word not in text and word.removesuffix("s") not in text}


def test_a_translation_is_chinese_and_keeps_flags_and_values() -> None:
    for key, said in entries(OWN).items():
        assert CHINESE.search(said) or " " not in key or key in NAMES_ALONE, key
        assert set(FLAG.findall(key)) == set(FLAG.findall(said)), key
        template = make_template(key, said)
        used = {each.place for each in template.said if not isinstance(each, str)}
        assert used == set(range(len(template.is_number))), key


ODD = (
    "/data/my {0} set/a; b.csv", "C:\\图像\\a: b.png", "'it''s \"quoted\"'", "{}", "描述.txt", "a, b and c",
    "%s", "no caption", "{image}",
)  # fmt: skip


@pytest.mark.slow
def test_a_text_with_any_values_keeps_them() -> None:
    """Each template, filled with odd values, is said with the same ones: what has to stay as it is does."""
    for key, said in entries(OWN).items():
        template = make_template(key, said)
        for shift in range(0, len(ODD), 4):
            values = ["1,024" if each else ODD[(shift + n) % len(ODD)] for n, each in enumerate(template.is_number)]
            if any(literal and literal in value for literal in template.literals for value in values):
                continue  # nobody can tell where such a value ends
            text = key.replace(":n}", "}").format(*values)
            shown = ZH.say(text)
            raw = {int(number) for number in re.findall(r"\{(\d+):r\}", said)}
            assert not [values[number] for number in raw if values[number] not in shown], (key, shown)
            assert shown != text or not CHINESE.search(said), (key, shown)


def test_errors_of_libraries_are_said_as_they_are_raised() -> None:
    known = entries(f"{OWN}library")
    numbers = ("ENOENT", "EACCES", "EISDIR", "ENOTDIR", "ENOSPC", "EEXIST", "EROFS", "EMFILE", "EIO", "EADDRINUSE")
    for number in numbers:
        assert CHINESE.search(ZH.say(f"[Errno 1] {os.strerror(getattr(errno, number))}: '/a b'"))

    class Values(BaseModel):
        whole: int
        some: float = Field(gt=0)
        at_least: int = Field(ge=2)
        most: float = Field(le=1)
        is_on: bool

    with pytest.raises(ValidationError) as raised:
        Values.model_validate({"whole": "x", "some": 0, "at_least": 1, "most": 2, "is_on": "maybe"})
    for issue in raised.value.errors():
        assert CHINESE.search(ZH.say(issue["msg"].partition(", unable")[0])), issue["msg"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--flag")
    with pytest.raises(argparse.ArgumentError) as error:
        parser.parse_args(["--flag"])
    assert ZH.say(str(error.value)) == "参数 --flag：需要一个值"
    for text in ("{", '{"a" 1}', '{"a": 1,', "[1 2]", "{} {}"):
        with pytest.raises(ValueError, match="char") as invalid:
            json.loads(text)
        assert str(invalid.value).partition(": line")[0] in known


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what people do wrong."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "pictures", "a.png", "b.png", "c.png")
    (tmp_path / "none").mkdir()
    write_files(tmp_path, "two/one.csv", "two/other.csv")
    write_files(tmp_path, "header/data.csv", text="image,titel\na.png,x\n")
    write_files(tmp_path, "broken/data.json", text='[{"image": "a.png",')
    write_files(tmp_path, "gone/data.csv", text="image,caption\nx/a.png,one\nx/b.png,two\n")
    write_files(tmp_path, "bare/data.csv", text="image,caption\n../pictures/a.png,\n../pictures/b.png,\n")
    write_files(tmp_path, "bad.json", text='{"training": {"batch_size": 1, "epochs": 3}, "run": {"language": "zh"}}')
    (tmp_path / "bad.pth").write_bytes(b"PK\3\4 no checkpoint")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pth")
    write_files(tmp_path, "results.json", text='{"results": 3')
    return tmp_path


ZH_FLAG = ("--language", "zh")
MISTAKES: list[tuple[Callable[[list[str]], int], tuple[str, ...], str]] = [
    (train.main, ("--nmu_epochs", "3", *ZH_FLAG), "未知参数 --nmu_epochs；你想写的是 --num_epochs 吗？"),
    (train.main, ("pictures", "--language=zh"), "未知参数 pictures；参数以 -- 开头"),
    (train.main, ("--batch_size", "many", *ZH_FLAG), "--batch_size：应为整数，得到的是 'many'"),
    (train.main, ("--batch_size", *ZH_FLAG), "参数 --batch_size：需要一个值"),
    (train.main, ("--config", "bad.json"), "training.epochs：未知的键；你想写的是 training.num_epochs 吗？"),
    (train.main, ("--config", "no.json", *ZH_FLAG), "--config：没有这个文件：no.json"),
    (train.main, ("--resume", "pictures", *ZH_FLAG), "--resume：pictures 里没有训练的 model-checkpoint/last_model.pth"),
    (train.main, ("--lora_alpha", "8", *ZH_FLAG), "lora_alpha 和 lora_layers 说明 LoRA 怎么做：它们需要 lora_rank"),
    (train.main, ("--device", "cuda:77", *ZH_FLAG), "--device cuda:77：PyTorch 看到的是"),
    (data_loader.main, ("--data_dir", "pictures", *ZH_FLAG), "pictures：有 3 张图像，没有描述：请把描述写到"),
    (data_loader.main, ("--data_dir", "none", *ZH_FLAG), "none 里没有数据；`python data_loader.py`"),
    (data_loader.main, ("--data_dir", "two", *ZH_FLAG), "two：有多个索引文件：one.csv, other.csv；请用 --data_dir"),
    (data_loader.main, ("--data_dir", "header", *ZH_FLAG), "header/data.csv：没有 caption 列：只有 image, titel"),
    (data_loader.main, ("--data_dir", "broken", *ZH_FLAG), "broken/data.json"),
    (
        data_loader.main,
        ("--data_dir", "bare", *ZH_FLAG),
        "bare/data.csv：没有带描述的图像：data.csv：第 2 行：描述为空",
    ),
    (data_loader.main, ("--data_dir", "gone", *ZH_FLAG), "gone/data.csv：其中的 2 张图像一张也没找到"),
    (data_loader.main, ("--data_dir", "no where", *ZH_FLAG), "no where 不存在；`python data_loader.py`"),
    (evaluation.main, ("--checkpoint", "bad.pth", *ZH_FLAG), "bad.pth"),
    (evaluation.main, ("--checkpoint", "other.pth", "--data_dir", "two", *ZH_FLAG), "other.pth：不是 CLIP 的权重"),
    (evaluation.main, ("--checkpoint", "ViT-B/23", *ZH_FLAG), "没有这个检查点：ViT-B/23；你想写的是 ViT-B/32 吗？"),
    (search.main, ("--images", "none", "a heart", *ZH_FLAG), "--images none：这个目录及其下没有图像"),
    (search.main, ("--images", "pictures", "a heart", *ZH_FLAG), "model-checkpoint/best_model.pth"),
    (search.main, ("--images", "none", *ZH_FLAG), "没有要找的内容：请给出文本"),
    (export.main, ("--to", "tensorflow", *ZH_FLAG), "--to：应为 transformers, "),
    (visualization.main, ("--results", "results.json", *ZH_FLAG), "results.json：第 1 行"),
    (visualization.main, ("--results", "none.json", *ZH_FLAG), "没有这个结果文件：none.json"),
]
ENGLISH = re.compile(r"(?<![\w./<-])[a-z']{2,}(?: [a-z']+){3,}")


@pytest.mark.parametrize(
    ("main", "argv", "told"), MISTAKES, ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else None
)
def test_a_mistake_is_told_in_chinese(
    main: Callable[[list[str]], int], argv: tuple[str, ...], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(argv)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"\w+\.py：错误：", line)
    assert told in line
    assert CHINESE.search(line.partition("：错误：")[2])
    assert not ENGLISH.search(line), line


def test_without_the_flag_it_is_english(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--data_dir", "none"], ["--data_dir", "none", "--language", "en"]):
        assert data_loader.main(argv) == 2
        assert not CHINESE.search(capsys.readouterr().err)


def test_the_language_asked_for_is_found_whatever_else_is_wrong(folder: Path) -> None:
    config = folder / "bad.json"
    asked: list[tuple[list[str], Path | None, str]] = [
        ([], None, "en"), ([], config, "zh"), (["--language", "en"], config, "en"),
        (["--config", "bad.json"], None, "zh"),
        (["--config=bad.json", "--what"], None, "zh"), (["--language", "en", "--language=zh"], None, "zh"),
        (["--", "--language", "zh"], None, "en"), (["--language"], None, "en"), ([], folder / "results.json", "en"),
        ([], folder / "gone.json", "en"), ([], folder, "en"), ([], folder / "bad.pth", "en"),
    ]  # fmt: skip
    for words, file, language in asked:
        assert language_asked(words, file) == language, (words, file)
    for text in ("[]", "{}", '{"run": 3}', '{"run": {"language": 3}}', '{"language": "fr"}', "[" * 100_000):
        (folder / "odd.json").write_text(text, encoding="utf-8")
        assert say_in(language_asked([], folder / "odd.json"))("an image") == "an image"


def test_what_ends_a_stage_is_told_in_chinese(capsys: pytest.CaptureFixture[str]) -> None:
    ends: list[tuple[BaseException, int, str]] = [
        (Stopped(signal.SIGTERM), 143, "train.py：已由 SIGTERM 停止"),
        (KeyboardInterrupt(), 130, "train.py：已停止"),
        (
            KilledWorkerError(),
            1,
            "train.py：错误：一个数据加载进程被杀掉，可能是内存不足：请试试更少的 --num_workers",
        ),
        (MemoryError(), 1, "train.py：错误：内存不足：请结束其他程序，提高 ulimit -v 或 -u，或换内存更大的机器"),
        (PermissionError(errno.EACCES, "Permission denied", "a b.json"), 2, "train.py：错误：没有权限：'a b.json'"),
        (ValueError("of a library, as it is"), 2, "train.py：错误：of a library, as it is"),
    ]
    for error, code, told in ends:

        def stage(error: BaseException = error) -> int:
            raise error

        assert run_stage(stage, name="train.py", argv=[*ZH_FLAG]) == code
        assert capsys.readouterr().err == f"{told}\n"


def test_keys_of_no_use_are_told_in_chinese(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(folder, "run.json", text='{"training": {"ema": 0.9}, "run": {"language": "zh"}}')
    assert data_loader.main(["--config", "run.json", "--data_dir", "none"]) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first == "这个阶段用不到配置文件中的这些键：training"
    assert last.startswith("data_loader.py：错误：none 里没有数据；")


@pytest.mark.slow
def test_a_damaged_image_that_stops_a_run_is_told_in_chinese(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_loader.create_sample_dataset(tmp_path / "data", num_samples=30)
    for path in sorted((tmp_path / "data").rglob("*.png")):
        path.write_bytes(path.read_bytes()[:100])
    flags = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
    with small_runs():
        assert train.main([*SMALL, *flags, "--on_unreadable_image", "fail", *ZH_FLAG]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"train\.py：错误：30 项图像和记录中有 1 项无法使用：.*\.png：不能作为图像读取：", line)
    assert f"全部列在 {tmp_path / 'results' / 'skipped.json'} 中。" in line
    assert not ENGLISH.search(line.partition("图像读取：")[0])
