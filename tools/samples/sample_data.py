"""Synthetic CT and MRI volumes with labels, to try every bundle without downloading a data set.

`tools.samples.anatomy` draws the scans; here they are stored, laid out as the data set of each kind is published.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform

from tools.common.files import atomic_path, write_json
from tools.samples.anatomy import (
    ABDOMEN_LABELS,
    BRAIN_LABELS,
    CHANNELS,
    HIPPOCAMPUS_LABELS,
    LIVER_LABELS,
    ORGAN_LABELS,
    SPLEEN_LABELS,
    Case,
    brain_mri,
    ct_abdomen,
    ct_liver,
    ct_organs,
    ct_spleen,
    hippocampus_mri,
)

ORIENTATIONS = ("RAS", "LPS", "LAS", "PSR", "RPI", "ASL")
MARK = ".sample_data"  # file with the kind and seed of a folder, which real data sets do not have


class Kind(NamedTuple):
    """A kind of sample data: its cases and the paths of their files.

    Attributes:
        draw: function that returns image, labels and voxel spacing of a case.
        modality: names of the channels.
        labels: names of the label values.
        image: path of an image, with the placeholder {number} of the case, and with {channel} if every channel has a
            separate file.
        label: path of a label, likewise.
        first: number of the first case.
        orientations: orientations of the cases in turn, because those of real scanners differ.
        dataset_json: whether to write the Decathlon's dataset.json.
        tagged: whether to mark each file as synthetic in its header, because its name is that of a real scan.
    """

    draw: Callable[[np.random.Generator], Case]
    modality: tuple[str, ...]
    labels: dict[int, str]
    image: str
    label: str
    first: int = 1
    orientations: tuple[str, ...] = ORIENTATIONS
    dataset_json: bool = True
    tagged: bool = True


def _decathlon(name: str) -> tuple[str, str]:
    return f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz"


BRATS = "BraTS20_Training_{number:03d}/BraTS20_Training_{number:03d}"
# fmt: off
KINDS = {
    "ct_abdomen": Kind(ct_abdomen, ("CT",), ABDOMEN_LABELS, *_decathlon("ct_abdomen_{number:04d}"),
                       first=0, tagged=False),
    "brain_mri": Kind(brain_mri, CHANNELS, BRAIN_LABELS, *_decathlon("brain_mri_{number:04d}"),
                      first=0, tagged=False),
    "btcv": Kind(ct_abdomen, ("CT",), ABDOMEN_LABELS,
                 "imagesTr/img{number:04d}.nii.gz", "labelsTr/label{number:04d}.nii.gz", dataset_json=False),
    "brats": Kind(brain_mri, CHANNELS, BRAIN_LABELS,
                  BRATS + "_{channel}.nii.gz", BRATS + "_seg.nii.gz", dataset_json=False),
    "liver": Kind(ct_liver, ("CT",), LIVER_LABELS, *_decathlon("liver_{number}"), first=0),
    "spleen": Kind(ct_spleen, ("CT",), SPLEEN_LABELS, *_decathlon("spleen_{number}")),
    "organs": Kind(ct_organs, ("CT",), ORGAN_LABELS, *_decathlon("organs_{number:03d}")),
    "hippocampus": Kind(hippocampus_mri, ("MRI",), HIPPOCAMPUS_LABELS, *_decathlon("hippocampus_{number:03d}"),
                        orientations=("RAS",)),
}
# fmt: on


def _tag(kind: str, seed: int) -> str:
    """Return the mark for the header of files whose names are those of real scans."""
    return f"synthetic {kind}, seed {seed}" if KINDS[kind].tagged else ""


def _save(array: np.ndarray, affine: np.ndarray, orientation: str, tag: str, path: Path) -> None:
    """Save an array in RAS in another orientation; the bytes depend only on the arguments."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = tag
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation)))
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))  # no time of day in it


def _refuse_other_data(folder: Path, kind: str, seed: int) -> None:
    """Raise ValueError if the folder is a file or contains other data than this kind and seed; then mark the folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: got {str(folder)!r}, which is a file, expected a folder")
    mark, content = folder / MARK, f"synthetic {kind}, seed {seed}\n"
    if folder.exists() and any(folder.iterdir()):
        found = mark.read_text(encoding="utf-8") if mark.is_file() else "other data"
        if found != content:
            raise ValueError(
                f"output_dir: {str(folder)!r} holds {found.strip()}, expected nothing or {content.strip()}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(content, encoding="utf-8")


def _write_case(folder: Path, kind: str, index: int, seed: int) -> None:
    """Draw and save the case with an index, from 0."""
    rng = np.random.default_rng([seed, index])
    settings, tag, number = KINDS[kind], _tag(kind, seed), KINDS[kind].first + index
    image, labels, spacing = settings.draw(rng)
    affine = np.diag((*spacing, 1.0))
    affine[:3, 3] = np.round(rng.uniform(-30, 30, 3) - spacing * labels.shape / 2, 2)
    orientation = settings.orientations[(seed + index) % len(settings.orientations)]
    arrays = {settings.label.format(number=number): labels}
    if "{channel}" in settings.image:
        for channel, name in enumerate(settings.modality):
            arrays[settings.image.format(number=number, channel=name)] = image[..., channel]
    else:
        arrays[settings.image.format(number=number)] = image
    for path, array in arrays.items():
        _save(array, affine, orientation, tag, folder / path)


def _describe(folder: Path, kind: str, seed: int, cases: int) -> None:
    """Write dataset.json."""
    settings = KINDS[kind]
    content = {
        "name": f"synthetic {kind}",
        "description": "Drawn by a program, for tests and demonstrations; holds no data of any patient",
        "kind": kind,
        "seed": seed,
        "tensorImageSize": "4D" if len(settings.modality) > 1 else "3D",
        "modality": {str(number): name for number, name in enumerate(settings.modality)},
        "labels": {str(number): name for number, name in {0: "background", **settings.labels}.items()},
        "numTraining": cases,
        "numTest": 0,
        "training": [
            {"image": settings.image.format(number=number), "label": settings.label.format(number=number)}
            for number in range(settings.first, settings.first + cases)
        ],
        "test": [],
    }
    write_json(folder / "dataset.json", content)


def sample_data(output_dir: str, kind: str, cases: int = 4, seed: int = 0) -> None:
    """Write synthetic cases with labels, laid out as a published data set is.

    Kinds:
        ct_abdomen: CT [X, Y, Z] in HU with the 13 organs of BTCV; a Decathlon-style data set (imagesTr,
            labelsTr, dataset.json).
        brain_mri: MRI [X, Y, Z, 4] (t1, t1ce, t2, flair) in scanner units, brain only, with the tumour labels
            1, 2 and 4 of BraTS; Decathlon-style.
        btcv: `ct_abdomen` as imagesTr/img0001.nii.gz and labelsTr/label0001.nii.gz.
        brats: `brain_mri` as a folder for each case with a file for each channel, as in BraTS 2020.
        liver: the abdomen with 1 liver and 2 cancer, as in the Decathlon's Task03_Liver.
        spleen: the abdomen with 1 spleen, as in Task09_Spleen.
        organs: the abdomen in voxels of about 5 mm with 1 liver, 2 spleen, 3 right and 4 left kidney; Decathlon-style.
        hippocampus: crops of MRI at 1 mm with 1 anterior and 2 posterior hippocampus, as in Task04_Hippocampus.

    Sizes, voxel spacings (mm) and orientations differ between cases; hippocampus crops differ only in size. A case
    depends only on the seed and its number: with more cases, the first ones are the same.

    Args:
        output_dir: folder to write to; it may contain an earlier run of the same kind and seed.
        kind: one of the kinds above.
        cases: number of cases to write, at least 1.
        seed: random seed, at least 0.

    Raises:
        ValueError: an argument is out of range, or the folder contains other data.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    for name, value, least in (("cases", cases, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}")
    folder = Path(output_dir)
    _refuse_other_data(folder, kind, seed)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:  # the filters of scipy run side by side
        list(pool.map(lambda index: _write_case(folder, kind, index, seed), range(cases)))
    if KINDS[kind].dataset_json:
        _describe(folder, kind, seed, cases)
    print(f"{cases} {kind} cases in {folder}")
