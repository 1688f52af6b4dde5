"""A run's numbers as TensorBoard reads them, in a file that never ends the run."""

from __future__ import annotations

import io
import logging
import os
import platform
import threading
import time
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.image.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

logger = logging.getLogger(__name__)


class Drawing(Protocol):
    """An image that was drawn, with what it shows."""

    @property
    def jpeg(self) -> bytes:
        """The file."""

    @property
    def width(self) -> int:
        """Pixels."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def description(self) -> str:
        """Markdown, which TensorBoard shows beside it."""


class EventFile:
    """Appends numbers and images to a file of TensorBoard's format.

    TensorBoard's own writer has a thread, which dies with a traceback once its folder is removed or the disk is full.
    Here the folder is made again, and after another error a warning says that no more events are written.

    Args:
        folder: where TensorBoard looks for it.
        purge_step: what earlier files there hold of this step and later ones is dropped, as the steps come again.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)  # TensorBoard reads a folder's files in their names' order
        name = f"events.out.tfevents.{seconds:010d}.{platform.node()}.{os.getpid()}.{nanoseconds}"
        self.path, self._failed, self._lock = folder / name, False, threading.Lock()
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a number; `tag`: such as `epoch/val_loss`."""
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))

    def add_image(self, tag: str, drawn: Drawing, step: int) -> None:
        """Write an image of RGB."""
        size = {"width": drawn.width, "height": drawn.height}
        image = Summary.Image(**size, colorspace=3, encoded_image_string=drawn.jpeg)
        metadata = create_summary_metadata(display_name="", description=drawn.description)
        value = Summary.Value(tag=tag, image=image, metadata=metadata)
        self._write(Event(step=step, summary=Summary(value=[value])))

    def _write(self, event: Event) -> None:
        with self._lock:  # images come from another thread
            self._append(event)

    def _append(self, event: Event) -> None:
        if self._failed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            events = [event] if self.path.exists() else [Event(file_version="brain.Event:2"), event]
            with self.path.open("ab") as file:
                file.write(b"".join(map(_record, events)))
        except OSError as error:
            self._failed = True
            logger.warning("no more TensorBoard events are written: %s", error)


def _record(event: Event) -> bytes:
    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
