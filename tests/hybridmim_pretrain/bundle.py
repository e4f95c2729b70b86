"""The bundle as tests use it: where it is, a tiny network and geometry, and tiny scans."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = "bundles/hybridmim_pretrain"

# UNet; a crop of 2×2×2 regions of 2×2×2 patches
TINY = {
    "unet_features": [4, 4, 8, 8, 16, 4],
    "roi_size": [32, 32, 32],
    "region_size": [16, 16, 16],
    "patch_size": [8, 8, 8],
    "decode_size": [32, 32, 32],
    "batch_size": 2,
    "num_workers": 0,
    "val_fraction": 0.34,
    **{"val_interval": 1, "val_share": 1},
    "checkpoint_interval": 1,
    "log_interval": 1,
}
TINY_INFERENCE = {key: TINY[key] for key in ("unet_features", "roi_size", "region_size", "patch_size", "decode_size")}


def blobs(seed, shape, channels=1):
    """Smooth random structure [*shape] or [*shape, channels], mean 0 and standard deviation 1."""
    noise = np.random.default_rng(seed).standard_normal((*shape, channels))
    smooth = gaussian_filter(noise, (4, 4, 4, 0))
    smooth /= smooth.std()
    return smooth[..., 0] if channels == 1 else smooth


def save_nifti(path, array, spacing=(1, 1, 1.5), orientation="RAS"):
    """The same places in space whatever the orientation in which the file keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag((*spacing, 1.0))
    affine[:3, 3] = -20, 7, 31
    image = nib.Nifti1Image(array, affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    nib.save(image.as_reoriented(turn), path)
    return path


def hounsfield(seed, shape):
    return (blobs(seed, shape) * 400 - 100).astype(np.int16)


def config_files(names, cwd=ROOT):
    """Paths of the configs `train`, `small`, …, relative to the folder in which the command runs."""
    folder = f"{BUNDLE}/configs" if cwd == ROOT else "configs"
    return [f"{folder}/{name}.yaml" for name in names]


def places(folder):
    """Where a run writes, so that nothing lands in the bundle's own folder."""
    return {
        "bundle_root": str(ROOT / BUNDLE),
        "output_dir": str(folder / "out"),
        "ckpt_dir": str(folder / "models"),
    }


def two_and_one(folder, kind):
    """A data list of two scans for training, one batch, and one for validation: for networks that take their time."""
    path = folder / "three.json"
    parts = {"training": (0, 1), "validation": (2,)}
    path.write_text(json.dumps({part: [f"{kind}_{n}.nii.gz" for n in numbers] for part, numbers in parts.items()}))
    return str(path)
