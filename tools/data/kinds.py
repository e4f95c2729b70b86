"""Tells what a file is, by its name and its first bytes, and never opens what is no regular file."""

from __future__ import annotations

import os
import re
import stat
from io import FileIO
from pathlib import Path

EXTENSIONS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh", ".hdr")
DATA = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")  # the voxels of a .mhd, a .nhdr or a .hdr
PREAMBLE = 132  # bytes; the last four are DICM
# without a preamble, a file begins with a tag of the group 2 or 8: explicit (two letters) or implicit (a short length)
BARE_DICOM = re.compile(rb"[\x02\x08]\0.\0([A-Z][A-Z]|.[\0-\x03]\0\0)", re.DOTALL)
SERIES_NAME = re.compile(r"\d[\d.]{0,63}|series-[0-9a-f]{8}")  # last part of the path of one series of a folder


class UnfitError(Exception):
    """A scan is unusable for training; the message says why, and continues its name."""


def is_dicom(folder: Path, name: str) -> bool:
    """Whether a file of the folder is DICOM, by its first bytes."""
    if name.upper() == "DICOMDIR" or name.lower().endswith(DATA[:3]):  # DICOMDIR is a table of contents
        return False
    path = f"{folder}{os.sep}{name}"  # Path takes twice the time for 100,000 files
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            return False
        with FileIO(path) as file:
            start = file.read(PREAMBLE)
    except OSError:
        return False
    return start[PREAMBLE - 4 :] == b"DICM" or BARE_DICOM.match(start) is not None


def dicom_files(folder: Path) -> list[Path]:
    """DICOM files of a folder, without hidden ones, sorted."""
    names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return [folder / name for name in sorted(names) if is_dicom(folder, name)]


def require_regular(path: Path) -> None:
    """Refuse what is no file: a pipe would wait forever, a device has no end.

    Raises:
        UnfitError: it is missing, or a pipe, a socket, a device or a folder.
    """
    if not path.exists():
        raise UnfitError("does not exist")
    if not stat.S_ISREG(path.stat().st_mode):
        raise UnfitError("is a pipe, a socket, a device or a folder, expected a file")


def kind_of(name: str) -> str:
    """Extension of a file, for counts: `.txt`, `.nii.gz`, or `no extension`."""
    match = re.search(r"(\.[a-z]\w{0,9})?\.[a-z]\w{0,9}$", name.lower())
    if match is None:
        return "no extension"
    return match[0] if match[0].endswith(".gz") else f".{match[0].rpartition('.')[2]}"
