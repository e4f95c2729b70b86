"""Reads compressed data to the end: only there is the checksum that tells damaged data from intact ones.

The usual readers stop where they have as many bytes as they need, and so accept damaged files.
"""

from __future__ import annotations

from isal import isal_zlib

from tools.common.text import bytes_text
from tools.data.kinds import UnfitError

GZIP, ZLIB = 31, 15  # as `wbits` of zlib
GZIP_MAGIC = b"\x1f\x8b"
LARGEST_RATIO = 1032  # of deflate: no compressed data hold more


def inflate_start(data: bytes, size: int, kind: int = GZIP) -> bytes:
    """Decompress at most the first `size` bytes, for a header.

    Raises:
        UnfitError: the data are not of this kind.
    """
    try:
        return isal_zlib.decompressobj(kind).decompress(data, size)
    except isal_zlib.error as error:
        raise UnfitError("cannot be read: it is not compressed as its name says, or damaged") from error


def inflate(data: bytes, most: int, kind: int = GZIP) -> bytes:
    """Decompress one zlib stream, or one or more gzip members, up to and including the checksums behind them.

    Args:
        data: the compressed data.
        most: bytes that the decompressed data may have; no more memory is taken.
        kind: `GZIP` or `ZLIB`.

    Raises:
        UnfitError: a checksum differs, data are missing, or they have more than `most` bytes.
    """
    pieces, size, rest = [], 0, data
    while rest:
        stream = isal_zlib.decompressobj(kind)
        try:
            pieces.append(stream.decompress(rest, most + 1 - size))
        except isal_zlib.error as error:
            raise UnfitError("is damaged: its data cannot be decompressed, or differ from their checksum") from error
        size += len(pieces[-1])
        if size > most:
            raise UnfitError(f"is damaged: its compressed data hold more bytes than its header says, {most}")
        if not stream.eof:
            raise UnfitError(f"is truncated: its compressed data end after {size} bytes, before their checksum")
        rest = stream.unused_data.lstrip(b"\0")  # gzip files may be filled up with zeros
        if rest and kind == ZLIB:
            raise UnfitError(f"is damaged: {len(rest)} bytes follow its compressed data, expected none")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_size(found: int, expected: int) -> None:
    """Refuse voxels that are fewer or more than the header says.

    Raises:
        UnfitError: the numbers of bytes differ.
    """
    if found != expected:
        what = "is truncated" if found < expected else "does not fit its header"
        raise UnfitError(f"{what}: found {found} bytes of voxels, expected {expected}")


def check_claim(claimed: int, stored: int, max_bytes: float, compressed: bool) -> None:
    """Refuse a header that asks for more data than the file can hold, before memory is taken.

    Args:
        claimed: bytes that the header asks for.
        stored: bytes of the file.
        max_bytes: the largest scan that is read.
        compressed: whether the file is compressed.

    Raises:
        UnfitError: the file cannot hold the data, or they are too large.
    """
    if claimed > stored * (LARGEST_RATIO if compressed else 1):
        found = f"{stored} bytes{' of compressed data' * compressed}"
        what = "is truncated" if claimed < 4 * stored or compressed else "does not fit its header"
        raise UnfitError(f"{what}: found {found}, expected {claimed} bytes of voxels")
    if claimed > max_bytes:
        raise UnfitError(
            f"is too large: its header asks for {bytes_text(claimed)}, expected at most {bytes_text(max_bytes)} "
            "(max_scan_gb)"
        )
