"""Memory and time of segmenting a CT with the BTCV bundle: as it is, and with all classes taken back at once.

    python -m benchmarks.segment_large_ct                       # 512×512×700 voxels, as the bundle does it
    python -m benchmarks.segment_large_ct --slices 200 --both   # a smaller one, both ways, and their ratio

Both ways run `run inferring` in processes of their own, one after the other, with `small.yaml`'s network at the full
spacing of 1.5×1.5×2.0 mm. "At once" is what most bundles do: softmax, `Invertd` of all classes, `AsDiscreted`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

BUNDLE = Path(__file__).resolve().parents[1] / "bundles/hybridmim_btcv_seg"
CONFIGS = [str(BUNDLE / f"configs/{name}.yaml") for name in ("inference", "small")]
SPACING = [1.5, 1.5, 2.0]
AT_ONCE = [
    {"_target_": "Activationsd", "keys": "pred", "softmax": True},
    {
        "_target_": "Invertd",
        "keys": "pred",
        "orig_keys": "image",
        "transform": "@preprocessing",
        "nearest_interp": False,
    },
    {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
]


def run(folder: Path, at_once: bool) -> None:
    """Segment the scan in `folder`, in this process; print peak memory and time as JSON."""
    parser = ConfigParser()
    parser.read_config(CONFIGS)
    parser.update(
        {
            "bundle_root": str(BUNDLE),
            "dataset_dir": str(folder / "scan"),
            "output_dir": str(folder / "out"),
            "ckpt_path": str(folder / "model.pt"),
            "spacing": SPACING,
            "roi_size": [96, 96, 96],
        }
    )
    if at_once:
        steps = parser["postprocessing#transforms"]
        parser["postprocessing#transforms"] = AT_ONCE + steps[1:]
    start = time.perf_counter()
    parser.get_parsed_content("evaluator").run()
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # kB on Linux
            }
        )
    )


def prepare(folder: Path, slices: int) -> None:
    """A synthetic CT of 512×512×`slices` voxels of 0.75×0.75×1 mm, and weights at random."""
    (folder / "scan").mkdir()
    rng = np.random.default_rng(0)
    volume = rng.integers(-150, 200, (512, 512, slices), dtype=np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([0.75, 0.75, 1, 1])), folder / "scan/ct.nii.gz")
    parser = ConfigParser()
    parser.read_config(CONFIGS)
    torch.manual_seed(0)
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "model.pt")


def measure(folder: Path, at_once: bool) -> dict[str, float]:
    """Run in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.segment_large_ct", "--child", str(folder)]
    done = subprocess.run(
        [*line, "--at_once"] if at_once else line, capture_output=True, text=True, check=False, env={**os.environ}
    )
    if done.returncode:
        raise SystemExit(
            f"{'at once' if at_once else 'one by one'}: exit status {done.returncode}\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=700)
    parser.add_argument("--both", action="store_true", help="also with all classes at once")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at_once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run(options.child, options.at_once)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.slices)
        results = {"one class after the other": measure(folder, False)}
        if options.both:
            results["all classes at once"] = measure(folder, True)
    print(f"512×512×{options.slices} voxels, 14 classes, {torch.get_num_threads()} threads")
    for kind, found in results.items():
        print(f"{kind:28}{found['peak'] / 1e9:8.2f} GB{found['seconds']:8.0f} s")
    if options.both:
        ours, theirs = results.values()
        peak, seconds = (theirs[key] / ours[key] for key in ("peak", "seconds"))
        print(f"{'at once / one by one':28}{peak:8.2f}   {seconds:9.2f}")


if __name__ == "__main__":
    main()
