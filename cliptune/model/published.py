"""OpenAI's published weights: found on this machine, else fetched from a mirror, from OpenAI or from a model hub."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from cliptune.runtime.messages import one_line

logger = logging.getLogger(__name__)

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
HUB_FILE = "open_clip_model.safetensors"
"""Both towers. In timm's repositories `model.safetensors` is the image tower alone."""
ANSWER_SECONDS = 8.0
"""Until a source counts as one that does not answer; together with the imports ten seconds."""
SILENCE_SECONDS = 10.0
"""Without a byte until a download counts as broken."""


ARCHIVES = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
"""OpenAI's own files, `<SHA-256>/<file>` below their address or a mirror's."""
HUB_REPOS = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
}
"""The same weights on the Hugging Face Hub, by timm's names (as in open_clip's table of pretrained models)."""
TRANSFORMERS_REPOS = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
"""The same by the names of transformers, which many have in their cache. There are no ResNets."""


def published_weights(name: str, *, cache_dir: Path | None = None) -> Path:
    """Find a model's weights on this machine, or download them.

    Looked for without any network: OpenAI's archive in `cache_dir`, then the cache of `huggingface_hub`. Asked for:
    `CLIP_MIRROR` (a base address with OpenAI's files at `<SHA-256>/<file>`), OpenAI, the Hugging Face Hub.

    Args:
        name: of a model in `ARCHIVES`.
        cache_dir: where OpenAI's archives lie; None: `~/.cache/clip`, as in OpenAI's own code.

    Raises:
        ValueError: nothing was published under that name.
        OSError: they cannot be had; says why, what to fetch from where and where to put it.
    """
    if name not in ARCHIVES:
        raise ValueError(f"{name} has no published weights; try --pretrained none, which starts from random ones")
    sha256, file_name = ARCHIVES[name].split("/")
    folder = _archive_folder() if cache_dir is None else cache_dir
    path = None if folder is None else folder / file_name
    if path is not None and _is_readable(path):
        if file_sha256(path) == sha256:
            return path
        logger.warning("%s is damaged or another file (its SHA-256 differs)", path)
    if (cached := cached_weights(name)) is not None:
        logger.info("%s: weights from %s", name, cached)
        return cached
    if path is None and not {"HF_HOME", "HF_HUB_CACHE"} & os.environ.keys():
        raise OSError(
            f"no weights for {name}, and no home folder to keep them in (HOME is {os.environ.get('HOME')!r:.200}): set "
            "HOME to a folder, or name a local file with --pretrained FILE, or start from random weights with "
            "--pretrained none"
        )
    mirror = os.environ.get("CLIP_MIRROR")
    urls = [f"{base.rstrip('/')}/{ARCHIVES[name]}" for base in (mirror, OPENAI_URL) if base]
    archives = [] if path is None else [archive_source(url, path, sha256=sha256) for url in urls]
    try:
        return fetch_first([*archives, hub_source(HUB_REPOS[name])])
    except OSError as error:
        put = "" if path is None else f"Put {file_name} (SHA-256 {sha256}) at {path}, or name"
        raise OSError(
            f"no weights for {name}: {error}. {put or 'Name'} a mirror with CLIP_MIRROR or HF_ENDPOINT, or a local "
            "file with --pretrained FILE, or start from random weights with --pretrained none"
        ) from None


def _archive_folder() -> Path | None:
    """Return where OpenAI's own code keeps its archives; None: there is no home that it could be in."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry of the user database, as in some containers
        return None
    return home / ".cache" / "clip" if home.is_dir() else None


def _is_readable(path: Path) -> bool:
    return os.access(path, os.R_OK)


class Source(NamedTuple):
    """One place to fetch a file from."""

    name: str
    ask: Callable[[float], object]
    """Raises if nobody answers within some seconds; name look-ups may take longer."""
    fetch: Callable[[], Path]
    """Fetches the file and returns where it is, whole; raises if that fails."""


def fetch_first(sources: Sequence[Source], *, answer_seconds: float = ANSWER_SECONDS) -> Path:
    """Fetch from the first source that can; where none answers, all of them together take `answer_seconds`.

    Raises:
        OSError: none can; says why for each of them.
    """
    # All are asked at once, in threads, since a name look-up has no time limit of its own. They are daemons: one that
    # hangs does not hold up the end of the program.
    answers = [_in_background(partial(source.ask, answer_seconds)) for source in sources]
    deadline = time.monotonic() + answer_seconds
    reasons = []
    for source, answer in zip(sources, answers, strict=True):
        try:
            answer.result(max(deadline - time.monotonic(), 0))
        except (FutureTimeoutError, TimeoutError):
            reasons.append(f"{source.name} cannot be had (no answer within {answer_seconds:g} s)")
            continue
        except Exception as error:  # of several HTTP libraries
            reasons.append(f"{source.name} cannot be had ({_reason(error)})")
            continue
        logger.info("fetching the weights from %s", source.name)
        try:
            return source.fetch()
        except Exception as error:
            reasons.append(f"{source.name} cannot be had ({_reason(error)})")
    raise OSError("; ".join(reasons))


def archive_source(url: str, path: Path, *, sha256: str, silence_seconds: float = SILENCE_SECONDS) -> Source:
    """Return a file at an address as a source; it stands at `path` only once it is whole and has its SHA-256."""

    def ask(seconds: float) -> None:
        with suppress(urllib.error.HTTPError):  # an answer; what it means, the download will say
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()

    def fetch() -> Path:
        import torch.hub  # noqa: PLC0415  (only where weights are fetched)

        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(silence_seconds):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
        return path

    return Source(url, ask, fetch)


def hub_source(repo: str, file_name: str = HUB_FILE) -> Source:
    """Return a file on the Hugging Face Hub as a source; it comes into the cache that other tools share.

    `huggingface_hub` resumes and tries again; its settings count (`HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, ...).
    """
    from huggingface_hub import (  # noqa: PLC0415  (only where weights are fetched)
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    def ask(seconds: float) -> None:
        get_hf_file_metadata(hf_hub_url(repo, file_name), timeout=seconds)

    def fetch() -> Path:
        # a file that is in the cache all the same is damaged there, and would not be asked for again
        damaged = isinstance(try_to_load_from_cache(repo, file_name), str)
        path = Path(hf_hub_download(repo, file_name, force_download=damaged))
        if not _has_its_sha256(path):
            raise OSError("not the file that the hub describes: its SHA-256 differs")
        return path

    return Source(f"{repo} on the Hugging Face Hub", ask, fetch)


def cached_weights(name: str) -> Path | None:
    """Find a model's intact weights in the cache of `huggingface_hub`, without any network; None: there are none."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  (only where weights are looked for)

    files = [(HUB_REPOS[name], HUB_FILE)]
    if name in TRANSFORMERS_REPOS:
        files += [(TRANSFORMERS_REPOS[name], file_name) for file_name in ("model.safetensors", "pytorch_model.bin")]
    for repo, file_name in files:
        try:
            found = try_to_load_from_cache(repo, file_name)
        except OSError:  # a cache of another user's
            continue
        if isinstance(found, str) and _is_readable(Path(found)):
            if _has_its_sha256(Path(found)):
                return Path(found)
            logger.warning("%s is damaged (its SHA-256 differs)", found)
    return None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _has_its_sha256(path: Path) -> bool:
    """Compare a file with its name in the hub's cache, its SHA-256; where the cache has no links it has another."""
    name = path.resolve().name
    return not re.fullmatch("[0-9a-f]{64}", name) or file_sha256(path) == name


def _in_background(function: Callable[[], object]) -> Future[None]:
    future: Future[None] = Future()

    def run() -> None:
        try:
            function()
            future.set_result(None)
        except Exception as error:  # raised again where the result is awaited
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the time limit of connections whose opener sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: BaseException) -> str:
    """Say in one line what an exception of any library says."""
    response = getattr(error, "response", None)
    if response is not None:  # of the library under huggingface_hub, whose message has several lines
        return f"HTTP {response.status_code}"
    if isinstance(error, urllib.error.HTTPError):
        return " ".join(f"HTTP {error.code} {error.reason}".split())
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    if isinstance(error, http.client.HTTPException):
        return f"no HTTP answer: {one_line(error)}"
    return re.sub(r"^\[Errno -?\d+\] ", "", one_line(error))
