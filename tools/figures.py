"""Pictures of a pre-training run: what the network painted, and how the losses fell.

Drawn with `matplotlib.figure.Figure` on the Agg canvas, never with pyplot, whose global state belongs to one
thread and may ask for a display.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.files import atomic_path
from tools.handlers import read_metrics

Volume = np.ndarray | torch.Tensor

WIDTH, DPI = 11, 100  # inches, pixels per inch
GREYS = colormaps["gray"].with_extremes(bad="#54708c")  # bad: masked, tinted to tell a patch from dark air
HEAT = colormaps["inferno"].with_extremes(bad="#3a3a3a")  # bad: no error is counted here
TRAINING, VALIDATION, REFERENCE = "#1f5a96", "#d1701f", "#777777"
TERMS = {  # of the loss; others appear under their column's name
    "loss": "total loss",
    "loss_pr": "partial region prediction",
    "loss_num": "number of masked patches",
    "loss_loc": "location of masked patches",
    "loss_con": "consistency",
    "loss_cl": "contrastive",
}
COMPARISONS = (  # title, y axis, metric, what it has to beat (a column or a constant) and that one's name
    ("masked voxels", "mean squared error", "val_masked_mse", "val_mean_mse", "mean of the visible"),
    ("number of masked patches", "accuracy", "val_number_accuracy", "val_number_majority", "majority"),
    ("location of masked patches", "AUROC", "val_location_auroc", 0.5, "chance"),
    ("retrieval of the other view", "accuracy", "val_retrieval_accuracy", "val_retrieval_chance", "chance"),
)


def mid_planes(volume: np.ndarray) -> dict[str, np.ndarray]:
    """Cut a volume in RAS axes through its middle and turn the planes as radiologists look at them.

    Args:
        volume: array [H, W, D] whose axes run to the patient's right, anterior and superior.

    Returns:
        Pictures [rows, columns]: `axial` and `coronal` with the patient's right on the left side, `sagittal`
        with anterior on the left side; anterior (axial) or superior (coronal, sagittal) at the top.
    """
    x, y, z = (size // 2 for size in volume.shape)
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
        path: file to write; parent folders are made, and a reader never sees half a file.
        image: the input, one channel [H, W, D] in RAS axes, intensities 0 to 1.
        masked: the input as the network saw it, [H, W, D].
        reconstruction: what the network painted, [H, W, D]; it paints visible voxels too.
        title: the figure's heading.
        spacing: voxel size in mm along H, W and D.
        counted: true [H, W, D] where voxels were masked. With it those voxels are tinted in the masked
            input, and the reconstruction (elsewhere the input) and the error are shown in them alone.

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
        "masked input": masked if counted is None else np.where(holes, np.nan, masked),
        "reconstruction": np.where(holes, reconstruction, image),
        "absolute error": error,
    }
    pictures = {name: mid_planes(volume) for name, volume in columns.items()}

    size = np.multiply(image.shape, spacing)  # mm
    rows = {  # plane: pixel height over width, picture height in mm, letters at its left and right side
        "axial": (spacing[1] / spacing[0], size[1], "RL"),
        "coronal": (spacing[2] / spacing[0], size[2], "RL"),
        "sagittal": (spacing[2] / spacing[1], size[2], "AP"),
    }
    heights = [extent for _, extent, _ in rows.values()]
    # A picture is at most 2.4 inches wide; the heading takes 0.7 inches, the lower margin 0.1.
    total = 0.8 + 2.4 * sum(heights) / max(size[0], size[1])
    figure = Figure(figsize=(WIDTH, total), dpi=DPI)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows),
        len(columns),
        height_ratios=heights,
        left=0.03,
        right=0.915,
        bottom=0.1 / total,
        top=1 - 0.7 / total,
        wspace=0.03,
        hspace=0.03,
    )
    for row, (plane, (aspect, _, letters)) in enumerate(rows.items()):
        for column, (name, planes) in enumerate(pictures.items()):
            axes = figure.add_subplot(grid[row, column])
            colours, limit = (HEAT, largest) if name == "absolute error" else (GREYS, 1.0)
            drawn = axes.imshow(planes[plane], cmap=colours, vmin=0, vmax=limit, aspect=aspect, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for letter, x in zip(letters, (0.03, 0.97), strict=True):
                side = "left" if x < 0.5 else "right"
                axes.text(x, 0.5, letter, transform=axes.transAxes, color="white", fontsize=8, ha=side)
            if row == 0:
                axes.set_title(name, fontsize=11)
            if column == 0:
                axes.set_ylabel(plane, fontsize=11)
    bar = figure.colorbar(drawn, cax=figure.add_axes((0.928, 0.15, 0.013, 0.6)), extend="max")
    bar.set_label(f"absolute error, scale 0 to {largest:.3g}", fontsize=10)
    bar.ax.tick_params(labelsize=9)
    figure.suptitle(title, fontsize=12, y=1 - 0.12 / total, va="top", parse_math=False)
    _save(figure, path)


def curves_figure(metrics_csv: str | Path, path: str | Path) -> None:
    """Draw the curves of a training run as a PNG: each loss term, and each metric beside what it has to beat.

    Args:
        metrics_csv: file with a column `epoch`, the loss terms (`loss`, `loss_...`) and, prefixed by `val_`,
            the metrics of the validations. Empty cells are epochs without a validation; columns that are
            missing have no curve.
        path: file to write; parent folders are made, and a reader never sees half a file.

    Raises:
        ValueError: the file is missing, has no rows or no column to draw.
    """
    rows = read_metrics(metrics_csv)
    values = {name: np.array([float(row[name] or "nan") for row in rows]) for name in (rows[0] if rows else ())}
    terms = [name for name in values if name.startswith("loss")]
    comparisons = [comparison for comparison in COMPARISONS if comparison[2] in values]
    panels = len(terms) + len(comparisons)
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
            _curve(axes, values["epoch"], values[reference], name, REFERENCE, linestyle="--", marker="")
        axes.legend(fontsize=8)
    _save(figure, path)


def _panel(axes: Axes, title: str, unit: str) -> Axes:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.25)
    return axes


def _curve(
    axes: Axes,
    epochs: np.ndarray,
    values: np.ndarray,
    name: str,
    colour: str,
    linestyle: str = "-",
    marker: str = ".",
) -> None:
    """Draw one curve through the epochs that have a value (a line would break at the others)."""
    known = np.isfinite(values)
    axes.plot(
        epochs[known],
        values[known],
        label=name,
        color=colour,
        linestyle=linestyle,
        marker=marker,
        linewidth=1.2,
    )


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
