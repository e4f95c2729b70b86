"""`python -m tools COMMAND`: the project's own commands; everything else is `python -m monai.bundle`."""

from __future__ import annotations

import sys

import fire

from tools.commands.bundles import bundles
from tools.commands.check import check
from tools.commands.compare import compare
from tools.commands.datalist import brats, btcv, msd, pretrain
from tools.commands.new_bundle import new_bundle
from tools.commands.plan import plan
from tools.common.command_line import keep_text
from tools.results.figures import curves_figure
from tools.samples.sample_data import sample_data
from tools.shipping.install import install
from tools.shipping.monailabel import serve
from tools.shipping.release import release
from tools.shipping.verify import verify
from tools.weights.transfer import inspect

COMMANDS = {
    "bundles": bundles,
    "check": check,
    "compare": compare,
    "datalist": {"pretrain": pretrain, "btcv": btcv, "brats": brats, "msd": msd},
    "figures": curves_figure,
    "install": install,
    "monailabel": serve,
    "new_bundle": new_bundle,
    "plan": plan,
    "release": release,
    "sample_data": sample_data,
    "transfer": {"inspect": inspect},
    "verify": verify,
}

if __name__ == "__main__":
    try:
        fire.Fire(keep_text(COMMANDS), name="tools")
    except (ValueError, OSError) as error:  # wrong input: the message is enough
        sys.exit(f"{type(error).__name__}: {error}")
