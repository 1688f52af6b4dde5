"""`--language zh` of the stages: what a person is shown is Chinese, what is recorded stays as it is."""

import json
import re
from pathlib import Path

import pytest

import evaluation
import search
import visualization
from cliptune.cli import Started, load_config, resumed_config
from cliptune.report.style import _fonts_for
from cliptune.settings import Config
from tests.helpers.recorded import evaluation_values
from tests.helpers.reports import make_run
from tests.helpers.runs import SMALL
from tests.helpers.texts import english
from train import main

CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.mark.slow
def test_a_run_and_its_evaluation_are_shown_in_chinese_and_recorded_in_english(
    small: pytest.MonkeyPatch, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL, "--data_dir", str(sample_dir), "--num_epochs", "1", "--precision", "fp32"]
    for language in ("en", "zh"):
        assert main([*flags, "--output_dir", str(tmp_path / language), "--language", language]) == 0
    shown = capsys.readouterr().out
    shown = shown[shown.rindex("与刚载入的模型相比") - 100 :]
    assert "总用时：" in shown
    assert english(shown) == []
    for name in ("results/training_results.json", "logs/train.log", "logs/history.jsonl"):
        assert not CHINESE.search((tmp_path / "zh" / name).read_text(encoding="utf-8")), name
    values = [json.loads((tmp_path / each / "results/training_results.json").read_text()) for each in ("en", "zh")]
    assert values[0]["verdict"] == values[1]["verdict"]
    where = ["--output_dir", str(tmp_path), "--num_workers", "0", "--config", str(tmp_path / "zh.json")]
    (tmp_path / "zh.json").write_text('{"run": {"language": "zh"}}')
    assert evaluation.main(["--checkpoint", str(tmp_path / "zh"), *where]) == 0
    shown = capsys.readouterr().out
    assert english(shown) == []
    assert "图像到文本" in shown


@pytest.mark.slow
def test_figures_and_report_of_an_older_run_are_drawn_in_chinese(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(evaluation_values()), encoding="utf-8")
    for language in ("en", "zh"):
        flags = ["--results", str(path), "--output_dir", str(tmp_path / language), "--language", language]
        assert visualization.main(flags) == 0
    english_one, chinese = ((tmp_path / each / "evaluation_metrics.png").read_bytes() for each in ("en", "zh"))
    has_font = not _fonts_for("轮")[0]
    assert (english_one != chinese) == has_font
    monkeypatch.setattr(visualization, "draw_figures", lambda *_, **__: [])
    results = make_run(tmp_path / "run", num_images=4)
    assert visualization.main(["--results", str(results), "--report", "--language", "zh"]) == 0
    assert '<html lang="zh-CN">' in results.with_name("report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_gallery_of_a_search_is_in_chinese(
    trained_dir: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(trained_dir), "--images", str(sample_dir), "--output_dir", str(tmp_path)]
    assert search.main([*flags, "--num_workers", "0", "--language", "zh", "a red heart"]) == 0
    page = (tmp_path / "results/search.html").read_text(encoding="utf-8")
    assert "60 张图像" in page
    assert "a red heart" in page
    assert capsys.readouterr().out.splitlines()[-1] == f"已写入：{tmp_path / 'results/search.html'}"


def test_a_resumed_run_may_be_shown_in_another_language_and_an_older_one_in_english() -> None:
    stored = Config().model_dump()
    del stored["run"]["language"]
    started = Started(Config(), {"language": "zh"}, {})
    assert resumed_config({"config": stored}, started, source="last.pth").run.language == "zh"
    assert resumed_config({"config": stored}, started._replace(given={}), source="last.pth").run.language == "en"
    with pytest.raises(ValueError, match="--language"):
        load_config(["--language", "fr"], description="")
