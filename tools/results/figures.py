"""Pictures of a run: what the network painted or segmented, and how the losses fell.

Drawn with `matplotlib.figure.Figure` on the Agg canvas, never with pyplot, whose global state belongs to one
thread and may ask for a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from tools.common.files import atomic_path
from tools.common.tables import read_metrics

Volume = np.ndarray | torch.Tensor

WIDTH, DPI = 11, 100  # inches, pixels per inch
DETAIL_DPI = 150  # of whole scans with fine outlines
GREYS = colormaps["gray"].with_extremes(bad="#54708c")  # bad: masked, tinted to tell a patch from dark air
HEAT = colormaps["inferno"].with_extremes(bad="#3a3a3a")  # bad: no error is counted here
TRAINING, VALIDATION, REFERENCE = "#1f5a96", "#d1701f", "#777777"
CLASS_COLOURS = (  # clear on grey; the first ones differ for colour-blind readers, too
    *("#ff5a4f", "#35c9f0", "#ffd92f", "#3f7fff", "#3cc45a", "#f58ad6", "#ff9a1f", "#a855f7"),
    *("#b8f03c", "#1fa99a", "#c9b6ff", "#b5713a", "#ff3fa4", "#8a9a1c", "#ffd3ad", "#a3ffd0"),
)
TERMS = {  # of the loss; others appear under their column's name
    "loss": "total loss",
    "loss_pr": "partial region prediction",
    "loss_num": "number of masked patches",
    "loss_loc": "location of masked patches",
    "loss_con": "consistency",
    "loss_cl": "contrastive",
    "loss_l1": "absolute error of masked voxels",
}
COMPARISONS = (  # title, y axis, metric, its baseline (a column or a constant), name of the baseline
    ("masked voxels", "mean squared error", "val_masked_mse", "val_mean_mse", "mean of the visible"),
    ("number of masked patches", "accuracy", "val_number_accuracy", "val_number_majority", "majority"),
    ("location of masked patches", "AUROC", "val_location_auroc", 0.5, "chance"),
    ("retrieval of the other view", "accuracy", "val_retrieval_accuracy", "val_retrieval_chance", "chance"),
    ("same scan, another mask", "accuracy", "val_scan_retrieval", "val_scan_mask_chance", "chance"),
    ("same mask, another scan", "accuracy", "val_mask_retrieval", "val_scan_mask_chance", "chance"),
    ("segmentation", "mean Dice", "val_mean_dice", None, ""),
)
SHARES = {"val_scan_variance_": "scan", "val_mask_variance_": "mask"}  # of the features' variance, by stride


def mid_planes(volume: np.ndarray) -> dict[str, np.ndarray]:
    """Cut a volume [H, W, D] through its middle, see `planes`."""
    return planes(volume, tuple(size // 2 for size in volume.shape))


def planes(volume: np.ndarray, centre: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Cut a volume in RAS axes and turn the planes as radiologists look at them.

    Args:
        volume: array [H, W, D] whose axes run to the patient's right, anterior and superior.
        centre: voxel that the planes go through.

    Returns:
        Pictures [rows, columns]: `axial` and `coronal` with the patient's right on the left side, `sagittal`
        with anterior on the left side; anterior (axial) or superior (coronal, sagittal) at the top.
    """
    x, y, z = centre
    return {
        "axial": volume[::-1, ::-1, z].T,
        "coronal": volume[::-1, y, ::-1].T,
        "sagittal": volume[x, ::-1, ::-1].T,
    }


def reconstruction_figure(
    path: str | Path,
    image: Volume,
    masked: Volume,
    reconstruction: Volume,
    *,
    title: str,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    counted: Volume | None = None,
) -> None:
    """Draw input, masked input, reconstruction and absolute error in three planes (PNG, 1100 pixels wide).

    Args:
        path: file to write; parent folders are created, and the file is written atomically.
        image: the input, one channel [H, W, D] in RAS axes, intensities 0 to 1.
        masked: the masked input of the network, [H, W, D].
        reconstruction: output of the network, [H, W, D], including visible voxels.
        title: heading of the figure.
        spacing: voxel size in mm along H, W and D.
        counted: true [H, W, D] where voxels were masked. With it those voxels are tinted in the masked
            input where they are 0, and the reconstruction (elsewhere the input) and the error are shown in them alone.

    Raises:
        ValueError: an array is not [H, W, D], or the shapes differ.
    """
    image, masked, reconstruction = (
        torch.as_tensor(volume).detach().cpu().float().numpy() for volume in (image, masked, reconstruction)
    )
    holes = np.ones(image.shape, bool) if counted is None else torch.as_tensor(counted).cpu().numpy()
    shapes = [volume.shape for volume in (image, masked, reconstruction, holes)]
    if image.ndim != 3 or len(set(shapes)) > 1:
        raise ValueError(
            f"image, masked, reconstruction, counted: got shapes {', '.join(map(str, shapes))}, "
            "expected one and the same shape [H, W, D]"
        )
    error = np.where(holes, np.abs(reconstruction - image), np.nan)
    # The scale leaves out a few stray voxels, which would make the rest of the error look black.
    known = error[np.isfinite(error)]
    largest = max(float(np.quantile(known, 0.995)), 1e-3) if known.size else 1.0
    columns = {
        "input": image,
        "masked input": masked if counted is None else np.where(holes & (masked == 0), np.nan, masked),
        "reconstruction": np.where(holes, reconstruction, image),
        "absolute error": error,
    }
    pictures = {name: mid_planes(volume) for name, volume in columns.items()}

    # 2.4 inches are what four columns leave to one
    figure, rows = _three_planes(list(columns), image.shape, spacing, width=WIDTH, right=0.915, picture=2.4)
    for plane, aspect, row in rows:
        for axes, (name, pictures_of_column) in zip(row, pictures.items(), strict=True):
            colours, limit = (HEAT, largest) if name == "absolute error" else (GREYS, 1.0)
            picture = pictures_of_column[plane]
            drawn = axes.imshow(picture, cmap=colours, vmin=0, vmax=limit, aspect=aspect, interpolation="nearest")
    bar = figure.colorbar(drawn, cax=figure.add_axes((0.928, 0.15, 0.013, 0.6)), extend="max")
    bar.set_label(f"absolute error, scale 0 to {largest:.3g}", fontsize=10)
    bar.ax.tick_params(labelsize=9)
    _title(figure, title)
    _save(figure, path)


def views_figure(
    path: str | Path,
    first: Volume,
    second: Volume,
    *,
    title: str,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Draw the two views of one scan in a contrastive method, in three planes (PNG).

    Args:
        path: file to write; parent folders are created, and the file is written atomically.
        first: first view, one channel [H, W, D] in RAS axes, intensities 0 to 1.
        second: second view, likewise.
        title: heading of the figure.
        spacing: voxel size in mm along H, W and D.

    Raises:
        ValueError: a view is not [H, W, D], or the shapes differ.
    """
    first, second = (torch.as_tensor(view).detach().cpu().float().numpy() for view in (first, second))
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(f"views: got shapes {first.shape} and {second.shape}, expected one and the same [H, W, D]")
    pictures = {"first view": mid_planes(first), "second view": mid_planes(second)}
    _side_by_side(path, pictures, first.shape, title, spacing)


def _side_by_side(
    path: str | Path,
    pictures: Mapping[str, dict[str, np.ndarray]],
    shape: tuple[int, ...],
    title: str,
    spacing: tuple[float, float, float],
) -> None:
    """Draw pictures by heading and plane, grey or in colours, of a volume [H, W, D] of this shape."""
    width = 0.35 + 2.8 * len(pictures)
    figure, rows = _three_planes(list(pictures), shape, spacing, width=width, right=1.0, picture=2.75)
    for plane, aspect, row in rows:
        for axes, planes_of_column in zip(row, pictures.values(), strict=True):
            axes.imshow(planes_of_column[plane], cmap=GREYS, vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    _title(figure, title)
    _save(figure, path)


def features_figure(
    path: str | Path,
    image: Volume,
    features: Mapping[str, Volume],
    *,
    title: str,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Draw features of an encoder as colours beside the scan, in three planes (PNG).

    Args:
        path: file to write; parent folders are created, and the file is written atomically.
        image: the scan, one channel [H, W, D] in RAS axes, intensities 0 to 1.
        features: heading → colours [3, H, W, D], 0 to 1.
        title: heading of the figure.
        spacing: voxel size in mm along H, W and D.

    Raises:
        ValueError: the scan is not [H, W, D], or colours are not [3, H, W, D].
    """
    image = torch.as_tensor(image).detach().cpu().float().numpy()
    pictures = {"scan": mid_planes(image)}
    for name, colours in features.items():
        colours = torch.as_tensor(colours).detach().cpu().float().numpy()
        if image.ndim != 3 or colours.shape != (3, *image.shape):
            raise ValueError(f"{name}: got shape {colours.shape}, expected [3, H, W, D] of the scan's {image.shape}")
        channels = [mid_planes(channel) for channel in colours]
        pictures[name] = {plane: np.stack([c[plane] for c in channels], axis=-1) for plane in channels[0]}
    _side_by_side(path, pictures, image.shape, title, spacing)


def segmentation_figure(
    path: str | Path,
    image: Volume,
    masks: Mapping[str, Volume],
    names: Sequence[str],
    title: str,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Draw an image and segmentations of it, such as label and prediction, in three planes (PNG).

    The planes go through the centre of mass of the first segmentation that holds anything, or through the nearest
    plane that holds any of it. Smaller classes are painted over larger ones. A picture is 420 pixels wide.

    Args:
        path: file to write; parent folders are created, and the file is written atomically.
        image: one channel [H, W, D] in RAS axes, in any unit.
        masks: title of a column → bool masks [K, H, W, D], which may overlap.
        names: names of the K classes.
        title: heading of the figure.
        spacing: voxel size in mm along H, W and D.

    Raises:
        ValueError: the shapes do not fit, or there is no class.
    """
    image = torch.as_tensor(image).detach().cpu().float().numpy()
    masks = {name: torch.as_tensor(m).cpu().bool().numpy() for name, m in masks.items()}
    if image.ndim != 3 or not names or any(m.shape != (len(names), *image.shape) for m in masks.values()):
        shapes = ", ".join(f"{name} {m.shape}" for name, m in masks.items())
        raise ValueError(
            f"segmentation_figure: got image {image.shape}, {shapes} and {len(names)} names, expected an image "
            "[H, W, D] and masks [K, H, W, D] with a name for each of the K classes"
        )
    anything = next((found for m in masks.values() if (found := m.any(axis=0)).any()), np.zeros(image.shape, bool))
    centre = _centre(anything)
    low, high = _window(image, anything)
    grey = planes(image, centre)
    pictures = {"image": None, **{name: [planes(mask, centre) for mask in m] for name, m in masks.items()}}
    # the same order in all pictures, so that a nested region always lies on the one around it
    order = np.argsort([-sum(int(m[k].sum()) for m in masks.values()) for k in range(len(names))], kind="stable")
    colours = [CLASS_COLOURS[k % len(CLASS_COLOURS)] for k in range(len(names))]

    width = 0.35 + 2.8 * len(pictures) + 2.25  # inches: names of the planes, pictures, legend
    right = 1 - 2.25 / width
    least = 0.9 + 0.22 * len(names)  # of the legend
    figure, rows = _three_planes(
        list(pictures), image.shape, spacing, width=width, right=right, picture=2.75, dpi=DETAIL_DPI, least=least
    )
    for plane, aspect, row in rows:
        for axes, painted in zip(row, pictures.values(), strict=True):
            axes.imshow(grey[plane], cmap=GREYS, vmin=low, vmax=high, aspect=aspect)
            if painted is not None:
                _paint(axes, [painted[k][plane] for k in order], [colours[k] for k in order], aspect)
    figure.legend(
        handles=[
            Patch(facecolor=to_rgba(colour, 0.5), edgecolor=colour, label=fill(name.replace("_", " "), 26))
            for colour, name in zip(colours, names, strict=True)
        ],
        loc="upper left",
        bbox_to_anchor=(right + 0.05 / width, 1 - 0.6 / figure.get_figheight()),
        frameon=False,
        fontsize=10,
        handlelength=1.2,
    )
    _title(figure, title)
    _save(figure, path)


def _centre(mask: np.ndarray) -> tuple[int, int, int]:
    """Voxel at the centre of mass of a mask [H, W, D], moved to the nearest planes that hold any of it."""
    if not mask.any():
        return tuple(size // 2 for size in mask.shape)
    centre = []
    for axis in range(3):
        counts = mask.sum(axis=tuple({0, 1, 2} - {axis}))
        held = np.flatnonzero(counts)
        mean = np.average(held, weights=counts[held])
        centre.append(int(held[np.abs(held - mean).argmin()]))
    return tuple(centre)


def _window(image: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Intensities to draw black and white, so that what the mask [H, W, D] holds stands out from its surroundings.

    They are the robust range of the image, narrowed to that of the masked voxels and as much again on both sides:
    in CT, air and bone would leave organs a few shades of grey.
    """
    known = image[np.isfinite(image)]
    low, high = np.quantile(known, (0.005, 0.995)) if known.size else (0.0, 1.0)
    inside = image[mask & np.isfinite(image)]
    least, most = np.quantile(inside, (0.02, 0.98)) if inside.size else (0.0, 0.0)
    if least < most:
        low, high = max(low, 2 * least - most), min(high, 2 * most - least)
    return float(low), float(max(high, low + 1e-6))


def _paint(axes: Axes, masks: Sequence[np.ndarray], colours: Sequence[str], aspect: float) -> None:
    """Lay masks [rows, columns] over a picture, one after the other: translucent, with an opaque outline."""
    paint = np.zeros((*masks[0].shape, 4))
    for mask, colour in zip(masks, colours, strict=True):
        paint[mask] = to_rgba(colour, 0.4)
    axes.imshow(paint, aspect=aspect, interpolation="nearest")
    for mask, colour in zip(masks, colours, strict=True):
        axes.add_collection(LineCollection(_outline(mask), colors=colour, linewidths=0.9, capstyle="projecting"))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Sides of pixels between a mask [rows, columns] and what is outside: lines [N, 2 ends, (x, y)]."""
    padded = np.pad(mask, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = np.stack([columns - 0.5, rows - 0.5, columns + 0.5, rows - 0.5], axis=-1)
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    upright = np.stack([columns - 0.5, rows - 0.5, columns - 0.5, rows + 0.5], axis=-1)
    return np.concatenate([level, upright]).reshape(-1, 2, 2)


def _three_planes(
    titles: Sequence[str],
    shape: tuple[int, ...],
    spacing: tuple[float, float, float],
    *,
    width: float,
    right: float,
    picture: float,
    dpi: float = DPI,
    least: float = 0.0,
) -> tuple[Figure, list[tuple[str, float, list[Axes]]]]:
    """A figure with a row for each plane and a column for each title, all with the letters of their sides.

    Args:
        titles: of the columns.
        shape: of the volume [H, W, D] in RAS axes.
        spacing: mm.
        width: of the figure, inches.
        right: end of the pictures, as a fraction of the width.
        picture: width of the widest picture, inches.
        dpi: pixels per inch.
        least: height of the figure at least, inches.

    Returns:
        The figure, and for each row the name of the plane, its pixels' height over width and the axes.
    """
    size = np.multiply(shape, spacing)  # mm
    planes_of_rows = {  # plane: pixel height over width, picture height in mm, letters at its left and right side
        "axial": (spacing[1] / spacing[0], size[1], "RL"),
        "coronal": (spacing[2] / spacing[0], size[2], "RL"),
        "sagittal": (spacing[2] / spacing[1], size[2], "AP"),
    }
    heights = [extent for _, extent, _ in planes_of_rows.values()]
    pictures = picture * sum(heights) / max(size[0], size[1])  # inches
    total = max(0.8 + pictures, least)  # the heading takes 0.7 inches, the lower margin 0.1
    figure = Figure(figsize=(width, total), dpi=dpi)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(heights),
        len(titles),
        height_ratios=heights,
        left=0.33 / width,
        right=right,
        bottom=1 - (0.7 + pictures) / total,
        top=1 - 0.7 / total,
        wspace=0.03,
        hspace=0.03,
    )
    rows = []
    rim = withStroke(linewidth=1.5, foreground="black")  # of white letters on bright tissue
    for row, (plane, (aspect, _, letters)) in enumerate(planes_of_rows.items()):
        rows.append((plane, aspect, [figure.add_subplot(grid[row, column]) for column in range(len(titles))]))
        for axes, title in zip(rows[-1][2], titles, strict=True):
            axes.set(xticks=[], yticks=[])
            style = {"transform": axes.transAxes, "color": "white", "fontsize": 8, "path_effects": [rim]}
            for letter, x, side in zip(letters, (0.03, 0.97), ("left", "right"), strict=True):
                axes.text(x, 0.5, letter, ha=side, **style)
            if row == 0:
                axes.set_title(title, fontsize=11)
        rows[-1][2][0].set_ylabel(plane, fontsize=11)
    return figure, rows


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=12, y=1 - 0.12 / figure.get_figheight(), va="top", parse_math=False)


def curves_figure(metrics_csv: str | Path, path: str | Path) -> None:
    """Draw the curves of a training run as a PNG: each loss term, and each metric with its baseline.

    Args:
        metrics_csv: file with a column `epoch`, the loss terms (`loss`, `loss_...`) and, with the prefix `val_`, the
            validation metrics. Empty cells are epochs without a validation; missing columns are not drawn.
        path: file to write; parent folders are created, and the file is written atomically.

    Raises:
        ValueError: the file is missing, or has no rows or no column to draw.
    """
    rows = read_metrics(metrics_csv)
    values = {name: np.array([float(row[name] or "nan") for row in rows]) for name in (rows[0] if rows else ())}
    terms = [name for name in values if name.startswith("loss")]
    comparisons = [comparison for comparison in COMPARISONS if comparison[2] in values]
    shares = [prefix for prefix in SHARES if any(name.startswith(prefix) for name in values)]
    panels = len(terms) + len(comparisons) + len(shares)
    if "epoch" not in values or not panels:
        raise ValueError(
            f"metrics_csv: got {str(metrics_csv)!r} with columns {', '.join(values) or 'none'}, expected "
            "rows with epoch and at least one of loss, loss_... and the validation's metrics"
        )
    across = min(panels, 4)
    down = -(-panels // across)
    figure = Figure(figsize=(WIDTH * max(across, 2) / 4, 2.6 * down), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(down, across)
    places = (figure.add_subplot(grid[divmod(number, across)]) for number in range(panels))
    for term in terms:
        axes = _panel(next(places), TERMS.get(term, term), "loss")
        _curve(axes, values["epoch"], values[term], "training", TRAINING)
        if f"val_{term}" in values:
            _curve(axes, values["epoch"], values[f"val_{term}"], "validation", VALIDATION)
        axes.legend(fontsize=8)
    for title, unit, metric, reference, name in comparisons:
        axes = _panel(next(places), title, unit)
        _curve(axes, values["epoch"], values[metric], "validation", VALIDATION)
        if isinstance(reference, float):
            axes.axhline(reference, color=REFERENCE, linestyle="--", linewidth=1.2, label=name)
        elif reference in values:
            _curve(axes, values["epoch"], values[reference], name, REFERENCE, "--")
        axes.legend(fontsize=8)
    for prefix in shares:
        axes = _panel(next(places), f"variance of the features by the {SHARES[prefix]}", "share")
        for number, name in enumerate(name for name in values if name.startswith(prefix)):
            stride = name.removeprefix(prefix)
            _curve(axes, values["epoch"], values[name], f"1/{stride}" if stride != "1" else "full size", f"C{number}")
        axes.set_ylim(0, 1)
        axes.legend(fontsize=8, title="level", title_fontsize=8)
    _save(figure, path)
    print(f"{panels} curves of {len(rows)} epochs written to {path}")


def _panel(axes: Axes, title: str, unit: str) -> Axes:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.25)
    return axes


def _curve(axes: Axes, epochs: np.ndarray, values: np.ndarray, name: str, colour: str, style: str = ".-") -> None:
    """Draw one curve through the epochs that have a value (a line would break at the others)."""
    known = np.isfinite(values)
    axes.plot(epochs[known], values[known], style, label=name, color=colour, linewidth=1.2)


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
