"""Puts a released bundle from a URL into place, whole or not at all.

`python -m monai.bundle download` checks no hash and leaves half a bundle after a broken archive.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import urlopen

CHUNK = 2**20  # bytes
TIMEOUT = 60  # seconds without a byte
SCHEMES = ("http", "https", "file")


class InstallError(ValueError):
    """A bundle that was not installed; nothing is left of it."""


def install(url: str, sha256: str, bundle_dir: str) -> None:
    """Download a bundle, check it, and put it into place at once.

    Args:
        url: of the zip file that `python -m tools release` made: http, https or file.
        sha256: its SHA-256, as printed by `release`.
        bundle_dir: folder to put the bundle's own folder into.

    Raises:
        InstallError: the download broke off, is not the file with this hash, or is no archive of one bundle; or the
            bundle is there already.
        OSError: the server cannot be reached, or the folder cannot be written.
    """
    expected = str(sha256).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise InstallError(f"--sha256: found {sha256}, expected 64 hexadecimal digits")
    if urlsplit(url).scheme not in SCHEMES:
        raise InstallError(f"{url}: expected a URL that begins with {', '.join(SCHEMES)}")
    folder = Path(bundle_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the last step is a mere renaming
    with tempfile.TemporaryDirectory(prefix=".installing_", dir=folder) as temporary:
        archive, aside = Path(temporary, "bundle.zip"), Path(temporary, "unpacked")
        found = _download(url, archive)
        if found != expected:
            raise InstallError(f"{url}: its SHA-256 is {found}, expected {expected}")
        name = _unpack(url, archive, aside)
        target = folder / name
        if target.exists():
            raise InstallError(f"{target}: exists already, expected to install there; move it away first")
        (aside / name).rename(target)
    print(f"installed {target}")


def _download(url: str, archive: Path) -> str:
    """Store what is at the URL; return its SHA-256."""
    digest, size = hashlib.sha256(), 0
    try:
        with urlopen(url, timeout=TIMEOUT) as response, archive.open("wb") as file:
            announced = response.headers.get("Content-Length")
            while chunk := response.read(CHUNK):
                digest.update(chunk)
                size += file.write(chunk)
    except HTTPException as error:
        raise InstallError(f"{url}: the download broke off ({type(error).__name__})") from error
    if announced is not None and size != int(announced):
        raise InstallError(f"{url}: the download broke off, found {size} bytes, expected {announced}")
    return digest.hexdigest()


def _unpack(url: str, archive: Path, aside: Path) -> str:
    """Unpack an archive of one bundle; return the name of its folder."""
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            name = _checked_name(url, members)
            size, free = sum(member.file_size for member in members), shutil.disk_usage(archive.parent).free
            if size > free:
                raise InstallError(f"{url}: needs {size} bytes, found {free} free in {archive.parent.parent}")
            content.extractall(aside)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InstallError(f"{url}: is not a zip file that can be unpacked: {error}") from error
    return name


def _checked_name(url: str, members: list[zipfile.ZipInfo]) -> str:
    """Name of the one folder that all members lie in.

    Raises:
        InstallError: a member leads elsewhere or is a link, or the folder is not that of a bundle.
    """
    tops = set()
    for member in members:
        path = PurePosixPath(member.filename)
        unsafe = path.is_absolute() or ".." in path.parts or not path.parts or re.search(r"[\\:\0]", member.filename)
        if unsafe or stat.S_ISLNK(member.external_attr >> 16):
            raise InstallError(f"{url}: holds {member.filename!r}, expected files inside one folder, and no links")
        tops.add(path.parts[0])
    if len(tops) != 1:
        raise InstallError(f"{url}: holds {sorted(tops)}, expected the folder of one bundle")
    name = tops.pop()
    if f"{name}/configs/metadata.json" not in {member.filename for member in members}:
        raise InstallError(f"{url}: has no {name}/configs/metadata.json, expected a bundle")
    return name
