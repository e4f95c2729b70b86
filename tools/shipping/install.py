"""Puts a released bundle from a URL into place, whole or not at all.

MONAI downloads it, checks its hash and unpacks it without leading out of the folder; its own command
`python -m monai.bundle download` checks no hash, and leaves half a bundle after a broken archive.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

from monai.apps.utils import download_url, extractall

TIMEOUT = 60  # seconds without a byte


class InstallError(ValueError):
    """A bundle that was not installed; nothing is left of it."""


def install(url: str, sha256: str, bundle_dir: str) -> None:
    """Download a bundle, check it, and put it into place at once.

    Args:
        url: of the zip file that `python -m tools release` made.
        sha256: its SHA-256, as printed by `release`.
        bundle_dir: folder to put the bundle's own folder into.

    Raises:
        InstallError: the server cannot be reached, the download broke off, is not the file with this hash, or is no
            archive of one bundle; or the bundle is there already.
        OSError: the folder cannot be written.
    """
    folder = Path(bundle_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the last step is a mere renaming
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
