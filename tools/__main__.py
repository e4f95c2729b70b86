"""`python -m tools COMMAND`: the project's own commands; everything else is `python -m monai.bundle`."""

from __future__ import annotations

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
    fire.Fire(COMMANDS, name="tools")
