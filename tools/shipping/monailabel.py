"""MONAI Label: copies bundles to its `monaibundle` app and starts the server."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
from monai.bundle import ConfigParser

from tools.common.cards import card_path
from tools.common.files import atomic_path
from tools.common.text import first_lines, parse_bool
from tools.data.kinds import UnfitError, dicom_files
from tools.data.loading import open_scan
from tools.data.scans import ScanError
from tools.shipping.release import merge_overlay
from tools.shipping.verify import WEIGHTS
from tools.weights.checkpoints import WeightsError, check_weights

APP = "monaibundle"
# outputs of runs, except model.pt
LEFT_OUT = shutil.ignore_patterns("eval", "cache", "checkpoint_epoch=*.pt", "__pycache__", ".*")
# MONAI Label trains on from model.pt, so that scans must be prepared as its card says
TRAIN_ON = f"pretrained: $@bundle_root + '/{WEIGHTS}'\npreprocessing: as_pretrained\n"


def require_monailabel() -> None:
    """Check that MONAI Label is installed.

    Raises:
        ValueError: it is not installed in the environment of this Python.
    """
    if find_spec("monailabel") is None:
        raise ValueError(f"{sys.executable} has no package monailabel; docs/monailabel.md says how to install it")


def require_bundle(bundle: str | Path) -> Path:
    """Check that MONAI Label can serve a bundle: `model.pt` fits the network of `inference.yaml`; return its folder.

    MONAI Label reads no overlays, and ignores missing and unknown tensors of a checkpoint.

    Raises:
        ValueError: a file is missing.
        WeightsError: the weights belong to another network, for instance that of an overlay.
        CardError: their card is damaged, of a later version, or of other weights.
    """
    folder = Path(bundle).resolve()
    needed = ("configs/metadata.json", "configs/inference.yaml", "configs/train.yaml", WEIGHTS)
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder}: found no {', '.join(missing)}; expected a bundle with its weights")
    parser = ConfigParser()
    parser.read_config(folder / "configs/inference.yaml")
    parser["bundle_root"] = str(folder)
    try:
        check_weights(folder / WEIGHTS, parser.get_parsed_content("network_def"), folder)
    except WeightsError as error:
        raise WeightsError(
            f"{error}. MONAI Label reads no overlays: `hybridmim release --bundle NAME --variant OVERLAY "
            "--weights FILE` writes a bundle that needs none"
        ) from error
    return folder


def add_bundle(bundle: str | Path, app: Path) -> str:
    """Copy a bundle to an app, and return its name; an existing copy is kept, with what it has learnt.

    If the weights have a card, the copy trains on scans that are prepared as it says.

    Raises:
        ValueError: as in `require_bundle`, for the app's copy if it exists.
    """
    name = Path(bundle).resolve().name
    target = app / "model" / name
    if target.exists():
        require_bundle(target)
        return name
    source = require_bundle(bundle)
    part = target.with_name(f".{os.getpid()}.{name}")
    try:
        shutil.copytree(source, part, ignore=LEFT_OUT)
        if card_path(source / WEIGHTS).is_file():
            train = part / "configs/train.yaml"
            train.write_text(merge_overlay(train.read_text(encoding="utf-8"), TRAIN_ON), encoding="utf-8")
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return name


def convert_dicom(studies: str | Path, convert: bool) -> list[Path]:
    """Write the DICOM series in a folder's subfolders as `SUBFOLDER.nii.gz` in it, where there is none yet.

    MONAI Label passes over folders among its studies.

    Args:
        studies: folder of the scans.
        convert: false only tells which are passed over.

    Returns:
        The files that were written.

    Raises:
        ScanError: a series cannot be read; the message names it. What was converted before it stays.
    """
    root = Path(studies)
    targets = {
        folder: root / f"{folder.name}.nii.gz"
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".") and dicom_files(folder)
    }
    new = {folder: target for folder, target in targets.items() if not target.exists()}
    if new and not convert:
        listed = first_lines(folder.name for folder in new)
        print(f"{root}: MONAI Label does not see DICOM in folders; `--convert true` writes NIfTI:\n{listed}")
        return []
    for folder, target in new.items():
        try:
            scan = open_scan(folder)
        except UnfitError as reason:
            raise ScanError(f"{folder}: {reason}") from reason
        with atomic_path(target) as temporary:
            temporary.write_bytes(gzip.compress(nib.Nifti1Image(scan.dataobj, scan.affine).to_bytes(), compresslevel=1))
        print(f"{folder} is written as {target}")
    return list(new.values())


def serve(
    apps_dir: str,
    studies: str,
    *bundles: str,
    port: int = 8000,
    host: str = "127.0.0.1",
    convert: bool = False,
) -> None:
    """Serve scans with MONAI Label: viewers can request segmentations, correct them, and start a training on them.

    Runs until it is interrupted. A bundle that is already in the app is not replaced, and keeps what it has learnt;
    remove its folder from the app to start again from the original.

    Args:
        apps_dir: folder of MONAI Label apps; `monaibundle` is created in it, and the bundles in its `model` folder.
        studies: folder of the scans and of corrected labels (or the address of a DICOMweb server).
        bundles: folders of bundles with `models/model.pt`.
        port: port of the server.
        host: address that the server listens on; 0.0.0.0 allows access from other machines, without a password.
        convert: whether DICOM series in subfolders of `studies` are written to it as NIfTI; MONAI Label does not see
            them.

    Raises:
        ScanError: a DICOM series cannot be read.
        ValueError: MONAI Label is not installed, the folder of scans does not exist, or a bundle cannot be served.
    """
    require_monailabel()
    if not bundles:
        raise ValueError("bundles: found none, expected the folder of at least one")
    if "://" not in studies and not Path(studies).is_dir():
        raise ValueError(f"studies: no such folder: {studies}")
    convert = parse_bool(convert)
    app = Path(apps_dir).resolve() / APP
    label = [sys.executable, "-m", "monailabel.main"]
    for bundle in bundles:  # before anything is written
        copy = app / "model" / Path(bundle).resolve().name
        require_bundle(copy if copy.exists() else bundle)
    if "://" not in studies:
        convert_dicom(studies, convert)
    new = [folder for folder in (app, app.parent) if not folder.exists()]
    try:
        if not app.exists():
            subprocess.run([*label, "apps", "--name", APP, "--download", "--output", str(app.parent)], check=True)
        (app / "model").mkdir(exist_ok=True)
        names = [add_bundle(bundle, app) for bundle in bundles]
    except BaseException:
        for folder in new:  # no half app, which the next start would take for a whole one
            shutil.rmtree(folder, ignore_errors=True)
        raise
    conf = {"models": ",".join(names), "zoo_source": "local", "sam2": "false"}
    options = [part for key, value in conf.items() for part in ("--conf", key, value)]
    command = [*label, "start_server", "--app", str(app), "--studies", studies, *options]
    os.execv(sys.executable, [*command, "--host", host, "--port", str(port)])
