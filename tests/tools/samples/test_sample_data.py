import hashlib
import json

import nibabel as nib
import numpy as np
import pytest

from tools.samples.anatomy import ABDOMEN_LABELS, BRAIN_LABELS, CHANNELS
from tools.samples.sample_data import KINDS, ORIENTATIONS, sample_data

CASES = {"ct_abdomen": len(ORIENTATIONS), "brain_mri": 2, "liver": 2, "hippocampus": 8, "organs": 2}
ORGANS = {name: label for label, name in ABDOMEN_LABELS.items()}


def digests(folder):
    """Digest of each NIfTI file below a folder."""
    files = sorted(folder.rglob("*.nii.gz"))
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load_cases(folder):
    """Image, label and both arrays of each case that dataset.json lists."""
    cases = []
    for entry in json.loads((folder / "dataset.json").read_text())["training"]:
        image, label = nib.load(folder / entry["image"]), nib.load(folder / entry["label"])
        cases.append((image, label, np.asanyarray(image.dataobj), np.asanyarray(label.dataobj)))
    return cases


def centroid(label, array, number):
    """Centre of a structure in world space, mm: to the right, anterior, superior."""
    return nib.affines.apply_affine(label.affine, np.argwhere(array == number).mean(0))


def volume(label, array, number):
    """Millilitres."""
    return (array == number).sum() * np.prod(label.header.get_zooms()) / 1000


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder and the cases of each kind."""
    kinds = {}
    for kind, cases in CASES.items():
        folder = tmp_path_factory.mktemp(kind)
        sample_data(str(folder), kind, cases=cases)
        kinds[kind] = folder, load_cases(folder)
    return kinds


@pytest.mark.parametrize(("kind", "cases"), [("ct_abdomen", 2), ("brain_mri", 1), ("liver", 1), ("hippocampus", 7)])
def test_same_bytes_whenever_and_however_many(kind, cases, written, tmp_path):
    longer = digests(written[kind][0])
    sample_data(str(tmp_path), kind, cases=cases)
    shorter = digests(tmp_path)
    assert len(shorter) == 2 * cases  # images and labels
    assert shorter.items() <= longer.items()


@pytest.mark.parametrize("kind", ["ct_abdomen", "hippocampus"])
def test_another_seed_is_another_patient(kind, written, tmp_path):
    sample_data(str(tmp_path), kind, cases=1, seed=7)
    assert not set(digests(tmp_path).values()) & set(digests(written[kind][0]).values())


def test_a_series_can_be_extended(tmp_path, capsys):
    sample_data(str(tmp_path / "new" / "folder"), "ct_abdomen", cases=1)
    sample_data(str(tmp_path / "new" / "folder"), "ct_abdomen", cases=2)
    assert json.loads((tmp_path / "new" / "folder" / "dataset.json").read_text())["numTraining"] == 2
    assert capsys.readouterr().out.splitlines()[-1] == f"2 ct_abdomen cases in {tmp_path / 'new' / 'folder'}"
    assert [path.name for path in tmp_path.rglob(".*")] == [".sample_data"]  # no temporary files are left


@pytest.mark.parametrize(
    ("kind", "modality", "labels"),
    [
        ("ct_abdomen", ("CT",), ABDOMEN_LABELS),
        ("brain_mri", CHANNELS, BRAIN_LABELS),
        ("liver", ("CT",), {1: "liver", 2: "cancer"}),
        ("hippocampus", ("MRI",), {1: "Anterior", 2: "Posterior"}),
    ],
)
def test_dataset_json(kind, modality, labels, written):
    folder, cases = written[kind]
    content = json.loads((folder / "dataset.json").read_text())
    assert tuple(content["modality"].values()) == modality
    assert content["labels"] == {"0": "background"} | {str(label): name for label, name in labels.items()}
    assert content["numTraining"] == len(content["training"]) == len(cases)
    assert (content["kind"], content["seed"]) == (kind, 0)
    first = {"liver": "liver_0", "hippocampus": "hippocampus_001"}.get(kind, f"{kind}_0000")
    assert content["training"][0] == {"image": f"imagesTr/{first}.nii.gz", "label": f"labelsTr/{first}.nii.gz"}


def test_image_and_label_share_geometry(written):
    for image, label, _, _ in (case for _, cases in written.values() for case in cases):
        assert image.shape[:3] == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)


def test_cases_differ_in_grid_and_orientation(written):
    for _, cases in (written["ct_abdomen"], written["brain_mri"]):
        assert len({image.header.get_zooms()[:3] for image, *_ in cases}) == len(cases)
        assert len({tuple(sorted(image.shape[:3])) for image, *_ in cases}) > 1
        orientations = ["".join(nib.aff2axcodes(image.affine)) for image, *_ in cases]
        assert orientations == list(ORIENTATIONS[: len(cases)])


def test_abdomen_grid(written):
    for image, _, array, _ in written["ct_abdomen"][1]:
        canonical = nib.as_closest_canonical(image)
        assert array.dtype == np.int16
        assert all(96 <= size <= 144 for size in canonical.shape[:2])
        assert 64 <= canonical.shape[2] <= 96
        right, anterior, superior = canonical.header.get_zooms()
        assert right == anterior
        assert 1.8 <= right <= 3.1 and 2.5 <= superior <= 5


def test_the_largest_organs_in_coarse_voxels(written):
    bounds = {"liver": (900, 2300), "spleen": (70, 250), "right_kidney": (80, 220), "left_kidney": (80, 220)}
    folder, cases = written["organs"]
    names = json.loads((folder / "dataset.json").read_text())["labels"]
    assert [names[str(number)] for number in range(1, 5)] == list(bounds)
    for image, label, _, array in cases:
        assert image.shape[0] * image.shape[1] * image.shape[2] < 96 * 96 * 64  # the smallest of `ct_abdomen`
        assert 4 < min(image.header.get_zooms()) < 6
        for number, (least, most) in enumerate(bounds.values(), start=1):
            assert least < volume(label, array, number) < most
        (liver, *_), (spleen, *_), (right, *_), (left, *_) = (centroid(label, array, n) for n in range(1, 5))
        assert liver > right > left > spleen  # + is the patient's right


def test_every_organ_in_every_case_with_a_plausible_volume(written):
    millilitres = {
        "spleen": (70, 250),
        "right kidney": (80, 220),
        "left kidney": (80, 220),
        "gallbladder": (10, 60),
        "esophagus": (5, 40),
        "liver": (900, 2000),
        "stomach": (150, 600),
        "aorta": (40, 150),
        "inferior vena cava": (40, 150),
        "portal and splenic veins": (8, 50),
        "pancreas": (35, 110),
        "right adrenal gland": (0.8, 6),
        "left adrenal gland": (0.8, 6),
    }
    for _, label, _, array in written["ct_abdomen"][1]:
        assert set(np.unique(array)) == set(range(14))
        for name, (least, most) in millilitres.items():
            assert least < volume(label, array, ORGANS[name]) < most, name


def test_tissues_have_their_hounsfield_units(written):
    ranges = {
        "spleen": (90, 150),
        "right kidney": (120, 220),
        "left kidney": (120, 220),
        "gallbladder": (-5, 35),
        "liver": (55, 130),
        "aorta": (130, 330),
        "inferior vena cava": (75, 165),
        "portal and splenic veins": (100, 190),
        "pancreas": (70, 130),
    }
    for _, _, image, array in written["ct_abdomen"][1]:
        for name, (least, most) in ranges.items():
            assert least < np.median(image[array == ORGANS[name]]) < most, name
        assert np.median(image[array == ORGANS["liver"]]) > np.median(image[array == ORGANS["gallbladder"]]) + 30
        assert image.min() >= -1024
        share = {
            "air": np.mean(image < -950),
            "lung": np.mean((image > -930) & (image < -750)),
            "fat": np.mean((image > -150) & (image < -60)),
            "soft tissue": np.mean((image > 0) & (image < 150)),
            "bone": np.mean(image > 330),
        }
        assert share["air"] > 0.2 and share["fat"] > 0.08 and share["soft tissue"] > 0.1, share
        assert share["lung"] > 0.01 and 0.003 < share["bone"] < 0.06, share
        stomach = image[array == ORGANS["stomach"]]
        assert np.mean(stomach < -700) > 0.01  # gas in front, fluid behind
        assert np.mean((stomach > -50) & (stomach < 80)) > 0.3


def test_the_patient_is_the_right_way_round_in_world_space(written):
    """In nibabel's world x grows towards the patient's right, y anterior, z superior."""
    for _, label, image, array in written["ct_abdomen"][1]:
        centre = {name: centroid(label, array, number) for name, number in ORGANS.items()}
        assert centre["liver"][0] > centre["spleen"][0] + 80
        assert centre["right kidney"][0] > centre["aorta"][0] > centre["left kidney"][0]
        assert centre["gallbladder"][0] > centre["stomach"][0]
        assert centre["inferior vena cava"][0] > centre["aorta"][0]
        assert centre["right adrenal gland"][0] > centre["left adrenal gland"][0]
        assert centre["stomach"][1] > centre["left kidney"][1]  # the kidneys lie behind
        assert centre["gallbladder"][1] > centre["right kidney"][1]
        assert centre["esophagus"][2] > centre["liver"][2] > centre["right kidney"][2]
        assert centre["left kidney"][2] > centre["right kidney"][2]  # the liver pushes the right one down
        canonical = nib.as_closest_canonical(nib.Nifti1Image(image, label.affine)).get_fdata()
        lung = (canonical > -930) & (canonical < -750)
        quarter = canonical.shape[2] // 4
        assert lung[..., -quarter:].sum() > 5 * lung[..., :quarter].sum()


def test_brain_grid_and_channels(written):
    for image, _, array, _ in written["brain_mri"][1]:
        assert array.shape[3] == len(CHANNELS) == 4
        assert array.dtype == np.int16
        assert all(120 <= size <= 160 for size in array.shape[:3])
        assert all(1.0 <= size <= 1.5 for size in image.header.get_zooms()[:3])
        inside = array > 0
        assert (inside == inside[..., :1]).all()  # skull-stripped: one background, of zeros, for all channels
        assert 0.15 < inside[..., 0].mean() < 0.6
        assert not any(inside.take(side, axis=axis).any() for axis in range(3) for side in (0, -1))
    scales = [float(np.median(array[..., 0][array[..., 0] > 0])) for _, _, array, _ in written["brain_mri"][1]]
    assert max(scales) > 1.2 * min(scales)


def test_tumour_contrast(written):
    for _, label, image, array in written["brain_mri"][1]:
        assert set(np.unique(array)) == {0, *BRAIN_LABELS}
        assert all(volume(label, array, number) > 1 for number in BRAIN_LABELS)
        healthy = (array == 0) & (image[..., 0] > 0)
        signal = {
            name: {n: image[..., number][array == n].mean() for n in BRAIN_LABELS}
            | {0: np.median(image[..., number][healthy])}
            for number, name in enumerate(CHANNELS)
        }
        assert signal["t1ce"][4] > 1.3 * max(signal["t1ce"][n] for n in (0, 1, 2))
        assert signal["t1ce"][1] == min(signal["t1ce"].values())
        assert signal["t1ce"][4] / signal["t1ce"][2] > 1.3 * signal["t1"][4] / signal["t1"][2]
        assert signal["flair"][2] == max(signal["flair"].values()) and signal["flair"][2] > 1.4 * signal["flair"][0]
        assert signal["flair"][2] > 1.3 * signal["flair"][1]
        assert signal["t2"][2] > 1.05 * signal["t2"][0]
        assert signal["t2"][1] > 1.05 * signal["t2"][0]


def test_a_tumour_core_is_necrotic_inside_and_enhancing_outside(written):
    for _, label, _, array in written["brain_mri"][1]:
        points = {n: np.argwhere(array == n) * label.header.get_zooms() for n in BRAIN_LABELS}
        middle = points[1].mean(0)
        reach = [np.median(np.linalg.norm(points[n] - middle, axis=1)) for n in (1, 4, 2)]
        assert reach == sorted(reach)


def same_scan(path, other, channel=...):
    """Whether a file holds what another holds, or one channel of it."""
    scan, other = nib.load(path), nib.load(other)
    voxels = np.asanyarray(other.dataobj)[..., channel] if channel is not ... else np.asanyarray(other.dataobj)
    return np.array_equal(scan.affine, other.affine) and np.array_equal(scan.dataobj, voxels)


def test_btcv_is_the_abdomen_under_the_names_of_btcv(written, tmp_path):
    sample_data(str(tmp_path), "btcv", cases=2)
    assert sorted(path.as_posix() for path in digests(tmp_path)) == [
        "imagesTr/img0001.nii.gz",
        "imagesTr/img0002.nii.gz",
        "labelsTr/label0001.nii.gz",
        "labelsTr/label0002.nii.gz",
    ]
    assert not (tmp_path / "dataset.json").exists()
    for number in (1, 2):
        name = f"ct_abdomen_{number - 1:04d}.nii.gz"
        assert same_scan(tmp_path / f"imagesTr/img{number:04d}.nii.gz", written["ct_abdomen"][0] / "imagesTr" / name)
        assert same_scan(tmp_path / f"labelsTr/label{number:04d}.nii.gz", written["ct_abdomen"][0] / "labelsTr" / name)


def test_brats_is_the_brain_with_a_file_for_each_channel(written, tmp_path):
    sample_data(str(tmp_path), "brats", cases=1)
    stem = "BraTS20_Training_001/BraTS20_Training_001"
    assert {path.as_posix() for path in digests(tmp_path)} == {
        f"{stem}_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair", "seg")
    }
    assert not (tmp_path / "dataset.json").exists()
    for channel, name in enumerate(CHANNELS):
        image = written["brain_mri"][0] / "imagesTr/brain_mri_0000.nii.gz"
        assert same_scan(tmp_path / f"{stem}_{name}.nii.gz", image, channel)
    assert same_scan(tmp_path / f"{stem}_seg.nii.gz", written["brain_mri"][0] / "labelsTr/brain_mri_0000.nii.gz")


def test_spleen_is_the_abdomen_with_one_label(written, tmp_path):
    sample_data(str(tmp_path), "spleen", cases=1)
    (image, _, _, array), (other, _, _, organs) = *load_cases(tmp_path), written["ct_abdomen"][1][0]
    assert sorted(path.name for path in digests(tmp_path)) == ["spleen_1.nii.gz"] * 2
    assert same_scan(image.get_filename(), other.get_filename())
    np.testing.assert_array_equal(array, organs == ORGANS["spleen"])
    assert json.loads((tmp_path / "dataset.json").read_text())["labels"] == {"0": "background", "1": "spleen"}


def test_liver_tumours_are_dark_and_lie_in_the_liver(written):
    masks = []
    for (_, label, image, array), (*_, organs) in zip(written["liver"][1], written["ct_abdomen"][1], strict=False):
        assert set(np.unique(array)) == {0, 1, 2}
        np.testing.assert_array_equal(array > 0, organs == ORGANS["liver"])  # the same patient, who has tumours
        assert 0.3 < volume(label, array, 2) < 150 < volume(label, array, 1)
        assert np.median(image[array == 2]) < np.median(image[array == 1]) - 15
        masks.append(nib.as_closest_canonical(nib.Nifti1Image((array == 2).astype(np.uint8), label.affine)))
    centres = [nib.affines.apply_affine(mask.affine, np.argwhere(mask.get_fdata()).mean(0)) for mask in masks]
    assert np.linalg.norm(centres[0] - centres[1]) > 5


def test_hippocampus_crops(written):
    for image, label, array, labels in written["hippocampus"][1]:
        assert array.dtype == np.int16
        assert image.header.get_zooms() == (1, 1, 1)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert all(least <= n <= most for n, least, most in zip(array.shape, (31, 40, 24), (43, 59, 47), strict=True))
        assert set(np.unique(labels)) == {0, 1, 2}
        assert all(0.7 < volume(label, labels, number) < 3 for number in (1, 2))
        anterior, posterior = (centroid(label, labels, number) for number in (1, 2))
        assert anterior[1] > posterior[1] + 10 and anterior[2] < posterior[2]  # the tail lies behind and above
        grey, median = np.median(array[labels > 0]), np.median(array)
        assert 0.6 * median < grey < 0.95 * median  # grey matter, with white matter around and CSF beside it
        assert array.std() > 0.25 * median
    assert len({image.shape for image, *_ in written["hippocampus"][1]}) == CASES["hippocampus"]
    medians = [np.median(array) for _, _, array, _ in written["hippocampus"][1]]
    assert max(medians) > 3 * min(medians)  # scanner units


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "knee"}, "kind: got 'knee', expected one of ct_abdomen, brain_mri, btcv, brats"),
        ({"cases": 0}, "cases: got 0, expected a whole number of at least 1"),
        ({"cases": 1.5}, "cases: got 1.5"),
        ({"cases": True}, "cases: got True"),
        ({"seed": -1}, "seed: got -1, expected a whole number of at least 0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sample_data(**({"output_dir": str(tmp_path / "data"), "kind": "ct_abdomen"} | arguments))
    assert not (tmp_path / "data").exists()


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir: .*file"):
        sample_data(str(tmp_path / "file"), "ct_abdomen")


@pytest.mark.parametrize("mark", ["synthetic liver, seed 0\n", "synthetic btcv, seed 1\n", None])
def test_other_data_in_the_folder_is_not_mixed_with(mark, tmp_path):
    """Neither synthetic cases of another kind or seed, nor a real data set, whose scans have the same names."""
    (tmp_path / "img0001.nii.gz").write_bytes(b"mine")
    if mark is not None:
        (tmp_path / ".sample_data").write_text(mark)
    found = (mark or "other data").strip()
    with pytest.raises(ValueError, match=rf"output_dir: .* holds {found}, expected nothing or synthetic btcv, seed 0"):
        sample_data(str(tmp_path), "btcv", cases=1)
    assert {path.name for path in tmp_path.iterdir()} - {".sample_data"} == {"img0001.nii.gz"}


def test_a_run_that_was_killed_can_be_repeated(written, tmp_path):
    sample_data(str(tmp_path), "hippocampus", cases=2)
    (tmp_path / "dataset.json").unlink()  # it is written last
    half_a_file = tmp_path / "imagesTr" / ".1.hippocampus_003.nii.gz"
    half_a_file.write_bytes(b"half a file")
    sample_data(str(tmp_path), "hippocampus", cases=3)
    half_a_file.unlink()
    assert len(digests(tmp_path)) == 6
    assert digests(tmp_path).items() <= digests(written["hippocampus"][0]).items()


def test_every_kind_is_described():
    """In the help text of the command."""
    assert all(f"        {kind}: " in sample_data.__doc__ for kind in KINDS)
