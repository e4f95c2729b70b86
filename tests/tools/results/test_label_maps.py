from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Compose,
    CropForegroundd,
    Flipd,
    Invertd,
    LoadImaged,
    Orientationd,
    Rotated,
    ScaleIntensityRanged,
    Spacingd,
    Zoomd,
)

from image_files import write_nifti
from tools.data.classes import label_map, label_values, own_values
from tools.data.transforms import Above
from tools.losses import class_masks
from tools.results.label_maps import ToLabelMapd, ToMasksd
from tools.results.way_back import find_way_back

BRATS = {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}
ORGANS = {"spleen": [1], "liver": [2], "aorta": [3]}


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


def preprocessing():
    return Compose(
        [
            LoadImaged("image", ensure_channel_first=True),
            Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            ScaleIntensityRanged("image", a_min=0, a_max=100, b_min=0, b_max=1, clip=True),
            CropForegroundd("image", source_key="image", select_fn=Above(0.05)),
        ]
    )


def segment(path, transform, classes, activation, network, **options):
    batch = next(iter(DataLoader(Dataset([{"image": str(path)}], transform), batch_size=1)))
    batch["pred"] = SlidingWindowInferer((32, 32, 32), overlap=0.5, mode="gaussian")(batch["image"], network)
    return ToLabelMapd(classes, activation, transform, **options)(decollate_batch(batch)[0])


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


def scan_and_logits(tmp_path, axcodes, steps, channels, box=np.s_[5:25, 3:30, 5:20], files=1):
    """A preprocessed scan, with random logits; and its preprocessing."""
    volume = np.zeros((30, 34, 26), np.float32)
    volume[box] = 50
    paths = [
        str(write_nifti(tmp_path / f"{n}.nii.gz", volume, oblique(axcodes, (1.0, 0.9, 1.3)))) for n in range(files)
    ]
    load, *rest = preprocessing().transforms
    transform = Compose([load, rest[0], *steps, *rest[1:]])
    data = transform({"image": paths if files > 1 else paths[0]})
    torch.manual_seed(0)
    data["pred"] = MetaTensor(torch.randn(channels, *data["image"].shape[1:]) * 3, meta=data["image"].meta)
    return data, transform


def by_monai(data, transform, activate):
    """Each channel's probability in the geometry of the file, by MONAI's inverse in 64 bit."""
    invert = Invertd(keys="pred", orig_keys="image", transform=transform, nearest_interp=False)
    return invert({**data, "pred": MetaTensor(activate(data["pred"].as_tensor()), meta=data["pred"].meta)})["pred"]


def resampled(*spacing):
    return [Spacingd("image", pixdim=spacing, mode="bilinear", padding_mode="border")]


@pytest.mark.parametrize(
    ("axcodes", "steps", "box"),
    [
        *((axcodes, resampled(1.6, 1.4, 2.1), np.s_[5:25, 3:30, 5:20]) for axcodes in ("RAS", "LPS", "PIR", "ASL")),
        pytest.param("PIR", resampled(0.71, 1.2, 3.1), np.s_[5:25, 3:30, 5:20], id="anisotropic"),
        pytest.param("LPS", resampled(1.6, 1.4, 2.1), np.s_[0:30, 3:34, 0:20], id="at the border of the file"),
        pytest.param("ASL", [], np.s_[5:25, 3:30, 5:20], id="own spacing"),
    ],
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_way_back_is_the_inverse_of_monai(tmp_path, axcodes, steps, box, activation):
    activate = partial(torch.softmax, dim=0) if activation == "softmax" else torch.sigmoid
    files = 2 if activation == "sigmoid" else 1
    data, transform = scan_and_logits(tmp_path, axcodes, steps, len(ORGANS) + (files == 1), box, files)
    assert find_way_back(data["image"]) is not None
    out = ToLabelMapd(ORGANS, activation, transform, probabilities=True)(data)
    expected = by_monai(data, transform, activate)
    assert out["pred"].dtype == torch.uint8 and out["pred"].shape == (1, *expected.shape[1:]) == (1, 30, 34, 26)
    torch.testing.assert_close(out["prob"].as_tensor(), expected.as_tensor().half(), atol=5e-4, rtol=0)
    np.testing.assert_allclose(out["pred"].affine, expected.affine, atol=1e-9)
    if activation == "softmax":
        labels = expected.as_tensor().argmax(0)
        first, second = expected.as_tensor().topk(2, dim=0).values
        sure = first - second > 1e-5
    else:
        labels = label_map(list(expected.as_tensor() > 0.5), ORGANS)[0]
        sure = ((expected.as_tensor() - 0.5).abs() > 1e-5).all(0)
    differ = out["pred"].as_tensor()[0] != labels
    assert len(labels.unique()) == 4 and not (differ & sure).any()


def test_logits_in_16_bit_are_segmented_in_32(tmp_path):
    data, transform = scan_and_logits(tmp_path, "LPS", resampled(1.6, 1.4, 2.1), 4)
    data["pred"] = data["pred"].bfloat16()
    whole = {**data, "pred": data["pred"].float()}
    to_label_map = ToLabelMapd(ORGANS, "softmax", transform)
    assert torch.equal(to_label_map(data)["pred"], to_label_map(whole)["pred"])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([Flipd("image", 0)], id="a flip"),
        pytest.param([Spacingd("image", (1.6, 1.4, 2.1), mode="nearest", padding_mode="border")], id="nearest voxels"),
        pytest.param([Zoomd("image", 0.8, keep_size=False)], id="a zoom"),
        pytest.param([Rotated("image", (0.2, 0.1, 0), keep_size=True)], id="a rotation"),
    ],
)
def test_other_preprocessing_is_inverted_by_monai(tmp_path, steps, activation):
    data, transform = scan_and_logits(tmp_path, "LPS", steps, 3 + (activation == "softmax"))
    assert find_way_back(data["image"]) is None
    out = ToLabelMapd(ORGANS, activation, transform, probabilities=True)(data)
    activate = partial(torch.softmax, dim=0) if activation == "softmax" else torch.sigmoid
    expected = by_monai(data, transform, activate)
    torch.testing.assert_close(out["prob"].as_tensor(), expected.as_tensor().half(), atol=5e-4, rtol=0)
    found = out["pred"].as_tensor()[0]
    if activation == "softmax":
        assert torch.equal(found, expected.as_tensor().argmax(0).byte())
    else:
        assert torch.equal(found, label_map(list(expected.as_tensor() > 0.5), ORGANS)[0])


def test_a_sheared_header_is_inverted_by_monai(tmp_path):
    """Resampling straightens its axes, so that one axis of the grid crosses several of the file."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[0, 1] = 0.2
    path = write_nifti(tmp_path / "scan.nii.gz", np.full((30, 34, 26), 50, np.float32), affine)
    load, turn, *rest = preprocessing().transforms
    data = Compose([load, turn, *resampled(1.6, 1.4, 2.1), *rest])({"image": str(path)})
    assert find_way_back(data["image"]) is None
