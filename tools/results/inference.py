"""Checks before the first scan is segmented or evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.common.cards import card_path, read_card
from tools.common.tables import print_table
from tools.common.windows import require_roi
from tools.data.classes import Classes, class_text, label_values
from tools.data.preparation import Preparation
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
    prepared: Preparation,
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
        ckpt_path: file of the weights.
        prepared: how scans are prepared, for the table.
        roi_size: size of the sliding window, voxels.
        stride: total downsampling of the network.

    Raises:
        ScanError: scans are unusable.
        ValueError: the window does not fit the network, or the weights were trained for other classes.
    """
    require_roi(roi_size, stride)
    _require_classes(ckpt_path, classes)
    require_usable(items, channels, workers, remember, label_values(classes), max_scan_gb, hounsfield)
    print_table(
        [
            ("scans", str(len(items))),
            *channel_lines(items[0], modalities),
            ("labels", class_text(classes)),
            ("weights", str(ckpt_path)),
            *prepared.lines,
        ]
    )


def _require_classes(ckpt_path: str, classes: Classes) -> None:
    trained = (read_card(ckpt_path) or {}).get("classes", classes)
    if list(trained.items()) != list(classes.items()):  # their order is that of the channels
        raise ValueError(
            f"classes: found {dict(classes)}, expected those that {ckpt_path} was trained for "
            f'({card_path(ckpt_path)}): --classes "{trained}"'
        )


def end_without(left_out: Sequence[str]) -> None:
    """List the scans that were left out; the last step of a run.

    Raises:
        SystemExit: status `LEFT_OUT`, if there is one.
    """
    if left_out:
        print(f"left out, because they cannot be used: {len(left_out)}", *left_out, sep="\n  ", flush=True)
        raise SystemExit(LEFT_OUT)
