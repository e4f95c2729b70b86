"""Checks before the first scan is segmented or evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.common.tables import print_table
from tools.common.windows import require_roi
from tools.data.classes import Classes, class_text, label_values
from tools.data.runs import channel_lines, require_usable

LEFT_OUT = 3  # exit status of a run that did everything but the scans that it left out


def start_inference(
    items: list[dict[str, Any]],
    channels: int,
    modalities: Sequence[str] | None,
    classes: Classes,
    workers: int,
    remember: str,
    max_scan_gb: float,
    hounsfield: bool | str,
    ckpt_path: str,
    roi_size: Sequence[int],
    stride: int,
) -> None:
    """Check that inference or evaluation can run, then print the start table.

    Args:
        items: scans; with `label` for evaluation.
        channels: number of input channels of the network.
        modalities: names of the channels in order, or None.
        classes: class name → label values.
        workers: number of processes that read scans.
        remember: JSON file with the results of earlier checks.
        max_scan_gb: the largest file that is read, by its voxels.
        hounsfield: whether scans whose values cannot be HU are warned of.
        ckpt_path: file of the weights, for the table.
        roi_size: size of the sliding window, voxels.
        stride: total downsampling of the network.

    Raises:
        ScanError: scans are unusable.
        ValueError: the window does not fit the network.
    """
    require_roi(roi_size, stride)
    require_usable(items, channels, workers, remember, label_values(classes), max_scan_gb, hounsfield)
    print_table(
        [
            ("scans", str(len(items))),
            *channel_lines(items[0], modalities),
            ("labels", class_text(classes)),
            ("weights", str(ckpt_path)),
        ]
    )


def end_without(left_out: Sequence[str]) -> None:
    """List the scans that were left out; the last step of a run.

    Raises:
        SystemExit: status `LEFT_OUT`, if there is one.
    """
    if left_out:
        print(f"left out, because they cannot be used: {len(left_out)}", *left_out, sep="\n  ", flush=True)
        raise SystemExit(LEFT_OUT)
