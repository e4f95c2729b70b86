"""Damages real scans in every format, and tells what became of each: `python -m tests.fuzz --files 1000 --seed 0`.

Every file must end as one of these, within 60 seconds and 2 GB:

- refused: with a reason in one sentence, in words of our own;
- right: accepted, with the voxels of the scan that was not damaged;
- literal: accepted, with other voxels, which are those that an independent reader finds in the changed bytes. A format
  without a checksum does not tell a changed voxel, or a changed type, from another scan.
"""

from __future__ import annotations

import argparse
import gzip
import re
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom

from image_files import SHARED, write_dicom, write_itk, write_multiframe
from tools.data.inspection import inspect_scan
from tools.data.loading import open_scan
from tools.data.processes import in_processes

SECONDS, MEMORY = 60.0, 2e9
LIBRARY_WORDS = re.compile(r"Traceback|Error|Exception|0x[0-9a-f]{6}|itk|nrrd\]|codec|object has no|NoneType")
OUTCOMES = ("refused", "right", "literal")

# ------------------------------------------------------------------------------------------------ intact files


def scans() -> dict[str, np.ndarray]:
    """Two real scans, int16: a hippocampus in MR, and a part of an abdominal CT."""
    mr = sorted((SHARED / "Task04_Hippocampus/imagesTr").glob("*.nii.gz"))[0]
    ct = SHARED / "ct_abdomen/ct.nii.gz"
    arrays = {name: np.asarray(nib.load(path).dataobj) for name, path in (("mr", mr), ("ct", ct))}
    return {"mr": arrays["mr"].astype(np.int16), "ct": arrays["ct"][40:88, 30:78, 10:22].astype(np.int16)}


def _nibabel(kind: type, name: str) -> Callable[[Path, np.ndarray], Path]:
    def write(folder: Path, array: np.ndarray) -> Path:
        nib.save(kind(array, np.diag([1.0, 1.5, 2, 1])), folder / name)
        return folder / name

    return write


def _itk(name: str, compression: bool = False) -> Callable[[Path, np.ndarray], Path]:
    return lambda folder, array: write_itk(folder / name, array, compression)


def _detached(folder: Path, array: np.ndarray, compression: bool = False) -> Path:
    data = array.tobytes("F")
    (folder / "x.raw").write_bytes(gzip.compress(data) if compression else data)
    sizes = " ".join(map(str, array.shape))
    (folder / "x.nhdr").write_text(
        f"NRRD0004\ntype: int16\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes}\n"
        f"space directions: (1,0,0) (0,1.5,0) (0,0,2)\nkinds: domain domain domain\nendian: little\n"
        f"encoding: {'gzip' if compression else 'raw'}\nspace origin: (0,0,0)\ndata file: x.raw\n"
    )
    return folder / "x.nhdr"


def _series(folder: Path, array: np.ndarray, bare: bool = False, compressed: bool = False) -> Path:
    """A series of a part of the scan; write_dicom makes 5 slices of 24 rows and 20 columns."""
    write_dicom(folder / "series", 5)
    for path in (folder / "series").iterdir():
        data = pydicom.dcmread(path)
        number = round(data.ImagePositionPatient[2] / 3)
        data.PixelData = np.ascontiguousarray(array[:20, :24, number].T).tobytes()
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        if compressed:
            data.compress(pydicom.uid.RLELossless)
        if bare:
            data.file_meta, data.preamble = pydicom.dataset.FileMetaDataset(), None
        data.save_as(path.with_name(f"s{number:02}.dcm"), implicit_vr=bare, little_endian=True)
        path.unlink()
    return folder / "series"


def _frames(folder: Path, array: np.ndarray) -> Path:
    write_multiframe(folder / "series/a.dcm", array[:20, :24, :8].transpose(2, 1, 0))
    return folder / "series"


FORMATS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "NIfTI": _nibabel(nib.Nifti1Image, "x.nii"),
    "NIfTI, gzip": _nibabel(nib.Nifti1Image, "x.nii.gz"),
    "NIfTI-2": _nibabel(nib.Nifti2Image, "x.nii"),
    "NIfTI-2, gzip": _nibabel(nib.Nifti2Image, "x.nii.gz"),
    "NIfTI pair": _nibabel(nib.Nifti1Pair, "x.hdr"),
    "Analyze": _nibabel(nib.AnalyzeImage, "x.hdr"),
    "MGH, gzip": _nibabel(nib.MGHImage, "x.mgz"),
    "MHA": _itk("x.mha"),
    "MHA, zlib": _itk("x.mha", True),
    "MHD": _itk("x.mhd"),
    "MHD, zlib": _itk("x.mhd", True),
    "NRRD": _itk("x.nrrd"),
    "NRRD, gzip": _itk("x.nrrd", True),
    "NHDR": _detached,
    "NHDR, gzip": lambda folder, array: _detached(folder, array, True),
    "DICOM series": _series,
    "DICOM without preamble": lambda folder, array: _series(folder, array, bare=True),
    "DICOM series, RLE": lambda folder, array: _series(folder, array, compressed=True),
    "DICOM multi-frame": _frames,
}

# ----------------------------------------------------------------------------------------------------- damage

Bytes = Callable[[bytearray, np.random.Generator], bytes]


def _flip(content: bytearray, draw: np.random.Generator, within: int | None = None) -> bytes:
    for place in draw.integers(0, within or len(content), draw.integers(1, 6)):
        content[min(place, len(content) - 1)] ^= 1 << draw.integers(8)
    return bytes(content)


def _place(content: bytearray, draw: np.random.Generator) -> tuple[int, int]:
    return int(draw.integers(len(content))), int(draw.integers(1, 65))


def _zero(content: bytearray, draw: np.random.Generator) -> bytes:
    start, size = _place(content, draw)
    content[start : start + size] = bytes(len(content[start : start + size]))
    return bytes(content)


def _insert(content: bytearray, draw: np.random.Generator) -> bytes:
    start, size = _place(content, draw)
    return bytes(content[:start] + draw.bytes(size) + content[start:])


def _delete(content: bytearray, draw: np.random.Generator) -> bytes:
    start, size = _place(content, draw)
    return bytes(content[:start] + content[start + size :])


def _number(content: bytearray, draw: np.random.Generator) -> bytes:
    """Another value in the header: a word of a text, four bytes of others."""
    head = bytes(content[:400])
    words = list(re.finditer(rb"(?<=[ =:])[-\w./]+", head)) if head[:10].isascii() and b"\n" in head[:40] else []
    if words:
        word = words[draw.integers(len(words))]
        values = (b"0", b"-3", b"3", b"999999", b"4294967296", b"1e30", b"nan", b"%s%s%n 1 3 1", b"LIST", b"/dev/zero")
        values += (b"../x.raw", b"MET_CHAR", b"MET_DOUBLE", b"True", b"", b"short", b"35 51")
        return bytes(content[: word.start()] + values[draw.integers(len(values))] + content[word.end() :])
    value = int(draw.choice([0, 1, 255, 32767, 65535, 2**31 - 1, 2**32 - 1]))
    start = int(draw.integers(0, min(352, len(content)) // 2)) * 2
    content[start : start + 4] = value.to_bytes(4, "little")
    return bytes(content)


BYTES: dict[str, Bytes] = {
    "bits flipped": _flip,
    "bits of the header flipped": lambda content, draw: _flip(content, draw, 352),
    "bytes zeroed": _zero,
    "bytes inserted": _insert,
    "bytes deleted": _delete,
    "truncated": lambda content, draw: bytes(content[: draw.integers(len(content))]),
    "longer": lambda content, draw: bytes(content) + draw.bytes(int(draw.integers(1, 65))),
    "a number changed": _number,
    "empty": lambda content, draw: b"",
}
TAGS = {
    "ImagePositionPatient": ([0, 0, 0], [0, 40, 6], [0, 0, 1e9], []),
    "ImageOrientationPatient": ([0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0.9, 0.436], [0, 0, 0, 0, 0, 0]),
    "PixelSpacing": ([0, 0], [1.5, 3], [-1, 1], []),
    "Rows": (0, 12, 65535),
    "Columns": (0, 40),
    "BitsAllocated": (8, 12, 32),
    "PixelRepresentation": (0,),
    "SamplesPerPixel": (3,),
    "NumberOfFrames": (0, 2, 100000),
    "RescaleSlope": (0, 2, 1e30),
    "RescaleIntercept": (-1024, 1e30),
    "SOPClassUID": ("1.2.840.10008.5.1.4.1.1.88.11",),
    "SeriesInstanceUID": ("1.2.3", "../../x"),
    "ImageType": (["DERIVED", "PRIMARY", "LOCALIZER"], ["ORIGINAL", "PRIMARY", "MOSAIC"]),
}


def _tag(path: Path, draw: np.random.Generator) -> None:
    """Another value of a tag in one file."""
    data = pydicom.dcmread(path, force=True)
    key = list(TAGS)[draw.integers(len(TAGS))]
    setattr(data, key, TAGS[key][draw.integers(len(TAGS[key]))])
    data.save_as(path, enforce_file_format=False)


@dataclass(frozen=True)
class Case:
    """A damaged scan.

    Attributes:
        path: of the scan.
        original: file of the voxels before.
        what: format and damage.
    """

    path: Path
    original: Path
    what: tuple[str, str]


def make_case(folder: Path, number: int, seed: int, arrays: dict[str, np.ndarray]) -> Case:
    """Write a scan and damage one of its files; formats and kinds of damage take turns."""
    draw = np.random.default_rng([seed, number])
    form = list(FORMATS)[number % len(FORMATS)]
    folder.mkdir(parents=True)
    path = FORMATS[form](folder, arrays["ct" if form.startswith("DICOM") or draw.random() < 0.5 else "mr"])
    original = folder.with_suffix(".npy")
    np.save(original, np.asarray(open_scan(path).dataobj))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = files[draw.integers(len(files))]
    kinds = [*BYTES, *["a file missing"] * (len(files) > 1), *["a tag changed"] * 4 * form.startswith("DICOM")]
    kind = kinds[draw.integers(len(kinds))]
    if kind == "a tag changed":
        _tag(file, draw)
    elif kind == "a file missing":
        file.unlink()
    else:
        file.write_bytes(BYTES[kind](bytearray(file.read_bytes()), draw))
    return Case(path, original, (form, kind))


# ---------------------------------------------------------------------------------------------------- judging


def judge(case: dict) -> tuple[str, str]:
    """Read a damaged scan as the product does: its outcome, or what is wrong, and the reason that was given."""
    path, original = case["image"], np.load(case["original"])
    before, began = _memory(), time.monotonic()
    scan = inspect_scan({"image": path}, channels=1)
    took, taken = time.monotonic() - began, _memory() - before
    if took > SECONDS or taken > MEMORY:
        return f"WRONG: {took:.0f} s, {taken / 1e9:.1f} GB", str(scan.problem)
    if scan.problem is not None:
        words = LIBRARY_WORDS.search(scan.problem)
        ours = words is None and "\n" not in scan.problem and len(scan.problem) > 10
        return "refused" if ours else "WRONG: words of a library", scan.problem
    image = open_scan(path)
    found = np.asarray(image.dataobj)
    if found.shape == original.shape and np.array_equal(found, original):
        return "right", ""
    return ("literal", "") if is_literal(Path(path), image) else ("WRONG: other voxels", f"{found.shape}")


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_literal(path: Path, image: nib.Nifti1Image) -> bool:
    """Whether an independent reader finds the same voxels in the changed bytes."""
    found = np.asarray(image.dataobj)
    if path.is_dir():
        return _is_literal_series(path, found, image.affine)
    if path.suffix in (".mha", ".mhd", ".nrrd", ".nhdr"):
        return any(np.array_equal(found.ravel("F"), values.astype(np.float32)) for values in _values(path))
    if path.suffix == ".gz":
        gzip.decompress(path.read_bytes())  # raises if the checksum is wrong
    return np.array_equal(found, np.asarray(nib.load(path).dataobj))


def _is_literal_series(folder: Path, found: np.ndarray, affine: np.ndarray) -> bool:
    """Whether every slice is in the volume, where its own header puts it and with its own scaling."""
    slices = []
    for file in sorted(folder.iterdir()):
        data = pydicom.dcmread(file, force=True)
        if "TransferSyntaxUID" not in data.file_meta:
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        slope, intercept = (float(data.get(key, none)) for key, none in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
        groups = data.get("PerFrameFunctionalGroupsSequence", [None])
        for pixels, group in zip(data.pixel_array.reshape(-1, data.Rows, data.Columns), groups, strict=True):
            place = data if group is None else group.PlanePositionSequence[0]
            x, y, z = map(float, place.ImagePositionPatient)
            slices.append((pixels.T * slope + intercept, (-x, -y, z)))
    places = affine[:3, 3] + np.arange(found.shape[2])[:, None] * affine[:3, 2]
    return len(slices) == found.shape[2] and all(
        any(np.array_equal(found[:, :, n], values.astype(np.float32)) for values, where in slices if near(where, place))
        for n, place in enumerate(places)
    )


def near(place: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two places, mm, are the same but for rounding."""
    return bool(np.linalg.norm(np.subtract(place, other)) <= 0.25)


def _values(path: Path) -> list[np.ndarray]:
    """Values of the last bytes, read as each type that the header could mean by its name."""
    content = path.read_bytes()
    text = content[:2000].decode("latin-1")
    types = {"short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2", "char": "i1", "uchar": "u1", "int": "i4"}
    types |= {"uint": "u4", "float": "f4", "double": "f8", "long": "i4", "ulong": "u4", "long_long": "i8"}
    names = re.findall(r"(?:ElementType = MET_|type: )([\w ]+)", text)
    data = path.with_suffix(".zraw" if path.with_suffix(".zraw").exists() else ".raw")
    data = data.read_bytes() if data.exists() else re.split(rb"LOCAL\n|\n\n", content, maxsplit=1)[-1]
    if "CompressedData = True" in text:
        data = zlib.decompress(data)
    if "encoding: gzip" in text:
        data = gzip.decompress(data)
    orders = "><" if re.search(r"MSB = True|endian: big", text) else "<"
    return [np.frombuffer(data, f"{order}{types[name.lower()]}") for name in names for order in orders]


def run(files: int, seed: int, folder: Path) -> list[tuple[Case, str, str]]:
    """Make so many damaged files, and judge each in a process that may die."""
    arrays = scans()
    cases = [make_case(folder / f"{number:05}", number, seed, arrays) for number in range(files)]
    items = [{"image": str(case.path), "original": str(case.original)} for case in cases]
    judged = []
    for case, verdict in zip(cases, in_processes(judge, items, workers=1), strict=True):
        outcome, reason = verdict if isinstance(verdict, tuple) else ("WRONG: the reader died or hung", verdict)
        judged.append((case, outcome, reason))
    return judged


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts of each format, and everything that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the damaged files")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        judged = run(options.files, options.seed, options.keep or Path(temporary))
    print(f"seed {options.seed}, {options.files} files")
    counts = Counter((case.what[0], outcome) for case, outcome, _ in judged)
    print(f"{'':26}{''.join(f'{outcome:>9}' for outcome in (*OUTCOMES, 'wrong'))}")
    for form in [*FORMATS, "all"]:
        row = [sum(n for (f, o), n in counts.items() if form in (f, "all") and o == outcome) for outcome in OUTCOMES]
        total = sum(n for (f, _), n in counts.items() if form in (f, "all"))
        print(f"{form:26}{''.join(f'{n:9}' for n in (*row, total - sum(row)))}")
    wrong = [judgement for judgement in judged if judgement[1] not in OUTCOMES]
    for case, outcome, reason in wrong:
        print(f"{case.path}: {', '.join(case.what)}: {outcome} ({reason})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
