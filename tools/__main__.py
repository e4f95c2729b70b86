"""`python -m tools COMMAND`: the project's own commands; everything else is `python -m monai.bundle`."""

from __future__ import annotations

import sys

import fire

from tools.check import check
from tools.datalist import pretrain
from tools.figures import curves_figure
from tools.sample_data import sample_data

COMMANDS = {
    "check": check,
    "datalist": {"pretrain": pretrain},
    "figures": curves_figure,
    "sample_data": sample_data,
}

if __name__ == "__main__":
    try:
        fire.Fire(COMMANDS, name="tools")
    except (ValueError, OSError) as error:  # wrong input: its message says all
        sys.exit(f"{type(error).__name__}: {error}")
