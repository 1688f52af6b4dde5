"""Where a run's training JPEGs are decoded."""

from __future__ import annotations

import logging

import torch

from cliptune.preprocess.jpeg_decoder import JpegDecoder, decoder_issue
from cliptune.settings import Config

logger = logging.getLogger(__name__)


def require_decoder(config: Config, device: torch.device) -> None:
    """Refuse to begin a run whose JPEGs cannot be decoded where its settings say.

    Raises:
        ValueError: `--decode gpu`, and the device decodes none.
    """
    issue = decoder_issue(device) if config.data.decode == "gpu" else None
    if issue is not None:
        raise ValueError(f"--decode gpu: {issue}; try --decode cpu")


def gpu_decoder(config: Config, device: torch.device, *, reads_images: bool) -> JpegDecoder | None:
    """Return what decodes a run's JPEGs in place of its workers, or None; say in one line what is chosen.

    A run that is resumed keeps its settings, and may have moved to a device that decodes none: it goes on.

    Args:
        config: of the run.
        device: that it is on.
        reads_images: training decodes images at all, and not only the caches of its frozen tower.
    """
    if config.data.decode == "cpu":
        return None
    if not reads_images:
        logger.info("--decode gpu: training decodes no image, since its frozen tower's outputs are cached (exactly)")
        return None
    issue = decoder_issue(device)
    if issue is not None:
        logger.warning("--decode gpu: %s; this run goes on with the CPU's pixels, which differ a little", issue)
        return None
    logger.info(
        "--decode gpu: plain JPEGs of the training are decoded by %s, and differ a little; all that is evaluated or "
        "cached is decoded exactly", device,
    )  # fmt: skip
    return JpegDecoder(device)
