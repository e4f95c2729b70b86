import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tools.results.figures import CLASS_COLOURS, curves_figure, mid_planes, reconstruction_figure, segmentation_figure

HEADER = (
    "epoch,loss,loss_pr,val_loss,val_loss_pr,val_masked_mse,val_mean_mse,val_number_accuracy,"
    "val_number_majority,val_location_auroc,val_retrieval_accuracy,val_retrieval_chance\n"
)


def phantom(size=(48, 40, 56)):
    """Random volume, its mask in patches of 8 voxels, and a reconstruction."""
    generator = np.random.default_rng(0)
    image = generator.random(size, np.float32)
    counted = np.kron(generator.random([n // 8 for n in size]) < 0.5, np.ones((8, 8, 8))).astype(bool)
    return image, np.where(counted, 0, image), np.full(size, 0.5, np.float32), counted


def test_planes_are_turned_as_radiologists_look_at_them():
    volume = np.zeros((6, 8, 10))
    right, anterior, superior = (5, 4, 5), (3, 7, 5), (3, 4, 9)
    volume[right], volume[anterior], volume[superior] = 1, 2, 3
    planes = mid_planes(volume)
    assert {name: plane.shape for name, plane in planes.items()} == {
        "axial": (8, 6),
        "coronal": (10, 6),
        "sagittal": (10, 8),
    }
    rows, columns = np.nonzero(planes["axial"] == 1)
    assert (rows.tolist(), columns.tolist()) == ([3], [0])  # the patient's right on the left side
    assert planes["axial"][0, 2] == 2  # anterior at the top
    assert planes["coronal"][4, 0] == 1
    assert planes["coronal"][0, 2] == 3  # superior at the top
    assert planes["sagittal"][4, 0] == 2  # anterior on the left side
    assert planes["sagittal"][0, 3] == 3


@pytest.mark.parametrize("as_tensor", [False, True])
def test_reconstruction_figure(as_tensor, tmp_path):
    arrays = phantom((96, 96, 96))
    image, masked, reconstruction, counted = map(torch.tensor, arrays) if as_tensor else arrays
    path = tmp_path / "new" / "folder" / "epoch=0001.png"
    arguments = {"title": "case_0000, $epoch 1", "spacing": (1.5, 1.5, 2.0), "counted": counted}
    reconstruction_figure(path, image, masked, reconstruction, **arguments)
    assert Image.open(path).width == 1100
    assert 20_000 < path.stat().st_size < 400_000
    assert [file.name for file in path.parent.iterdir()] == ["epoch=0001.png"]  # no temporary file is left


def test_masked_voxels_are_tinted_only_when_counted_is_given(tmp_path):
    """Even where the whole image is dark air."""
    *_, counted = phantom()
    air = np.zeros(counted.shape, np.float32)
    coloured = {}
    for name, given in (("with", counted), ("without", None)):
        reconstruction_figure(tmp_path / f"{name}.png", air, air, air, title="air", counted=given)
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), int)
        second_column = pixels[100:-20, 280:510]
        coloured[name] = np.mean(second_column[..., 2] > second_column[..., 0] + 30)
    assert 0.2 < coloured["with"] < 0.8
    assert coloured["without"] == 0


def test_what_the_network_painted_over_visible_voxels_is_not_shown(tmp_path):
    image, masked, reconstruction, counted = phantom()
    other = np.where(counted, reconstruction, 0.9)
    reconstruction_figure(tmp_path / "a.png", image, masked, reconstruction, title="t", counted=counted)
    reconstruction_figure(tmp_path / "b.png", image, masked, other, title="t", counted=counted)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    reconstruction_figure(tmp_path / "c.png", image, masked, other, title="t")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_voxels_keep_their_proportions(tmp_path):
    image, masked, reconstruction, _ = phantom()
    heights = []
    for thickness in (1.0, 3.0):
        path = tmp_path / "figure.png"
        reconstruction_figure(path, image, masked, reconstruction, title="t", spacing=(1.0, 1.0, thickness))
        heights.append(Image.open(path).height)
    assert heights[1] > 1.8 * heights[0]


@pytest.mark.parametrize("what", ["nothing is counted", "a reconstruction without numbers"])
def test_a_picture_is_drawn_although(what, tmp_path):
    image, masked, reconstruction, counted = phantom()
    if what == "nothing is counted":
        counted[:] = False
    else:
        reconstruction[:] = np.nan
    reconstruction_figure(tmp_path / "figure.png", image, masked, reconstruction, title="t", counted=counted)
    assert (tmp_path / "figure.png").is_file()


def test_shapes_that_do_not_fit(tmp_path):
    image, masked, reconstruction, _ = phantom()
    with pytest.raises(ValueError, match=r"reconstruction.*\(48, 40, 55\).*expected one and the same shape"):
        reconstruction_figure(tmp_path / "f.png", image, masked, reconstruction[..., 1:], title="t")
    with pytest.raises(ValueError, match=r"\[H, W, D\]"):
        reconstruction_figure(tmp_path / "f.png", image[None], masked[None], reconstruction[None], title="t")
    assert not (tmp_path / "f.png").exists()


def regions(size=(40, 48, 24)):
    """Random volume, and three masks: a box, a larger box around it, and one elsewhere."""
    image = np.random.default_rng(0).random(size, np.float32)
    masks = np.zeros((3, *size), bool)
    masks[0, 20:24, 20:24, 8:12] = True
    masks[1, 15:30, 15:30, 5:15] = True
    masks[2, 2:8, 2:8, 8:12] = True
    return image, masks


def share_of(path, colour):
    """Share of the pixels, left of the legend, of a colour as it is in the outlines."""
    pixels = np.asarray(Image.open(path).convert("RGB"), int)
    pixels = pixels[:, : pixels.shape[1] - 340]
    rgb = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
    return np.mean(np.abs(pixels - rgb).max(axis=-1) < 12)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_segmentation_figure(as_tensor, tmp_path):
    image, masks = (torch.tensor(array) for array in regions()) if as_tensor else regions()
    path = tmp_path / "new" / "best.png"
    names = ["tumour_core", "whole tumour", "$elsewhere"]
    segmentation_figure(path, image, {"label": masks, "prediction": masks}, names, "case_1, $best", (1.0, 1.0, 2.5))
    assert Image.open(path).width == 1650
    assert 20_000 < path.stat().st_size < 600_000
    assert [file.name for file in path.parent.iterdir()] == ["best.png"]


def test_an_inner_region_is_seen_on_the_one_around_it(tmp_path):
    image, masks = regions()
    core, whole, _ = CLASS_COLOURS[:3]
    segmentation_figure(
        tmp_path / "in.png", image, {"label": masks[:2], "prediction": masks[:2]}, ["core", "whole"], "t"
    )
    outlines = share_of(tmp_path / "in.png", core)
    assert outlines > 1e-3 and share_of(tmp_path / "in.png", whole) > outlines
    # whatever the order of the classes
    segmentation_figure(
        tmp_path / "out.png", image, {"label": masks[[1, 0]], "prediction": masks[[1, 0]]}, ["whole", "core"], "t"
    )
    assert share_of(tmp_path / "out.png", whole) == pytest.approx(outlines, rel=0.3)


def test_planes_go_through_what_is_labelled(tmp_path):
    """Two boxes with nothing between them: the centre of mass lies in neither, the planes in one."""
    image, masks = regions((40, 48, 24))
    masks[:] = False
    masks[0, :4, :4, :4] = masks[0, -5:, -5:, -5:] = True
    segmentation_figure(tmp_path / "two.png", image, {"label": masks[:1], "prediction": masks[:1]}, ["a"], "t")
    assert share_of(tmp_path / "two.png", CLASS_COLOURS[0]) > 3e-4


def test_without_a_label_the_planes_go_through_the_prediction(tmp_path):
    image, masks = regions()
    one, none = masks[2:], np.zeros_like(masks[2:])
    segmentation_figure(tmp_path / "no_label.png", image, {"prediction": one}, ["a"], "t")
    assert Image.open(tmp_path / "no_label.png").width < 1650
    assert share_of(tmp_path / "no_label.png", CLASS_COLOURS[0]) > 3e-4
    segmentation_figure(tmp_path / "empty_label.png", image, {"label": none, "prediction": one}, ["a"], "t")
    assert share_of(tmp_path / "empty_label.png", CLASS_COLOURS[0]) > 3e-4
    segmentation_figure(tmp_path / "nothing.png", image, {"label": none, "prediction": none}, ["a"], "t")
    assert share_of(tmp_path / "nothing.png", CLASS_COLOURS[0]) == 0


@pytest.mark.parametrize("value", [None, 0.0, np.nan])
def test_more_classes_than_colours_and_images_without_contrast_or_numbers(tmp_path, value):
    image, masks = regions()
    if value is not None:
        image[:] = value
    many = np.repeat(masks, 7, axis=0)
    names = [f"a class with quite a long name, number {n}" for n in range(21)]
    segmentation_figure(tmp_path / "figure.png", image, {"label": many, "prediction": many}, names, "t")
    assert Image.open(tmp_path / "figure.png").width == 1650


def test_segmentations_that_do_not_fit(tmp_path):
    image, masks = regions()
    with pytest.raises(ValueError, match=r"prediction \(3, 40, 48, 23\).*expected"):
        segmentation_figure(
            tmp_path / "f.png", image, {"label": masks, "prediction": masks[..., 1:]}, ["a", "b", "c"], "t"
        )
    with pytest.raises(ValueError, match="2 names"):
        segmentation_figure(tmp_path / "f.png", image, {"label": masks, "prediction": masks}, ["a", "b"], "t")
    assert not (tmp_path / "f.png").exists()


def test_curves_with_gaps(tmp_path, capsys):
    rows = [
        "1,1.0,0.5,,,,,,,,,\n",
        "2,0.9,0.4,0.95,0.45,0.04,0.05,0.3,0.2,0.6,0.2,0.03\n",
        "3,0.8,nan,,,,,,,,,\n",
    ]
    (tmp_path / "metrics.csv").write_text(HEADER + "".join(rows))
    curves_figure(tmp_path / "metrics.csv", tmp_path / "new" / "curves.png")
    picture = Image.open(tmp_path / "new" / "curves.png")
    assert picture.width == 1100
    assert (tmp_path / "new" / "curves.png").stat().st_size < 400_000
    assert f"curves of 3 epochs written to {tmp_path / 'new/curves.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "table",
    [
        "epoch,loss\n1,1.0\n",
        "epoch,loss,loss_new\n1,1.0,2.0\n2,,\n",
        "epoch,loss,val_masked_mse,val_location_auroc\n1,1.0,0.1,0.6\n",
        "epoch,val_retrieval_chance,val_retrieval_accuracy\n1,0.1,0.2\n",
    ],
)
def test_missing_columns_have_no_curve(table, tmp_path):
    (tmp_path / "metrics.csv").write_text(table)
    curves_figure(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("table", [None, "", HEADER, "loss\n1.0\n", "epoch,learning_rate\n1,0.1\n"])
def test_nothing_to_draw(table, tmp_path):
    if table is not None:
        (tmp_path / "metrics.csv").write_text(table)
    with pytest.raises(ValueError, match=r"metrics_csv: .*metrics\.csv.*expected"):
        curves_figure(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_figures_can_be_drawn_in_threads_and_never_need_pyplot(tmp_path):
    image, masked, reconstruction, _ = phantom()
    before = "matplotlib.pyplot" in sys.modules
    threads = [
        threading.Thread(
            target=reconstruction_figure,
            args=(tmp_path / f"{n}.png", image, masked, reconstruction),
            kwargs={"title": "t"},
        )
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1 and len(list(tmp_path.iterdir())) == 3
    assert ("matplotlib.pyplot" in sys.modules) == before
