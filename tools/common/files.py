"""Atomic writing of files: a reader never sees an incomplete one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tools.common.text import bytes_text


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` if the block ends without an error.

    Creates the folder if it is missing. The temporary name keeps the suffix, which selects the writer's format.

    Raises:
        OSError: the file cannot be written; the message names it and the room on its disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        own = (
            temporary.exists() if error.filename is None else str(error.filename) in (str(temporary), str(path.parent))
        )
        if error.errno is None or not own:
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)} ({_room_text(path.parent)})", str(path)) from error
    except RuntimeError as error:
        of_torch = any(word in str(error) for word in ("PytorchStreamWriter", "inline_container"))
        if not of_torch or not temporary.exists():
            raise
        raise OSError(f"{path} cannot be written ({_room_text(path.parent)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _room_text(folder: Path) -> str:
    return f"free on the disk of {folder}: {bytes_text(disk_room(folder))}"


def disk_room(folder: str | Path, keep_free: float = 0.0) -> int:
    """Bytes that can be written to the disk of a folder, which may not exist yet, if a fraction of it is kept free."""
    folder = Path(folder).absolute()
    disk = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists()))
    return max(0, int(disk.free - keep_free * disk.total))


def write_json(path: str | Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
