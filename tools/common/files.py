"""Whole or absent: files that are complete on the disk before they have their names."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tools.common.text import bytes_text


class NotWrittenError(OSError):
    """A file that cannot be written; what was there before is still there."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` if the block ends without an error.

    The file is on the disk before it has its name, so that neither a kill nor a power failure leaves half a file.
    Creates the folder if it is missing. The temporary name keeps the suffix, which selects the writer's format.

    Raises:
        NotWrittenError: the file cannot be written; the message says how much space is free.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        places = (str(temporary), str(path.parent))
        own = temporary.exists() if error.filename is None else str(error.filename) in places
        if isinstance(error, NotWrittenError) or not own:  # of a file that is written together with this one, or read
            raise
        raise NotWrittenError(
            f"{path}: not written: {error.strerror or error}; {bytes_text(disk_room(path.parent))} are free in "
            f"{path.parent.absolute()}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows and some network disks cannot
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of writers that were killed. Nothing else may be writing to the folder."""
    for path in Path(folder).glob(".*"):
        if re.match(r"\.\d+\..", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_tensors(path: Path, content: Any) -> None:
    """`torch.save` whose error on a full disk is an `OSError`, as that of every other writer."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def disk_room(folder: str | Path, keep_free: float = 0.0) -> int:
    """Bytes that can be written to the disk of a folder, which may not exist yet, if a fraction of it is kept free."""
    folder = Path(folder).absolute()
    disk = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists()))
    return max(0, int(disk.free - keep_free * disk.total))


def write_json(path: str | Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
