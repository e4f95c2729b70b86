"""`hybridmim pretrain|finetune|evaluate|segment`: writes the `python -m monai.bundle run …` command, and runs it.

Imports little, and nothing slow, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.common.text import command_text

BUNDLES = Path("bundles"), Path(__file__).resolve().parents[2] / "bundles"
DEFAULTS = ("unet", "hybridmim")  # need no overlay


class Run(NamedTuple):
    """A command.

    Attributes:
        text: what it does.
        run: run ID of the config.
        configs: first and last config file; overlays come between.
        bundle: default bundle.
    """

    text: str
    run: str
    configs: tuple[str, ...]
    bundle: str | None = None


RUNS = {
    "pretrain": Run("Pre-train a network on unlabelled scans.", "training", ("train",), "hybridmim_pretrain"),
    "finetune": Run("Train a segmentation bundle on labelled scans.", "training", ("train",)),
    "evaluate": Run(
        "Measure the weights of a run on its validation or test cases.", "evaluating", ("train", "evaluate")
    ),
    "segment": Run("Segment a folder of scans.", "inferring", ("inference",)),
}


def parser(name: str) -> argparse.ArgumentParser:
    """The options of a command; every other one is passed on."""
    run = RUNS[name]
    options = argparse.ArgumentParser(
        prog=f"hybridmim {name}",
        description=run.text,
        epilog="Every other `--KEY VALUE` is passed on unchanged; the bundle's docs/README.md lists the keys.",
        allow_abbrev=False,
    )
    options.add_argument("--data", required=True, metavar="FOLDER", help="the scans (dataset_dir)")
    weights = "" if name == "segment" else "; the weights are in its subfolder models"
    options.add_argument("--out", required=True, metavar="FOLDER", help=f"everything that is written{weights}")
    options.add_argument(
        "--bundle",
        required=run.bundle is None,
        default=run.bundle,
        help=f"name (btcv, hybridmim_btcv_seg) or folder{f'; {run.bundle} if not given' if run.bundle else ''}",
    )
    options.add_argument("--network", help="unet (default), swin_unetr, vit (pre-training) or unetr (segmentation)")
    options.add_argument("--method", help="of pre-training: hybridmim (default), mae, simmim or simclr")
    options.add_argument("--small", action="store_true", help="a small network and few steps, for a laptop")
    options.add_argument(
        "--overlay", action="append", default=[], metavar="NAME", help="another config of the bundle (mri), or a file"
    )
    return options


def build(name: str, arguments: Sequence[str]) -> list[str]:
    """The words of the command that `hybridmim NAME ARGUMENTS` runs.

    Raises:
        ValueError: there is no such bundle, or it has no such overlay.
        SystemExit: status 2, wrong options; status 0, after `--help`.
    """
    options, passed_on = parser(name).parse_known_args(arguments)
    run, bundle = RUNS[name], bundle_folder(options.bundle)
    chosen = [word for word in (options.method, options.network) if word not in (None, *DEFAULTS)]
    first, *last = run.configs
    names = [first, *options.overlay, *chosen, *(["small"] if options.small else []), *last]
    configs = [_config(bundle, overlay) for overlay in names]
    words = ["python", "-m", "monai.bundle", "run", run.run, "--config_file"]
    words += [configs[0] if len(configs) == 1 else f"[{','.join(map(repr, configs))}]"]
    words += ["--bundle_root", bundle.as_posix(), "--dataset_dir", options.data, "--output_dir", options.out]
    if name != "segment":
        words += ["--ckpt_dir", f"{options.out}/models"]
    return words + passed_on


def start(name: str, arguments: Sequence[str]) -> None:
    """Print the command and become it.

    Raises:
        ValueError: as in `build`.
        SystemExit: as in `build`; on Windows also with the status of the command.
    """
    words = build(name, arguments)
    print(command_text(words), flush=True)
    words[0] = sys.executable
    if os.name == "posix":  # signals reach the run itself
        os.execv(words[0], words)
    sys.exit(subprocess.call(words))


def bundle_folder(name: str) -> Path:
    """The folder of a bundle, relative if it lies in `bundles` of the working directory.

    Args:
        name: `btcv`, `hybridmim_btcv_seg`, or a folder.

    Raises:
        ValueError: there is none.
    """
    inside = [parent / form.format(name) for parent in BUNDLES for form in ("{}", "hybridmim_{}_seg", "hybridmim_{}")]
    for folder in (Path(name), *inside):
        if (folder / "configs/inference.yaml").is_file():
            return folder
    known = sorted({path.parents[1].name for parent in BUNDLES for path in parent.glob("*/configs/inference.yaml")})
    raise ValueError(f"--bundle: found {name}, expected the folder of a bundle or one of {', '.join(known)}")


def _config(bundle: Path, name: str) -> str:
    """The file of a config of the bundle, or of one that is given by its path."""
    if name.endswith((".yaml", ".json")):
        if Path(name).is_file():
            return name
        raise ValueError(f"--overlay: {name}: no such file")
    path = bundle / "configs" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ValueError(f"{bundle.name} has no configs/{name}.yaml, expected one of {', '.join(known)}")
    return path.as_posix()
