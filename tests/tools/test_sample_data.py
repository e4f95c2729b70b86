import hashlib
import json

import nibabel as nib
import numpy as np
import pytest

from tools.sample_data import ABDOMEN_LABELS, BRAIN_LABELS, CHANNELS, ORIENTATIONS, sample_data

CT_CASES, BRAIN_CASES = len(ORIENTATIONS), 2
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
def abdomen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("abdomen")
    sample_data(str(folder), "ct_abdomen", cases=CT_CASES)
    return folder, load_cases(folder)


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brain")
    sample_data(str(folder), "brain_mri", cases=BRAIN_CASES)
    return folder, load_cases(folder)


@pytest.mark.parametrize(("kind", "cases"), [("ct_abdomen", 2), ("brain_mri", 1)])
def test_same_bytes_whenever_and_however_many(kind, cases, abdomen, brain, tmp_path):
    longer = digests((abdomen if kind == "ct_abdomen" else brain)[0])
    sample_data(str(tmp_path), kind, cases=cases)
    shorter = digests(tmp_path)
    assert len(shorter) == 2 * cases  # images and labels
    assert shorter.items() <= longer.items()


def test_another_seed_is_another_patient(abdomen, tmp_path):
    sample_data(str(tmp_path), "ct_abdomen", cases=1, seed=7)
    assert not set(digests(tmp_path).values()) & set(digests(abdomen[0]).values())


def test_a_series_can_be_extended(tmp_path, capsys):
    sample_data(str(tmp_path / "new" / "folder"), "ct_abdomen", cases=1)
    sample_data(str(tmp_path / "new" / "folder"), "ct_abdomen", cases=2)
    assert json.loads((tmp_path / "new" / "folder" / "dataset.json").read_text())["numTraining"] == 2
    assert capsys.readouterr().out.splitlines()[-1] == f"2 ct_abdomen cases in {tmp_path / 'new' / 'folder'}"
    assert not list(tmp_path.rglob(".*"))  # no temporary files are left


@pytest.mark.parametrize(
    ("kind", "modality", "labels"),
    [("ct_abdomen", ("CT",), ABDOMEN_LABELS), ("brain_mri", CHANNELS, BRAIN_LABELS)],
)
def test_dataset_json(kind, modality, labels, abdomen, brain):
    folder, cases = abdomen if kind == "ct_abdomen" else brain
    content = json.loads((folder / "dataset.json").read_text())
    assert tuple(content["modality"].values()) == modality
    assert content["labels"] == {"0": "background"} | {str(label): name for label, name in labels.items()}
    assert content["numTraining"] == len(content["training"]) == len(cases)
    assert (content["kind"], content["seed"]) == (kind, 0)
    assert content["training"][0]["image"] == f"imagesTr/{kind}_0000.nii.gz"
    assert content["training"][0]["label"] == f"labelsTr/{kind}_0000.nii.gz"


def test_image_and_label_share_geometry(abdomen, brain):
    for image, label, _, _ in (*abdomen[1], *brain[1]):
        assert image.shape[:3] == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)


def test_cases_differ_in_grid_and_orientation(abdomen, brain):
    for _, cases in (abdomen, brain):
        assert len({image.header.get_zooms()[:3] for image, *_ in cases}) == len(cases)
        assert len({tuple(sorted(image.shape[:3])) for image, *_ in cases}) > 1
        orientations = ["".join(nib.aff2axcodes(image.affine)) for image, *_ in cases]
        assert orientations == list(ORIENTATIONS[: len(cases)])


def test_abdomen_grid(abdomen):
    for image, _, array, _ in abdomen[1]:
        canonical = nib.as_closest_canonical(image)
        assert array.dtype == np.int16
        assert all(96 <= size <= 144 for size in canonical.shape[:2])
        assert 64 <= canonical.shape[2] <= 96
        right, anterior, superior = canonical.header.get_zooms()
        assert right == anterior
        assert 1.8 <= right <= 3.1 and 2.5 <= superior <= 5


def test_every_organ_in_every_case_with_a_plausible_volume(abdomen):
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
    for _, label, _, array in abdomen[1]:
        assert set(np.unique(array)) == set(range(14))
        for name, (least, most) in millilitres.items():
            assert least < volume(label, array, ORGANS[name]) < most, name


def test_tissues_have_their_hounsfield_units(abdomen):
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
    for _, _, image, array in abdomen[1]:
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


def test_the_patient_is_the_right_way_round_in_world_space(abdomen):
    """In nibabel's world x grows towards the patient's right, y anterior, z superior."""
    for _, label, image, array in abdomen[1]:
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


def test_brain_grid_and_channels(brain):
    for image, _, array, _ in brain[1]:
        assert array.shape[3] == len(CHANNELS) == 4
        assert array.dtype == np.int16
        assert all(120 <= size <= 160 for size in array.shape[:3])
        assert all(1.0 <= size <= 1.5 for size in image.header.get_zooms()[:3])
        inside = array > 0
        assert (inside == inside[..., :1]).all()  # skull-stripped: one background, of zeros, for all channels
        assert 0.15 < inside[..., 0].mean() < 0.6
        assert not any(inside.take(side, axis=axis).any() for axis in range(3) for side in (0, -1))
    scales = [float(np.median(array[..., 0][array[..., 0] > 0])) for _, _, array, _ in brain[1]]
    assert max(scales) > 1.2 * min(scales)


def test_tumour_contrast(brain):
    for _, label, image, array in brain[1]:
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


def test_a_tumour_core_is_necrotic_inside_and_enhancing_outside(brain):
    for _, label, _, array in brain[1]:
        points = {n: np.argwhere(array == n) * label.header.get_zooms() for n in BRAIN_LABELS}
        middle = points[1].mean(0)
        reach = [np.median(np.linalg.norm(points[n] - middle, axis=1)) for n in (1, 4, 2)]
        assert reach == sorted(reach)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "knee"}, "kind: got 'knee', expected one of ct_abdomen, brain_mri"),
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


@pytest.mark.parametrize(
    "content",
    ['{"kind": "brain_mri", "seed": 0}', '{"kind": "ct_abdomen", "seed": 1}', '{"name": "BTCV"}', "[]", "{"],
)
def test_other_data_in_the_folder_is_not_mixed_with(content, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"output_dir: .*expected an empty folder or one of kind ct_abdomen with seed 0"
    ):
        sample_data(str(tmp_path), "ct_abdomen", cases=1)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]
    assert (tmp_path / "dataset.json").read_text() == content
