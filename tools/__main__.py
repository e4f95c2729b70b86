"""`python -m tools COMMAND`: the project's own commands; everything else is `python -m monai.bundle`."""

from __future__ import annotations

import sys

import fire

from tools.check import check
from tools.commands.bundles import bundles
from tools.comparison import compare
from tools.datalist import brats, btcv, msd, pretrain
from tools.figures import curves_figure
from tools.install import install
from tools.monailabel import serve
from tools.release import release
from tools.sample_data import sample_data
from tools.transfer import inspect
from tools.verify import verify

COMMANDS = {
    "bundles": bundles,
    "check": check,
    "compare": compare,
    "datalist": {"pretrain": pretrain, "btcv": btcv, "brats": brats, "msd": msd},
    "figures": curves_figure,
    "install": install,
    "monailabel": serve,
    "release": release,
    "sample_data": sample_data,
    "transfer": {"inspect": inspect},
    "verify": verify,
}

if __name__ == "__main__":
    try:
        fire.Fire(COMMANDS, name="tools")
    except (ValueError, OSError) as error:  # wrong input: its message says all
        sys.exit(f"{type(error).__name__}: {error}")
