import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, decollate_batch
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, CropForegroundd, LoadImaged, Orientationd, ScaleIntensityRanged, Spacingd

from image_files import write_nifti
from tools.data.classes import label_map, label_values, own_values
from tools.data.transforms import Above
from tools.losses import DiceBCELoss, class_masks
from tools.results.label_maps import FlippedInferer, ToLabelMapd, ToMasksd

BRATS = {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}
ORGANS = {"spleen": [1], "liver": [2], "aorta": [3]}


def test_class_masks_by_brute_force():
    values = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 2, 4], (2, 1, 3, 4, 5)))
    masks = class_masks(values, BRATS)
    assert masks.shape == (2, 3, 3, 4, 5) and masks.dtype == torch.bool
    for index in np.ndindex(2, 3, 4, 5):
        b, *voxel = index
        value = int(values[(b, 0, *voxel)])
        assert masks[(b, slice(None), *voxel)].tolist() == [value in region for region in BRATS.values()]


@pytest.mark.parametrize("classes", [BRATS, ORGANS])
def test_a_label_map_survives_the_way_to_masks_and_back(classes):
    values = np.random.default_rng(1).choice([0, *label_values(classes)], (1, 4, 5, 6)).astype(np.uint8)
    again = label_map(list(class_masks(torch.from_numpy(values), classes)), classes)
    assert again.dtype == torch.uint8
    np.testing.assert_array_equal(again, values)


def test_own_values_are_what_smaller_regions_leave():
    assert own_values(BRATS) == {"TC": 1, "WT": 2, "ET": 4}


@pytest.mark.parametrize("classes", [{"a": [1, 2], "b": [3]}, {"a": [1], "b": [1]}])
def test_classes_that_a_label_map_cannot_hold_are_refused(classes):
    with pytest.raises(ValueError, match="classes"):
        own_values(classes)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="found 'tanh', expected one of softmax, sigmoid"):
        ToMasksd(ORGANS, "tanh")


@pytest.mark.parametrize("classes", [{"liver": [6]}, {"tumour": [2], "liver": [1]}, {"liver": [1, 2]}])
def test_softmax_refuses_classes_whose_values_are_not_their_channels(classes):
    """They would be trained as one class and counted as another."""
    with pytest.raises(ValueError, match="expected label values that count from 1 in their order"):
        ToMasksd(classes, "softmax")


def test_dice_bce_is_the_sum_of_both_for_each_class_by_itself():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6)
    label = torch.from_numpy(np.random.default_rng(2).choice([0, 1, 2, 4], (2, 1, 4, 5, 6)))
    masks, p = class_masks(label, BRATS).float(), logits.sigmoid()
    cross_entropy = -(masks * p.log() + (1 - masks) * (1 - p).log()).mean()
    dice = [
        1 - (2 * (p[:, k] * masks[:, k]).sum() + 1e-5) / (p[:, k].sum() + masks[:, k].sum() + 1e-5) for k in range(3)
    ]
    torch.testing.assert_close(DiceBCELoss(BRATS)(logits, label), sum(dice) / 3 + cross_entropy)


def test_masks_for_metrics():
    logits = torch.tensor([0.1, 2.0, 0.3, 0.2]).view(4, 1, 1, 1)
    out = ToMasksd(ORGANS, "softmax")({"pred": logits, "label": torch.tensor([[[[2]]]])})
    assert out["pred"].flatten().tolist() == [1, 0, 0] and out["label"].flatten().tolist() == [0, 1, 0]
    out = ToMasksd(BRATS, "sigmoid")(
        {"pred": torch.tensor([-0.1, 2.0, 0.3]).view(3, 1, 1, 1), "label": torch.tensor([[[[1]]]])}
    )
    assert out["pred"].flatten().tolist() == [0, 1, 1] and out["label"].flatten().tolist() == [1, 1, 0]


# ------------------------------------------------------------------------------ back to the geometry of the file


def oblique(axcodes, spacing, degrees=20):
    """An affine with the given orientation, turned about two axes."""
    a = np.radians(degrees)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(a / 2), -np.sin(a / 2)], [0, np.sin(a / 2), np.cos(a / 2)]]
    )
    base = np.eye(4)
    base[:3, :3] = turn @ np.diag(spacing)
    base[:3, 3] = 12, -30, 7
    return base @ nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(axcodes), nib.orientations.axcodes2ornt("RAS")),
        (30, 34, 26),
    )


def preprocessing(spacing=None):
    steps = [
        LoadImaged("image", ensure_channel_first=True),
        Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
    ]
    if spacing:
        steps.append(Spacingd("image", pixdim=spacing, padding_mode="border"))
    return Compose(
        [
            *steps,
            ScaleIntensityRanged("image", a_min=0, a_max=100, b_min=0, b_max=1, clip=True),
            CropForegroundd("image", source_key="image", select_fn=Above(0.05)),
        ]
    )


def thresholds(image):
    """A network whose classes are ranges of intensity: background below 0.3, spleen below 0.6, liver below 0.85."""
    bounds = torch.tensor([0.0, 0.3, 0.6, 0.85, 1.2])
    middle, half = (bounds[1:] + bounds[:-1]) / 2, (bounds[1:] - bounds[:-1]) / 2
    return torch.cat([60 * (h - (image - m).abs()) for m, h in zip(middle, half, strict=True)], dim=1)


def segment(path, transform, classes, activation, network, **options):
    batch = next(iter(DataLoader(Dataset([{"image": str(path)}], transform), batch_size=1)))
    batch["pred"] = SlidingWindowInferer((32, 32, 32), overlap=0.5, mode="gaussian")(batch["image"], network)
    return ToLabelMapd(classes, activation, transform, **options)(decollate_batch(batch)[0])


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "ASL"])
def test_labels_land_on_their_voxels_in_the_geometry_of_the_file(tmp_path, axcodes):
    volume = np.full((30, 34, 26), 10, np.float32)  # foreground everywhere but in a margin that is cropped away
    volume[:3] = 0
    truth = np.zeros(volume.shape, np.uint8)
    for value, box in ((1, np.s_[5:11, 6:13, 4:9]), (2, np.s_[14:22, 20:30, 10:20]), (3, np.s_[24:29, 3:8, 21:25])):
        truth[box] = value
        volume[box] = (0, 45, 72, 100)[value]
    path = write_nifti(tmp_path / "scan.nii.gz", volume, oblique(axcodes, (1.0, 1.3, 2.0)))
    out = segment(path, preprocessing(), ORGANS, "softmax", thresholds)
    assert out["pred"].dtype == torch.uint8
    np.testing.assert_array_equal(out["pred"][0], truth)
    np.testing.assert_allclose(out["pred"].affine, nib.load(path).affine, atol=1e-4)


def test_resampled_labels_still_lie_in_their_places(tmp_path):
    volume = np.full((30, 34, 26), 10, np.float32)
    volume[8:22, 9:25, 6:20] = 72
    path = write_nifti(tmp_path / "scan.nii.gz", volume, oblique("LPS", (1.0, 1.3, 2.0)))
    out = segment(
        path, preprocessing((1.4, 1.4, 1.4)), {"organ": [1]}, "softmax", lambda x: torch.cat([0.4 - x, x - 0.4], 1) * 30
    )
    truth = (volume == 72)[None]
    found = out["pred"].numpy() == 1
    assert found.shape == truth.shape
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.95


def test_nested_regions_and_probabilities(tmp_path):
    volume = np.full((30, 34, 26), 10, np.float32)
    truth = np.zeros(volume.shape, np.uint8)
    for value, intensity, box in (
        (2, 40, np.s_[4:26, 4:30, 4:22]),
        (1, 60, np.s_[8:20, 8:20, 8:18]),
        (4, 90, np.s_[10:14, 10:14, 10:14]),
    ):
        truth[box], volume[box] = value, intensity

    def network(x):  # TC, WT, ET: the brighter, the deeper
        return torch.cat([x - 0.5, x - 0.3, x - 0.8], 1) * 40

    path = write_nifti(tmp_path / "scan.nii.gz", volume, oblique("LPS", (1.0, 1.0, 1.0)))
    out = segment(path, preprocessing(), BRATS, "sigmoid", network, probabilities=True)
    np.testing.assert_array_equal(out["pred"][0], truth)
    assert out["prob"].shape == (3, *truth.shape) and out["prob"].dtype == torch.float16
    np.testing.assert_array_equal(out["prob"][2] > 0.5, truth == 4)
    np.testing.assert_allclose(out["prob"].affine, nib.load(path).affine, atol=1e-4)


def test_flips_are_averaged():
    calls = []

    def network(window):  # an output that depends on where in the window a voxel is
        calls.append(1)
        return window * torch.linspace(1, 2, 32).view(1, 1, 32, 1, 1)

    image = torch.rand(1, 1, 32, 32, 32)
    out = FlippedInferer(axes=[0, 2], roi_size=(32, 32, 32), sw_batch_size=1, overlap=0.5, mode="gaussian")(
        image, network
    )
    assert len(calls) == 4
    torch.testing.assert_close(out, image * 1.5)  # the mean of the ramp and its mirror image
