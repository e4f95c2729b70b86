"""Checkpoints of a training: written whole or not at all, and the newest that is undamaged is found again."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from tools.common.files import atomic_path, write_tensors

NAME = re.compile(r"checkpoint_epoch=(\d+)(?:_step=(\d+))?\.pt")

logger = logging.getLogger(__name__)


def place(path: Path) -> tuple[int, float] | None:
    """Epoch and step of a checkpoint by its name, to compare; None if it is no checkpoint.

    `checkpoint_epoch=3.pt` was written at the end of epoch 3, `checkpoint_epoch=3_step=170.pt` in that epoch, after
    170 steps of the run.
    """
    found = NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2]) if found[2] else float("inf")) if found else None


def checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints of a folder, the newest first; files with other names are ignored."""
    return sorted(filter(place, Path(folder).glob("checkpoint_epoch=*.pt")), key=place, reverse=True)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that is undamaged, if any; damaged ones are named in a warning."""
    for path in checkpoints(folder):
        if damage := _damage(path):
            _warn(f"{path}: {damage}; the checkpoint before it is used")
        else:
            return path
    return None


def _damage(path: Path) -> str | None:
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()  # by the checksums that torch stores and does not read
    except Exception as error:  # of any kind, by a damaged file
        return f"damaged ({error})"
    return damaged and f"damaged ({damaged} in it does not have the checksum that it was written with)"


@cache  # once, however often a start looks for the newest
def _warn(text: str) -> None:
    logger.warning(text)


def save_checkpoint(folder: str | Path, content: Mapping[str, Any], epoch: int, step: int | None, kept: int) -> Path:
    """Write a checkpoint, then delete the oldest, so that no more than `kept` remain.

    Those of a later place in the training stay: they are damaged, or of another run.

    Args:
        folder: folder to write to.
        content: state dicts.
        epoch: the epoch that has ended, or that the training is in.
        step: number of steps of the run, in the middle of an epoch; None at its end.
        kept: number of checkpoints to keep.

    Raises:
        NotWrittenError: the disk is full, for instance; the checkpoint before is still there.
    """
    path = _path(folder, epoch, step)
    with atomic_path(path) as temporary:
        write_tensors(temporary, dict(content))
    remove_old(folder, epoch, step, kept)
    return path


def remove_old(folder: str | Path, epoch: int, step: int | None, kept: int) -> None:
    """Delete the oldest checkpoints up to a place in the training, so that no more than `kept` of them remain.

    Args:
        folder: folder of the checkpoints.
        epoch: as in `save_checkpoint`.
        step: as in `save_checkpoint`.
        kept: number of checkpoints to keep.
    """
    last = place(_path(folder, epoch, step))
    for old in [path for path in checkpoints(folder) if place(path) <= last][kept:]:
        old.unlink(missing_ok=True)


def _path(folder: str | Path, epoch: int, step: int | None) -> Path:
    return Path(folder, f"checkpoint_epoch={epoch}{'' if step is None else f'_step={step}'}.pt")
