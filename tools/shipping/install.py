"""Installs a released bundle from a URL, completely or not at all.

Uses MONAI's functions to download, check the hash and unpack inside the folder; the command
`python -m monai.bundle download` checks no hash, and leaves an incomplete bundle after a broken archive.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

from monai.apps.utils import download_url, extractall

TIMEOUT = 60  # seconds without a byte


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
            extractall(archive, aside, has_base=False)
        except Exception as error:  # of urllib, http, zipfile, zlib and MONAI
            raise InstallError(f"{url}: {error}") from error
        finally:
            socket.setdefaulttimeout(before)
        found = sorted(path.name for path in aside.glob("*"))
        if len(found) != 1 or not (aside / found[0] / "configs/metadata.json").is_file():
            raise InstallError(f"{url}: holds {found}, expected the folder of one bundle, with configs/metadata.json")
        target = folder / found[0]
        if target.exists():
            raise InstallError(f"{target}: exists already, expected to install there; move it away first")
        (aside / found[0]).rename(target)
    print(f"installed {target}")
