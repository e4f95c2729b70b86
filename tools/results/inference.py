"""What happens before the first scan is segmented or evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.common.tables import print_table
from tools.common.windows import require_roi
from tools.data.classes import Classes, class_text, label_values
from tools.data.runs import channel_lines, require_usable


def start_inference(
    items: list[dict[str, Any]],
    channels: int,
    modalities: Sequence[str] | None,
    classes: Classes,
    workers: int,
    remember: str,
    ckpt_path: str,
    roi_size: Sequence[int],
    stride: int,
) -> None:
    """Refuse what cannot be segmented or evaluated, then print what will be.

    Args:
        items: scans; each has a `label` if they are evaluated.
        channels: of the network's input.
        modalities: names of the channels in their order, or None.
        classes: name → label values.
        workers: that read scans.
        remember: file of the scans that were checked before.
        ckpt_path: file of the weights; only printed here.
        roi_size: of the sliding window, voxels.
        stride: of the network's bottleneck, voxels.

    Raises:
        ScanError: scans cannot be used.
        ValueError: the window does not fit the network.
    """
    require_roi(roi_size, stride)
    require_usable(items, channels, workers, remember, label_values(classes))
    print_table(
        [
            ("scans", str(len(items))),
            *channel_lines(items[0], modalities),
            ("labels", class_text(classes)),
            ("weights", str(ckpt_path)),
        ]
    )
