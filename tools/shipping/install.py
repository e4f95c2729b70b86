"""Installs a released bundle from a URL, completely or not at all.

Uses MONAI's functions to download, check the hash and unpack inside the folder; the command
`python -m monai.bundle download` checks no hash, and leaves an incomplete bundle after a broken archive.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from zipfile import ZipFile

from monai.apps.utils import download_url, extractall

from tools.common.text import bytes_text

TIMEOUT = 60  # seconds without a byte
LARGEST_EXPANSION = 100  # of an archive; a bundle's weights are hardly compressed, and its texts at most tenfold


class InstallError(ValueError):
    """The bundle was not installed; nothing is left of it."""


def install(url: str, sha256: str, bundle_dir: str) -> None:
    """Download a bundle, check it, and install it.

    Args:
        url: URL of the zip file that `python -m tools release` wrote.
        sha256: SHA-256 of the file, as printed by `release`.
        bundle_dir: folder in which the bundle's folder is created.

    Raises:
        InstallError: the download failed, the file has another hash or is not an archive of one bundle, or the bundle
            exists already.
        OSError: the folder is not writable.
    """
    folder = Path(bundle_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the last step is only a rename
    with tempfile.TemporaryDirectory(prefix=".installing_", dir=folder) as temporary:
        archive, aside = Path(temporary, "bundle.zip"), Path(temporary, "unpacked")
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)  # MONAI's download has none
        try:
            download_url(url, archive, hash_val=str(sha256).lower(), hash_type="sha256")
            _check_expansion(archive)
            extractall(archive, aside, has_base=False)
        except Exception as error:  # of urllib, http, zipfile, zlib and MONAI
            raise InstallError(f"{url}: {error}") from error
        finally:
            socket.setdefaulttimeout(before)
        found = sorted(path.name for path in aside.glob("*"))
        if len(found) != 1 or found[0].startswith(".") or not (aside / found[0] / "configs/metadata.json").is_file():
            raise InstallError(f"{url}: holds {found}, expected the folder of one bundle, with configs/metadata.json")
        target = folder / found[0]
        if target.exists():
            raise InstallError(f"{target}: exists already, expected to install there; move it away first")
        (aside / found[0]).rename(target)
    print(f"installed {target}")


def _check_expansion(archive: Path) -> None:
    with ZipFile(archive) as members:
        claimed = sum(member.file_size for member in members.infolist())
    if claimed > LARGEST_EXPANSION * archive.stat().st_size:
        raise InstallError(
            f"unpacks to {bytes_text(claimed)} from {bytes_text(archive.stat().st_size)}, expected a bundle"
        )
