"""The stage: what it prints and writes, what is an error, and that a signal ends its page."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from clip_model import CLIPModel
from cliptune.runtime.messages import printable
from search import main, search
from tests.helpers.datasets import make_images

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flags(trained_dir: Path, sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["--checkpoint", str(trained_dir), "--images", str(sample_dir), "--num_workers", "0", "--precision", "fp32"]


def test_queries_get_the_images_of_the_highest_cosines(
    flags: list[str], trained_dir: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = ["a red heart", "none", "ein blauer Kreis"]
    image = sorted((sample_dir / "images").iterdir())[4]
    # words without a flag may stand anywhere
    assert main([queries[0], "--json", *queries[1:], "--query_image", str(image), "--top", "3", *flags]) == 0
    printed = capsys.readouterr()
    answers = json.loads(printed.out)
    assert [answer["query"] for answer in answers] == [*queries, str(image)]
    model = CLIPModel.from_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
    for answer in answers[:3]:
        assert set(answer) == {"query", "results"}
        paths = sorted(sample_dir.glob("images/*.png"))
        with torch.no_grad():
            cosines = model.encode_image(paths) @ model.encode_text(answer["query"])[0]
        scores = dict(zip(map(str, paths), cosines.tolist(), strict=True))
        wanted = sorted(scores.values(), reverse=True)[:3]
        assert [found["score"] for found in answer["results"]] == pytest.approx(wanted, abs=1e-5)
        assert [scores[found["path"]] for found in answer["results"]] == pytest.approx(wanted, abs=1e-5)
    assert answers[3]["results"][0]["path"] == str(image)
    assert answers[3]["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert not Path("results").exists()


def test_the_best_ten_are_printed_and_a_page_is_written(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    query = "<script>alert(1)</script> & \u202e红色"
    assert main([*flags, query]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == printable(query)
    assert len(lines) == 12
    scores = [float(line.split()[0]) for line in lines[1:11]]
    assert scores == sorted(scores, reverse=True)
    assert lines[11] == "written: results/search.html"
    page = Path("results/search.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "红色" in page
    assert page.count("data:image/jpeg;base64,") == 10
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.slow
def test_a_second_search_encodes_nothing(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "a heart"]) == 0
    assert "0 of 60 outputs are cached, 60 to compute" in capsys.readouterr().err
    assert main([*flags, "a circle"]) == 0
    assert "60 of 60 outputs are cached, 0 to compute" in capsys.readouterr().err


@pytest.mark.slow
def test_a_text_that_is_cut_is_said(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "heart " * 90, "--json"]) == 0
    printed = capsys.readouterr()
    assert "1 text is longer than the model's 77 tokens, and cut" in printed.err
    assert len(json.loads(printed.out)) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], 'nothing to look for: give a text ("a red heart"), --query_image FILE, or --serve'),
        (["   "], "an empty text finds nothing"),
        (["a", "--serve"], "serve opens a page"),
        (["a", "--query_image", "nowhere.png"], "--query_image nowhere.png: no such file"),
        (["a", "--query_image", "text.png"], "text.png: cannot be read as an image"),
        (["a", "--images", "nowhere"], "--images nowhere: no such folder"),
        (["a", "--images", "empty"], "--images empty: no image in this folder"),
        (["a", "--images", "text.png"], "--images text.png: a file, where a folder of images is looked through"),
        # told before weights are looked for, which may be a download
        (["a", "--images", "nowhere", "--checkpoint", "ViT-B/33"], "--images nowhere: no such folder"),
        (["a", "--images", "empty", "--checkpoint", "ViT-B/33"], "--images empty: no image in this folder"),
        (["a", "--query_image", "nowhere.png", "--checkpoint", "ViT-B/33"], "--query_image nowhere.png: no such file"),
        (["a", "--checkpoint", "ViT-B/33"], "no such checkpoint: ViT-B/33; did you mean"),
        (["a", "--top", "0"], "--top: expected greater than 0"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    flags: list[str], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("text.png").write_text("no image")
    assert main([*flags, *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]
    assert printed.err.splitlines()[-1].startswith("search.py: error: ")


def test_without_its_packages_the_page_says_how_to_get_them(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "cliptune.search.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([*flags, "--serve"]) == 2
    assert capsys.readouterr().err == "search.py: error: --serve needs uvicorn: pip install starlette uvicorn\n"


@pytest.mark.slow
def test_the_function_finds_what_the_stage_finds(
    flags: list[str], trained_dir: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = CLIPModel.from_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth").train()
    image = sorted((sample_dir / "images").iterdir())[4]
    found = search(model, sample_dir, "a red heart", images=image, top=3)
    assert model.training
    flags = [*flags, "a red heart", "--top", "3", "--precision", "auto"]
    assert main([*flags, "--query_image", str(image), "--json"]) == 0
    printed = capsys.readouterr()
    assert found.to_dicts() == json.loads(printed.out)
    assert "60 of 60 outputs are cached" in printed.err
    assert main(flags) == 0
    assert str(search(model, sample_dir, ["a red heart"], top=3)) in capsys.readouterr().out


def test_what_is_found_shows_as_a_table(trained_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<b>images</b>"
    make_images(folder, "a.png", "<i>.png")
    model = CLIPModel.from_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
    found = search(model, folder, ["<script>alert(1)</script>", "b"], images=folder / "a.png", cache_dir=tmp_path)
    table = found._repr_html_()
    assert table.count("<tr>") == 3
    assert table.count("<td") == 6
    assert table.count("data:image/jpeg;base64,") == 7
    assert not any(tag in table for tag in ("<script", "<i>", "<b>"))
    assert "&lt;i&gt;.png" in table
    (folder / "a.png").unlink()
    assert "cannot be read any more" in found._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to look for"),
        ({"texts": ["a", " "]}, "an empty text finds nothing"),
        ({"texts": "a", "top": 0}, "top must be 1 or more, got 0"),
    ],
)
def test_a_search_for_nothing_is_an_error(
    arguments: dict[str, Any], message: str, trained_dir: Path, tmp_path: Path
) -> None:
    model = CLIPModel.from_checkpoint(trained_dir / "model-checkpoint" / "best_model.pth")
    with pytest.raises(ValueError, match=message):
        search(model, tmp_path, **arguments)


@pytest.fixture
def page(trained_dir: Path, tmp_path: Path, no_proxy: None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A page in a process of its own, and its address."""
    make_images(tmp_path / "images", *(f"{number}.png" for number in range(5)))
    command = [sys.executable, str(ROOT / "search.py"), "--checkpoint", str(trained_dir), "--images", "images"]
    process = subprocess.Popen(
        [*command, "--serve", "--port", "0"], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().split()[0]
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_ctrl_c_ends_the_page_at_once(page: tuple[subprocess.Popen[str], str]) -> None:
    process, address = page
    assert address.startswith("http://127.0.0.1:")
    with httpx.Client() as client:  # its connection stays open
        assert client.get(f"{address}search?query=a").status_code == 200
        # an upload that goes on for ever is broken off
        with pytest.raises(httpx.HTTPError):
            client.post(f"{address}search", content=(bytes(10**6) for _ in range(400))).raise_for_status()
        assert client.get(f"{address}search?query=b").status_code == 200
        port = int(address.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as upload:  # which breaks off
            upload.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n123")
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert b"400" in other.recv(100)
        assert client.get(f"{address}search?query=c").status_code == 200
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "search.py: stopped by SIGINT"
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_before_anything_is_encoded(page: tuple[subprocess.Popen[str], str]) -> None:
    port = page[1].rstrip("/").rpartition(":")[2]
    command = [sys.executable, str(ROOT / "search.py"), "--checkpoint", "ViT-B/32", "--serve", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"search.py: error: --port {port}: Address already in use; try another one")
