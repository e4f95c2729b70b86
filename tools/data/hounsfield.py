"""Names the scans of a CT data set whose values cannot be Hounsfield units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tools.data.inspection import Scan
from tools.data.reading import PADDING

AIR = -200.0  # HU; a CT shows some air (-1000), or at least fat (-100) mixed with it at the skin
KINDS: dict[str, Callable[[Scan], bool]] = {  # of scans without air; each scan is of the first that fits
    "have values of 0 to 255, as pictures have": lambda scan: scan.low_inside >= 0 and scan.high <= 255,
    "begin at 0 or above, as if 1024 was added": lambda scan: scan.low_inside >= 0,
    "hold nothing below -200, and so no air": lambda scan: True,
}


def doubtful_values(scans: Sequence[Scan]) -> list[str]:
    """Describe the scans whose values cannot be HU, and those that hold padding, one line for each kind."""
    good = [scan for scan in scans if scan.problem is None]
    kinds: dict[str, list[Scan]] = {kind: [] for kind in KINDS}
    for scan in good:
        if scan.low_inside > AIR:
            kinds[next(kind for kind, fits in KINDS.items() if fits(scan))].append(scan)
    lines = [
        f"{len(found)} of {len(scans)} scans cannot be HU: they {kind}: {_listed(found)}"
        for kind, found in kinds.items()
        if found
    ]
    padded = [scan for scan in good if scan.low < PADDING]
    if padded:
        lines.append(
            f"{len(padded)} of {len(scans)} scans hold padding below {PADDING:g}, used as air: {_listed(padded)}"
        )
    return lines


def _listed(scans: Sequence[Scan]) -> str:
    first = ", ".join(f"{scan.name} ({scan.low:g} to {scan.high:g})" for scan in scans[:5])
    return f"{first} and {len(scans) - 5} more" if len(scans) > 5 else first
