"""A file from the network to disk: no long wait for an answer, resumed, checked by SHA-256, in place only when whole.

`urllib` is enough for that, and unlike the library under `huggingface_hub` it is the same for every Python.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

logger = logging.getLogger(__name__)
T = TypeVar("T")

BLOCK_BYTES = 1 << 20
# the second where a repository has no safetensors
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Patience(NamedTuple):
    """How long a download waits, and how often it tries again where that makes sense."""

    answer: float = 8.0
    """Seconds for name look-up, connection and the first line of the answer together."""
    silence: float = 20.0
    """Seconds without a byte until a connection counts as broken."""
    pause: float = 1.0
    """Seconds before a new try; doubles with each that brings nothing."""
    retries: int = 3
    """New tries in a row that may bring nothing."""


class UnavailableError(OSError):
    """A source did not give the file; another may."""


class _BrokenError(UnavailableError):
    """No answer, or none to the end: worth a new try if bytes had come."""


class _TryAgainError(UnavailableError):
    """An answer that asks for a new try."""


def download(url: str, path: Path, *, sha256: str, patience: Patience | None = None) -> None:
    """Fetch a file with a progress bar, check it, and only then put it at `path`.

    What has arrived is kept beside it as `<name>.part`, and the next call goes on from there. Processes that want the
    same file wait for the one that fetches it. `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` are honoured.

    Args:
        url: its address, http or https.
        path: where it shall lie; the folder is made.
        sha256: of the whole file, in hexadecimal.
        patience: how long to wait and how often to try again.

    Raises:
        UnavailableError: no answer in time, refused, broken off for good, or not the file expected.
        OSError: the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        if path.is_file() and file_sha256(path) == sha256:
            return
        with _Part(path.with_name(f"{path.name}.part")) as part:
            _receive_whole(url, part, sha256=sha256, patience=patience or Patience())
        part.path.replace(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("another process is downloading %s; waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Part:
    """The bytes that have arrived, on disk, and their digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a+b", buffering=0)
        self.digest = hashlib.sha256()
        self.size = 0
        self.received = 0
        self.etag: str | None = None
        self.file.seek(0)
        while block := self.file.read(BLOCK_BYTES):
            self.digest.update(block)
            self.size += len(block)
        self.is_leftover = self.size > 0

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.size == 0:
            self.path.unlink()

    def write(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            try:
                written = self.file.write(rest)
            except OSError as error:
                raise OSError(f"{self.path}: {_reason(error)}; what has arrived is kept for the next run") from None
            self.digest.update(rest[:written])
            self.size += written
            self.received += written
            rest = rest[written:]

    def restart(self) -> None:
        self.file.truncate(0)
        self.digest = hashlib.sha256()
        self.size = 0
        self.is_leftover = False


def _receive_whole(url: str, part: _Part, *, sha256: str, patience: Patience) -> None:
    if part.digest.hexdigest() == sha256:
        return
    kind = _receive(url, part, patience)
    if part.is_leftover and part.digest.hexdigest() != sha256:
        logger.warning("%s: what an earlier run left does not belong to this file; starting over", part.path)
        part.restart()
        kind = _receive(url, part, patience)
    if part.digest.hexdigest() != sha256:
        size, found = part.size, part.digest.hexdigest()
        part.restart()
        raise UnavailableError(f"not the file published, removed: {size} bytes ({kind}) of SHA-256 {found}")


def _receive(url: str, part: _Part, patience: Patience) -> str:
    """Receive to the end, trying again where that makes sense; return the content's type."""
    fruitless = 0
    while True:
        before = part.size
        try:
            return _receive_once(url, part, patience)
        except (_BrokenError, _TryAgainError) as error:
            fruitless = 1 if part.size > before else fruitless + 1
            if fruitless > patience.retries or (isinstance(error, _BrokenError) and not part.received):
                raise
            pause = patience.pause * 2 ** (fruitless - 1)
            logger.warning("%s: %s; trying again in %g s from byte %d", url, error, pause, part.size)
            time.sleep(pause)


def _receive_once(url: str, part: _Part, patience: Patience) -> str:
    with _ask(url, part, patience) as response:
        total = _position(part, response)
        if total is not None:
            _check_space(part.path.parent, total - part.size)
        bar = tqdm(total=total, initial=part.size, unit="B", unit_scale=True, desc=part.path.stem, disable=None)
        with bar:
            while block := _next_block(response):
                part.write(block)
                bar.update(len(block))
        if total is not None and part.size < total:
            raise _BrokenError(f"the connection ended after {part.size} of {total} bytes")
        return str(response.headers.get_content_type())


def _ask(url: str, part: _Part, patience: Patience) -> Any:
    """Ask for what is missing; return the answer, its body unread."""
    headers = {"User-Agent": "clip-finetuning-toolkit", "Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
        if part.etag:
            headers["If-Range"] = part.etag
    try:
        request = urllib.request.Request(url, headers=headers)
        opener = urllib.request.build_opener()
        return _answer_within(patience.answer, lambda: opener.open(request, timeout=patience.silence))
    except urllib.error.HTTPError as error:
        if error.code == 416 and part.size:
            part.restart()
            raise _TryAgainError("the server has no such range") from None
        kind = _TryAgainError if error.code >= 500 else UnavailableError
        raise kind(f"HTTP {error.code} {_reason(error)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from None
    except ValueError as error:
        raise UnavailableError(_reason(error)) from None


def _answer_within(seconds: float, ask: Callable[[], T]) -> T:
    """Return what `ask` returns, or raise what it raises, within a time: name look-ups have no limit of their own."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # raised again where the answer is awaited
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except (FutureTimeoutError, TimeoutError):
        raise TimeoutError(f"no answer within {seconds:.1f} s") from None


def _position(part: _Part, response: Any) -> int | None:
    """Bring the part to where the answer starts; return the size of the whole file if it is told."""
    etag = response.headers.get("ETag", "")
    part.etag = etag if etag.startswith('"') else None  # a weak one (W/"...") does not promise the same bytes
    if response.status != 206:
        part.restart()
        length = response.headers.get("Content-Length")
        return int(length) if length and length.isdigit() else None
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if told is None or int(told[1]) != part.size:
        part.restart()
        raise _TryAgainError("the server sent another range than asked for")
    return None if told[2] == "*" else int(told[2])


def _next_block(response: Any) -> bytes:
    try:
        block: bytes = response.read1(BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(f"the connection broke: {_reason(error)}") from None
    return block


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: the download needs {needed / 1e6:.1f} MB more, and {free / 1e6:.1f} MB are free")


def _reason(error: BaseException) -> str:
    """Say in one line what an exception of any library says."""
    if isinstance(error, urllib.error.URLError):
        return _reason(error.reason) if isinstance(error.reason, BaseException) else " ".join(error.reason.split())
    return " ".join(re.sub(r"^\[Errno -?\d+\] ", "", str(error)).split()) or type(error).__name__


def cached_hub_model(repo: str) -> Path | None:
    """Find a model's weights in the cache of `huggingface_hub`, without any network.

    Returns:
        The weights, with their `config.json` beside them; None if they are not there, or damaged.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  (only where weights are looked for)

    for name in HUB_WEIGHTS:
        found = try_to_load_from_cache(repo, name)
        if isinstance(found, str) and Path(found).with_name("config.json").is_file():
            if _has_its_sha256(Path(found)):
                return Path(found)
            logger.warning("%s is damaged (SHA-256 differs)", found)
    return None


def _has_its_sha256(path: Path) -> bool:
    """Compare a file with its name in the cache, the SHA-256; where the cache has no links, it has no such name."""
    name = path.resolve().name
    return not re.fullmatch("[0-9a-f]{64}", name) or file_sha256(path) == name


def download_hub_model(repo: str, *, patience: Patience | None = None) -> Path:
    """Fetch a model's weights and `config.json` into the cache of `huggingface_hub`, checked by SHA-256.

    That library's settings count: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, ...

    Returns:
        The weights, with their `config.json` beside them.

    Raises:
        UnavailableError: no answer in time, refused, broken off for good, or not the file that the hub describes.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (only where weights are fetched)

    try:
        name, sha256 = _find_on_hub(repo, (patience or Patience()).answer)
        hf_hub_download(repo, "config.json")
        for again in (False, True):  # the first time it may be damaged in the cache
            path = Path(hf_hub_download(repo, name, force_download=again))
            found = file_sha256(path)
            if found == sha256:
                return path
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise UnavailableError(f"not the file that the hub describes, removed: SHA-256 {found}, expected {sha256}")
    except UnavailableError:
        raise
    except Exception as error:  # of whichever HTTP library this huggingface_hub uses
        response = getattr(error, "response", None)
        raise UnavailableError(_reason(error) if response is None else f"HTTP {response.status_code}") from None


def _find_on_hub(repo: str, seconds: float) -> tuple[str, str]:
    """Ask which weights a repository has; return file name and SHA-256. The library's own download is more patient."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # noqa: PLC0415  (only where weights are fetched)
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    for name in HUB_WEIGHTS:
        try:
            url = hf_hub_url(repo, name)
            etag = _answer_within(seconds, lambda: get_hf_file_metadata(url, timeout=seconds)).etag  # noqa: B023
        except HfHubHTTPError as error:
            if error.response.status_code == 404:
                continue
            raise
        if not re.fullmatch("[0-9a-f]{64}", etag or ""):
            raise UnavailableError(f"{url}: the answer has no SHA-256, so it is no hub's")
        return name, str(etag)
    raise UnavailableError(f"has no {' or '.join(HUB_WEIGHTS)}")
