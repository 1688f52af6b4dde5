"""`benchmarks/gpu.sh`: its parts, its lines and tables, what it does about failures; a try of all of it on the CPU."""

import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_data, gpu_parts, gpu_runs
from benchmarks.rows import MARK, Row, table, told, write_line
from cliptune.model.architectures import ARCHITECTURES
from cliptune.preprocess.tokens import tokenize
from data_loader import ImageTextDataset
from tests.helpers.models import (
    SMALL_VIT,
    small_architectures,  # noqa: F401  (a fixture)
)
from tests.helpers.rows import rows_of

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("row", "verdict", "fails"),
    [
        (Row("x", 9100, must=9000, hope=13000), "met", False),
        (Row("x", 13000, must=9000, hope=13000), "hope met", False),
        (Row("x", 8999, must=9000, hope=13000), "missed", False),
        (Row("x", 1.2, must=1.3, hope=1.1, higher=False), "met", False),
        (Row("x", 1.31, must=1.3, hope=1.1, higher=False), "missed", False),
        (Row("x", 0.1, must=0.2, higher=False, check=True), "PASS", False),
        (Row("x", 0.3, must=0.2, higher=False, check=True), "FAIL", True),
        (Row("x", float("nan"), must=0.2, higher=False, check=True), "FAIL", True),
        (Row("x", 5.0), "", False),
        (Row("x", state="skipped", note="why"), "skipped", False),
        (Row("x", state="FAILED", note="why"), "FAILED", True),
    ],
)
def test_a_figure_is_judged_by_what_it_must_be(row: Row, verdict: str, fails: bool) -> None:
    assert (row.verdict, row.is_failure) == (verdict, fails)
    assert verdict in row.line("part")


def test_a_line_has_figure_bounds_and_note() -> None:
    line = Row("a step", 9412.4, "pairs/s", 9000, 13000, note="spread 3%").line("vit_b32")
    assert " ".join(line.split()) == "vit_b32 a step 9,412 pairs/s met at least: must 9,000, hope 13,000 spread 3%"


def test_a_table_has_the_last_figure_of_each_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, about = tmp_path / "new" / "results.jsonl", {"card": "H100", "torch": "2.14"}
    write_line(path, "stall", Row("a", 3.0, "times", 2, 1.3, higher=False), about)
    write_line(path, "stall", Row("b", state="FAILED", note="no | memory"), about)
    write_line(path, "stall", Row("a", 1.2, "times", 2, 1.3, higher=False, note="again"), about)
    write_line(path, "ranks", Row("a", 7.0, "ms"), about)
    assert gpu.main(["--table", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Measured on card H100, torch 2.14.",
        "",
        "| part | what | measured | must | hope | |",
        "|---|---|---|---|---|---|",
        "| stall | b | - |  |  | FAILED; no / memory |",
        "| stall | a | 1.2 times | 2 | 1.3 | hope met; again |",
        "| ranks | a | 7 ms |  |  |  |",
    ]


def test_a_table_of_two_machines_says_which_row_is_whose(tmp_path: Path) -> None:
    for card in ("H100", "A100"):
        write_line(tmp_path / "x", "stall", Row(f"on {card}", 1.0), {"card": card})
    lines = table(tmp_path / "x")
    assert lines[:2] == ["Measured on card H100.", "Measured on card A100."]
    assert lines[-1] == "| stall | on A100 | 1 |  |  | on card A100 |"


@pytest.mark.parametrize("content", ["not JSON", "{}", '{"part": 1, "about": {}, "what": 2}', None])
def test_another_file_is_no_table(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "x").write_text(content)
    assert gpu.main(["--table", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("gpu.py: error: --table")


def test_parts_are_named_in_the_order_that_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(gpu_parts.PARTS)[:3] == ["correctness", "stall", "vit_b32"]
    assert len(gpu_parts.PARTS) == 17
    assert gpu.parse(["ranks", "stall"]).parts == ["ranks", "stall"]
    assert gpu.parse([]).parts == []
    with pytest.raises(SystemExit) as stopped:
        gpu.parse(["stall", "nonsense"])
    assert stopped.value.code == 2
    assert "no part is called nonsense; there are correctness, stall" in capsys.readouterr().err


class GivenFigures:
    """Stands in for a `Runner` on a GPU: measurements give what they are given, and rows are collected."""

    is_gpu, quick = True, False

    def __init__(self, later: dict[str, list[float]], *, compiled: bool = True, **seconds: list[float]) -> None:
        self.seconds, self.later, self.compiled = seconds, later, compiled
        self.rows: list[Row] = []
        self.tell = self.rows.append

    def captions(self) -> str:
        return "captions.json"

    def figures(self, script: str, *flags: object, **_: object) -> dict[str, Any]:
        assert flags[flags.index("--cases") + 1] == "ours,open_clip"
        assert flags[flags.index("--later") + 1] == "open_clip+compile"
        found = {"seconds": self.seconds, "later_seconds": {"x": self.later}, "floor_seconds": 0.01}
        return {"precisions": {"bf16": {**found, "ours_compiled": self.compiled}}}


def test_a_step_is_told_beside_its_peers() -> None:
    later = {"ours": [0.05, 0.05, 0.04], "open_clip+compile": [0.06, 0.06, 0.06]}
    run = GivenFigures(later, ours=[0.05, 0.04, 0.05], open_clip=[0.11, 0.10, 0.10])
    gpu_parts.vit_b32(run)  # type: ignore[arg-type]
    told_rows = {row.name.removeprefix("ViT-B/32, batch 512, bf16"): (row.value, row.verdict) for row in run.rows}
    assert told_rows == {
        ", default flags": (512 / 0.05, "met"),
        ": share of the floor": (pytest.approx(20), ""),
        ": ours over open_clip": (pytest.approx(2.2), "met"),  # 2.2, 2.5, 2.0: each turn's own
        ": ours over open_clip+compile": (pytest.approx(1.2), "missed"),
    }
    assert run.rows[0].note == "compiled, spread 20%"


def test_a_step_that_should_be_compiled_and_is_not_has_failed() -> None:
    run = GivenFigures({}, ours=[0.05, 0.04, 0.05], compiled=False)  # the compiled peer came too late
    gpu_parts.vit_b32(run)  # type: ignore[arg-type]
    assert [(row.name.removeprefix("ViT-B/32, batch 512, bf16"), row.verdict) for row in run.rows] == [
        (", default flags", "met"), (", default flags: compiled", "FAILED"), (": share of the floor", ""),
    ]  # fmt: skip
    assert run.rows[0].note == "not compiled, spread 20%"


def test_a_rate_is_measured_once_for_all_that_are_compared_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = gpu.parse(["--work", str(tmp_path)])
    measured: list[str] = []

    def step(run: gpu.Runner, model: str, batch: int, *_: object) -> float:
        measured.append(f"{model}, {batch}")
        run.tell(Row(gpu_parts.step_name(run, model, batch) + gpu_parts.BY_DEFAULT, 9000.0))
        return 9000.0

    monkeypatch.setattr(gpu_parts, "step", step)
    for _ in range(2):  # of a later call, too
        run = gpu.Runner(options)
        assert gpu_parts.known_step_rate(run) == ["--step_rate", 9000.0]
    assert measured == ["ViT-B/32, 512"]
    run._about = {"card": "another"}
    gpu_parts.known_step_rate(run)
    assert len(measured) == 2


SCRIPT = f"""
import json, os, signal, subprocess, sys, time
if "hang" in sys.argv:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("child", child.pid, flush=True)
print({MARK!r} + json.dumps({{"name": "told before", "value": 1.0}}), flush=True)
if "fail" in sys.argv:
    raise ValueError("what is wrong")
if "stop" in sys.argv:
    while not (os.path.exists('RESULTS') and os.path.getsize('RESULTS')):  # the row is told
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
if "hang" in sys.argv:
    time.sleep(60)
if "--json" in sys.argv:
    open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps({{"seconds": 2}}))
    print("open_clip is skipped: not installed")
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that measures parts made of a small script; returns exit code and results."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("RESULTS", str(tmp_path / "results.jsonl")))
    monkeypatch.setattr(gpu, "ABOUT", 'print("ABOUT " + \'{"card": "none"}\')')

    def measure(**parts: Any) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setattr(gpu, "PARTS", parts)
        path = tmp_path / "results.jsonl"
        code = gpu.main(["--device", "cpu", "--work", str(tmp_path / "work"), "--json", str(path)])
        return code, [json.loads(line) for line in path.read_text().splitlines()]

    measure.script = str(tmp_path / "script.py")  # type: ignore[attr-defined]
    return measure


def test_after_a_failure_it_goes_on_and_ends_with_1(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    figures: list[Any] = []
    code, rows = runs(
        bad=lambda run: run.rows(runs.script, "fail", seconds=30, name="a measurement"),
        good=lambda run: figures.append(run.figures(runs.script, seconds=30, name="another")),
    )
    assert code == 1
    assert [(row["part"], row["name"], row["state"], row["note"]) for row in rows] == [
        ("bad", "told before", "", ""),
        ("bad", "a measurement", "FAILED", "ValueError: what is wrong"),
        ("good", "told before", "", ""),
        ("good", "another: open_clip", "skipped", "not installed"),
    ]
    assert figures == [{"seconds": 2}]
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch("card none, code [0-9a-f]{8}", first)
    assert [line.split()[0] for line in lines] == ["bad", "bad", "good", "good"]
    assert last.startswith("1 failed; results: ")


def test_nothing_failed_is_exit_code_0(runs: Any) -> None:
    assert runs(only=lambda run: run.rows(runs.script, seconds=30))[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "seconds", "code", "notes"),
    [((), 1, 1, ["", "not done after 1 s"]), (("stop",), 30, 128 + signal.SIGTERM, [""])],
)
def test_a_measurement_that_hangs_is_ended_with_what_it_started(
    flags: tuple[str, ...], seconds: int, code: int, notes: list[str], runs: Any, tmp_path: Path
) -> None:
    """At the end of its time, and where a signal ends the script."""
    begin = time.monotonic()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # unheeded, it would end the tests
    try:
        ended, rows = runs(
            slow=lambda run: run.rows(runs.script, "hang", *flags, seconds=seconds, name="a measurement")
        )
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - begin < 20
    assert (ended, [row["note"] for row in rows]) == (code, notes)
    assert [row["name"] for row in rows] == ["told before", "a measurement"][: len(notes)]
    output = (tmp_path / "work" / "logs" / "slow_a_measurement.txt").read_text()
    child = int(output.split("child ")[1].split()[0])
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("its own process is still there")


def test_a_part_has_three_minutes(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PART_SECONDS", 4)
    _, rows = runs(late=lambda run: run.rows(runs.script, seconds=30))
    assert [row["note"] for row in rows] == ["no time is left of the part's three minutes"]


def test_a_device_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ABOUT", "raise RuntimeError(f'no {DEVICE}')")  # without importing PyTorch
    assert gpu.main(["--device", "cuda:99", "--work", str(tmp_path), "--json", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().out.startswith("FAILED: --device cuda:99 cannot be used: RuntimeError: no cuda:99\n")


@pytest.mark.slow
def test_captions_are_as_long_as_flickrs() -> None:
    captions = gpu_data.drawn_captions(4000)
    tokens, _ = tokenize(captions)
    lengths = (tokens != 0).sum(1)
    assert lengths.tolist() == [len(caption.split()) + 2 for caption in captions]
    assert lengths.float().mean().item() == pytest.approx(14.1, abs=0.3)
    assert Counter(lengths.tolist()).keys() <= gpu_data.LENGTHS.keys()
    assert len(set(captions)) > 0.99 * len(captions)
    assert captions == gpu_data.drawn_captions(4000)


def test_images_are_made_once_and_all_differ(tmp_path: Path) -> None:
    index = gpu_data.make_jpegs(tmp_path, 6, size=(64, 48))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "jpegs_64x48").iterdir()}
    assert len({path.read_bytes() for path in before}) == len(before) == 6
    more = gpu_data.make_jpegs(tmp_path, 250, size=(64, 48))  # so many that several processes share the work
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    assert (len(ImageTextDataset(index)), len(ImageTextDataset(more))) == (6, 250)
    assert len({path.read_bytes() for path in (tmp_path / "jpegs_64x48").iterdir()}) == 250


def test_the_decoder_is_measured_against_exact_pixels(tmp_path: Path) -> None:
    paths = gpu_runs.paths_of(gpu_data.make_jpegs(tmp_path, 6, size=(64, 48)))
    rate, mean, largest = gpu_runs.decoded_on(torch.device("cpu"), paths)  # torchvision's stands in for the GPU's
    assert rate > 0
    assert 0 <= mean < 1
    assert mean <= largest < 50


def test_without_a_decoder_its_part_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_runs.main(["decode_gpu", "--device", "cpu", "--quick", "--work", str(tmp_path)]) == 0
    row = rows_of(capsys.readouterr().out)["--decode gpu"]
    assert (row.verdict, row.note) == ("skipped", "it needs a CUDA device, not cpu")


def test_the_rate_of_a_run_is_that_of_its_later_epochs() -> None:
    log = (
        "INFO epoch 1/3, step 10/60: loss 3.466, rates head 1e-05, 10 pairs/s, 0:00:10 left\n"
        "INFO epoch 2/3, step 20/60: loss 3.466, rates head 1e-05, 100 pairs/s, 0:00:10 left\n"
        "INFO epoch 3/3, step 40/60: loss 3.466, rates head 1e-05, 300 pairs/s, 0:00:10 left\n"
    )
    assert gpu_runs.rate_of(log) == pytest.approx(150)  # as many pairs at either speed
    with pytest.raises(RuntimeError, match="no line"):
        gpu_runs.rate_of(log.splitlines()[0])


def run_here(self: gpu.Runner, log: str, arguments: Sequence[str], *, seconds: float) -> tuple[list[str], str | None]:
    """Stand in for `Runner._run`: a script runs in this process, which has imported PyTorch, and its model is tiny."""
    script, *flags = arguments
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        if Path(script).stem != "gpu_runs":  # which starts `train.py`
            patch.setitem(ARCHITECTURES, gpu_parts.SMALL, replace(SMALL_VIT, name=gpu_parts.SMALL))
        code = importlib.import_module(f"benchmarks.{Path(script).stem}").main(flags)
    lines = printed.getvalue().splitlines()
    for row in filter(None, map(told, lines)):
        self.tell(row)
    return lines, None if code == 0 else f"exit code {code}"


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(gpu.Runner, "look", lambda _: True)
    monkeypatch.setattr(gpu.Runner, "_run", run_here)
    path = tmp_path / "results.jsonl"
    code = gpu.main(["--device", "cpu", "--quick", "--work", str(tmp_path / "work"), "--json", str(path)])
    assert (code, [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]) == (0, [])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(gpu_parts.PARTS)
    assert {row["note"] for row in rows if row["state"]} == {"needs CUDA"}
    measured = {row["part"] for row in rows if row["value"] is not None}
    assert measured == gpu_parts.PARTS.keys() - {"memory", "kinds", "decode_gpu"}


@pytest.mark.slow
def test_a_part_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--quick", "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [*command, "--json", str(path), "losses"], env=os.environ | {"PYTHON": sys.executable}, text=True, check=False,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {version('torch')}" in done.stdout.splitlines()[0]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["part"] for row in rows} == {"losses"}
    assert any(row["value"] is not None for row in rows)
