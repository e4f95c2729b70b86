"""What the configs of the segmentation bundles mean: labels lie on their voxels, losses are what they are called,
rates decay, the best weights are kept, and nothing is trained on what validates.

Every bundle's own config is read; the numbers that are published (windows, spacings) are repeated here.
"""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import create_workflow
from monai.data import MetaTensor
from phantom import BODY, SHAPE, SPACING, make_phantom, save_in, without_figures
from scipy import ndimage
from whole_runs import expected_rate, same

from tools.common.tables import read_metrics

from .bundles import NAMES, ROOT, TINY_TRAINING, bundle, config_files, places, read

EVERY_BUNDLE = pytest.mark.parametrize("name", NAMES)

WINDOW = {"btcv": (-175, 250), "liver": (-200, 250), "spleen": (-57, 164)}  # HU, scaled to 0…1
RESAMPLED = {"btcv": (1.5, 1.5, 2.0), "liver": (1.5, 1.5, 1.5), "spleen": (1.5, 1.5, 1.5)}  # mm
ORIENTATION = {"btcv": "LPS", "brats": "PIR", "liver": "SAL", "spleen": "ILP", "hippocampus": "RSA"}
CHANNELS = {"brats": ("t1", "t1ce", "t2", "flair")}
NO_CROP = {"foreground": "$lambda image: image > -1e9"}
UNSCALED = {"_target_": "Identityd", "keys": "image"}
# what changes no voxel but by flips and crops; intensities are still scaled and shifted as a whole
EXACT = {"flip_probability": [0, 0, 0], "affine_probability": 0, "noise": 0.0, "crops_per_volume": 1}


# ------------------------------------------------------------------------------------------------------ phantoms


def levels_of(name):
    """Label values of a bundle, from what is outermost of nested regions to what is innermost."""
    classes = read(name, "train")["classes"].values()
    return sorted({v for values in classes for v in values}, key=lambda v: (sum(v in c for c in classes), v))


def intensity(name):
    """Raw value of a voxel of a level (-1 air, 0 body, …) in a channel: each level has its own in every channel."""
    count = len(levels_of(name)) + 1
    if name in WINDOW:
        low, high = WINDOW[name]
        return lambda level, channel: low - 300 if level < 0 else low + (high - low) * (level + 1) // (count + 1)
    if name == "brats":  # every other channel is the darker the deeper the region
        return lambda level, channel: 0 if level < 0 else 300 + 40 * channel + (60 + level * 25) * (-1) ** channel
    return lambda level, channel: 20 if level < 0 else 100 + 60 * level


def scaled(name, image):
    """Intensities as a network sees them: [C, H, W, D], the obvious way."""
    image = image.astype(np.float64)
    if name in WINDOW:
        low, high = WINDOW[name]
        return ((image - low) / (high - low)).clip(0, 1)
    if name == "hippocampus":
        low, high = np.percentile(image, [0.5, 99.5])
        return 0.001 + 0.999 * ((image - low) / (high - low)).clip(0, 1)
    known = image != 0
    mean, deviation = (
        np.array([f(channel[k]) for channel, k in zip(image, known, strict=True)])[:, None, None, None]
        for f in (np.mean, np.std)
    )
    return np.where(known, (image - mean) / deviation, 0)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """`cases(name)`: three phantoms of a bundle, as (phantom, {"image", "label"}), in `scans` and `labels`."""
    made = {}

    def make(name):
        if name not in made:
            folder, channels = tmp_path_factory.mktemp(f"phantom_{name}"), CHANNELS.get(name, (None,))
            made[name] = []
            for seed in range(3):
                phantom = make_phantom(levels_of(name), intensity(name), len(channels), seed)
                files = [
                    save_in(
                        ORIENTATION[name],
                        phantom.image[c].astype(np.int16),
                        folder / "scans" / f"case{seed}{f'_{channel}' if channel else ''}.nii.gz",
                    )
                    for c, channel in enumerate(channels)
                ]
                label = save_in(ORIENTATION[name], phantom.label, folder / "labels" / f"case{seed}.nii.gz")
                image = [str(file) for file in files] if len(files) > 1 else str(files[0])
                made[name].append((phantom, {"image": image, "label": str(label)}))
        return made[name]

    return make


@pytest.fixture
def datalist(cases, tmp_path):
    """`datalist(name)`: the second phantom trains, the first validates, the third is for the test."""

    def write(name):
        first, second, third = (case for _, case in cases(name))
        path = tmp_path / "list.json"
        path.write_text(json.dumps({"training": [second], "validation": [first], "test": [third]}))
        return str(path)

    return write


def loaded(parser, case, which="validate"):
    return parser.get_parsed_content(f"{which}#preprocessing")(dict(case))


def array(tensor):
    return np.asarray(torch.as_tensor(tensor).cpu())


def assert_label_is_threshold(item, phantom, expected, atol=2e-5):
    """Every class is one intensity in every channel, which is the expected one up to one scale and one shift.

    Args:
        item: has `image` [C, H, W, D] and `label` [1, H, W, D].
        phantom: whose label values are meant.
        expected: intensity of the levels 0 …, [C, levels].
    """
    image, label = array(item["image"]), array(item["label"])[0]
    values = [0, *(int(phantom.label[phantom.levels == k][0]) for k in range(1, phantom.levels.max() + 1))]
    assert set(np.unique(label)) <= set(values)
    there = [k for k, value in enumerate(values) if (label == value).any()]
    for channel, want in zip(image, expected, strict=True):
        found = [channel[label == values[k]] for k in there]
        assert max(np.ptp(f) for f in found) < atol
        means = np.array([f.mean() for f in found])
        if len(there) > 1:
            slope, offset = np.polyfit(want[there], means, 1)
            assert 0.85 < slope < 1.15
            np.testing.assert_allclose(means, slope * want[there] + offset, atol=atol)


def table(name, phantom):
    """Scaled intensity of the levels 0 … of a whole scan, [C, levels]."""
    image = scaled(name, phantom.image)
    return np.stack([image[:, phantom.levels == k][:, 0] for k in range(phantom.levels.max() + 1)], axis=1)


@EVERY_BUNDLE
def test_the_phantom_has_no_symmetry(name):
    label = make_phantom(levels_of(name), intensity(name), 1).label
    assert set(np.unique(label)) == {0, *levels_of(name)}
    for axis in range(3):
        assert not np.array_equal(label, np.flip(label, axis))
        assert len(set(label.shape)) == 3
    edge = min(SHAPE)
    cube = label[:edge, :edge, :edge]
    assert not any(np.array_equal(cube, cube.swapaxes(*axes)) for axes in ((0, 1), (0, 2), (1, 2)))


# --------------------------------------------------------------------------------------------- from file to crop


@EVERY_BUNDLE
def test_a_file_is_turned_scaled_and_cropped_with_its_label(name, cases, parse):
    """Voxel for voxel: left stays left whatever the file's orientation, and channels stay in their order."""
    (phantom, case), *_ = cases(name)
    item = loaded(parse(name, ["train"], spacing="$None"), case)
    expected = scaled(name, phantom.image)
    np.testing.assert_allclose(array(item["image"]), expected[(slice(None), *BODY)], atol=1e-5)
    np.testing.assert_array_equal(array(item["label"])[0], phantom.label[BODY])
    assert item["label"].dtype == torch.uint8 and item["image"].dtype == torch.float32
    np.testing.assert_allclose(array(item["spacing"]), SPACING, rtol=1e-5)
    assert_label_is_threshold(item, phantom, table(name, phantom))


@pytest.mark.parametrize("name", WINDOW)
def test_intensities_beyond_the_window_are_its_ends(name, parse, tmp_path):
    low, high = WINDOW[name]
    image = np.random.default_rng(1).integers(low - 400, high + 400, size=(9, 8, 7)).astype(np.int16)
    case = {"image": str(save_in("RAS", image, tmp_path / "image.nii.gz"))}
    case["label"] = str(save_in("RAS", (image > high).astype(np.uint8), tmp_path / "label.nii.gz"))
    found = array(loaded(parse(name, ["train"], spacing="$None", **NO_CROP), case)["image"])
    np.testing.assert_allclose(found, scaled(name, image[None]), atol=1e-5)
    assert (found == 0).any() and (found == 1).any()


@EVERY_BUNDLE
def test_a_resampled_file_is_its_own_interpolation(name, cases, parse):
    """Images linearly, labels to the nearest voxel; against coordinates in mm."""
    (phantom, case), *_ = cases(name)
    spacing = RESAMPLED.get(name, (1.5, 1.2, 2.0))
    own = {} if name in RESAMPLED else {"spacing": list(spacing)}
    item = loaded(parse(name, ["train"], **own, **NO_CROP, intensity=UNSCALED), case)
    np.testing.assert_allclose(array(item["spacing"]), spacing, rtol=1e-5)

    label = array(item["label"])[0]
    steps = [np.arange(n) * new / old for n, new, old in zip(label.shape, spacing, SPACING, strict=True)]
    for n, size, new, old in zip(label.shape, SHAPE, spacing, SPACING, strict=True):
        assert abs((n - 1) * new - (size - 1) * old) <= new / 2 + 1e-3  # the same extent
    at = np.meshgrid(*steps, indexing="ij")
    image = np.stack([ndimage.map_coordinates(c.astype(float), at, order=1, mode="nearest") for c in phantom.image])
    np.testing.assert_allclose(array(item["image"]), image, atol=0.05)

    nearest = [s.round().astype(int).clip(0, size - 1) for s, size in zip(steps, SHAPE, strict=True)]
    clear = np.ix_(*(np.abs(s % 1 - 0.5) > 1e-2 for s in steps))  # of which two voxels is not a matter of rounding
    np.testing.assert_array_equal(label[clear], phantom.label[np.ix_(*nearest)][clear])
    assert set(np.unique(label)) == {0, *levels_of(name)}


def test_the_published_spacings_are_the_configured_ones():
    for name in NAMES:
        assert read(name, "train")["spacing"] == (list(RESAMPLED[name]) if name in RESAMPLED else None)


@pytest.mark.parametrize("axis", [0, 1, 2])
@EVERY_BUNDLE
def test_a_flip_takes_the_label_with_it(name, axis, cases, parse):
    (phantom, case), *_ = cases(name)
    probability = [float(a == axis) for a in range(3)]
    options = {**EXACT, "flip_probability": probability, "roi_size": list(phantom.body.shape), "spacing": "$None"}
    (item,) = loaded(parse(name, ["train"], **options), case, "train")
    np.testing.assert_array_equal(array(item["label"])[0], np.flip(phantom.label[BODY], axis))
    assert_label_is_threshold(item, phantom, table(name, phantom))


@EVERY_BUNDLE
def test_crops_are_parts_of_the_scan_and_half_of_them_lie_around_a_label(name, cases, parse):
    (phantom, case), *_ = cases(name)
    options = {**EXACT, "roi_size": [6, 6, 6], "spacing": "$None", "crops_per_volume": 300}
    parser = parse(name, ["train"], **options)
    transform = parser.get_parsed_content("train#preprocessing")
    transform.set_random_state(0)
    crops = transform(dict(case))
    assert len(crops) == 300
    assert {tuple(crop[key].shape[1:]) for crop in crops for key in ("image", "label")} == {(6, 6, 6)}
    for crop in crops[::20]:
        assert_label_is_threshold(crop, phantom, table(name, phantom), atol=1e-4)
    labelled = np.mean([array(crop["label"])[0, 3, 3, 3] > 0 for crop in crops])
    share = (phantom.label > 0).sum() / (phantom.levels >= 0).sum()
    assert share < 0.25
    assert labelled == pytest.approx(0.5, abs=0.09)  # three standard deviations


@EVERY_BUNDLE
def test_a_turned_crop_holds_whole_classes_where_its_image_shows_them(name, cases, parse):
    """With affine augmentation: no label value between two others, no label beside its organ."""
    (phantom, case), *_ = cases(name)
    options = {**EXACT, "affine_probability": 1.0, "roi_size": list(phantom.body.shape), "spacing": "$None"}
    transform = parse(name, ["train"], **options).get_parsed_content("train#preprocessing")
    transform.set_random_state(4)
    between = []
    for _ in range(2):
        (item,) = transform(dict(case))
        image, label = array(item["image"])[0], array(item["label"])[0]
        assert set(np.unique(label)) <= {0, *levels_of(name)}
        inner = {v: ndimage.binary_erosion(label == v, iterations=2) for v in np.unique(label)}
        level = {v: np.median(image[mask]) for v, mask in inner.items() if mask.sum() > 8}
        assert len(level) > 1
        parts, count = ndimage.label(label > 0)
        for part in range(1, count + 1):
            values = np.unique(label[parts == part])
            assert len(values) == 1, f"label values {values} in one organ"
        for value in set(level) - {0}:
            near = ndimage.binary_dilation(label == value, iterations=2)  # no other organ is that near
            middle, sign = (level[value] + level[0]) / 2, np.sign(level[value] - level[0])
            shown = near & (sign * (image - middle) > 0)
            mask = label == value
            air = ndimage.binary_dilation(image == 0, iterations=3)  # what was turned in from outside
            if not (near & air).any():
                dice = 2 * (shown & mask).sum() / (shown.sum() + mask.sum())
                assert dice > 0.93, f"label {value}: Dice {dice:.3f} with what the image shows"
                between.append((np.abs(image[near] - middle) < 0.8 * abs(level[value] - middle)).sum())
    assert sum(between) > 0  # the image is interpolated


@EVERY_BUNDLE
def test_evaluation_and_inference_see_what_training_sees(name, cases, parse):
    (_, case), *_ = cases(name)
    training = loaded(parse(name, ["train"]), case)
    evaluation = loaded(parse(name, ["train", "evaluate"]), case)
    inference = parse(name, ["inference"]).get_parsed_content("preprocessing")({"image": case["image"]})
    np.testing.assert_array_equal(array(evaluation["image"]), array(training["image"]))
    np.testing.assert_array_equal(array(inference["image"]), array(training["image"]))
    # the label to compare with is that of the file, voxel for voxel
    np.testing.assert_array_equal(array(evaluation["label"])[0], np.asarray(nib.load(case["label"]).dataobj))


# ------------------------------------------------------------------------------------- from voxels to classes


def voxelwise(name, phantom):
    """A 1×1×1 convolution that segments the phantom of a bundle, and nothing else: its definition and weights."""
    values, classes = table(name, phantom), read(name, "train")["classes"]
    channels = len(values)
    if read(name, "train")["activation"] == "softmax":  # the nearest level; classes stand in the order of levels
        weight = 2 * values.T
        bias = -(values**2).sum(0)
        scale = 40 / np.min(np.diff(np.sort(values[0])) ** 2)
    else:  # each region from a channel of its own: beyond the level that is the first to belong to it
        weight, bias, scale = np.zeros((len(classes), channels)), np.zeros(len(classes)), 100
        for k, members in enumerate(classes.values()):
            first = min(levels_of(name).index(v) for v in members) + 1
            sign = np.sign(values[k, first] - values[k, first - 1])
            weight[k, k], bias[k] = sign, -sign * (values[k, first] + values[k, first - 1]) / 2
    definition = {
        "_target_": "torch.nn.Conv3d",
        "in_channels": channels,
        "out_channels": len(bias),
        "kernel_size": 1,
    }
    weights = {"weight": torch.tensor(weight * scale)[..., None, None, None].float()}
    return definition, {**weights, "bias": torch.tensor(bias * scale).float()}


WINDOWS = {
    "roi_size": [32, 32, 32],
    "spacing": "$None",
    "num_workers": 0,
    "amp": "off",
}  # 8 bits do not tell organs apart


@EVERY_BUNDLE
def test_a_segmented_scan_is_labelled_where_its_organs_are(name, cases, workflow, tmp_path):
    """In the file's own orientation; every class by its own value."""
    (phantom, case), *_ = cases(name)
    definition, weights = voxelwise(name, phantom)
    torch.save(weights, tmp_path / "model.pt")
    scans = tmp_path / "scans"
    scans.mkdir()
    for path in [case["image"]] if isinstance(case["image"], str) else case["image"]:
        (scans / path.rpartition("/")[2]).symlink_to(path)
    workflow(
        *(name, "infer", ["inference"]),
        dataset_dir=str(scans),
        output_dir=str(tmp_path / "out"),
        ckpt_path=str(tmp_path / "model.pt"),
        ckpt_dir=None,
        network_def=definition,
        **WINDOWS,
    ).run()
    (path,) = (tmp_path / "out").rglob("*_seg.nii.gz")
    found, label = nib.load(path), nib.load(case["label"])
    assert nib.aff2axcodes(found.affine) == tuple(ORIENTATION[name])
    np.testing.assert_allclose(found.affine, label.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(label.dataobj))


def test_probabilities_are_interpolated_on_their_way_back_to_the_file(cases, parse):
    """A label map that was predicted on coarse voxels has no steps of their size."""
    (_, case), *_ = cases("spleen")
    parser = parse("spleen", ["inference"], spacing=[6.0, 6.0, 6.0], save_probabilities=True, **NO_CROP)
    item = parser.get_parsed_content("preprocessing")({"image": case["image"]})
    coarse = item["image"].shape[1]
    ramp = torch.linspace(-3, 3, coarse)[:, None, None].expand(item["image"].shape[1:])
    item["pred"] = MetaTensor(torch.stack([torch.zeros_like(ramp), ramp]), meta=item["image"].meta)
    to_label_map = parser.get_parsed_content("postprocessing").transforms[0]
    probability = array(to_label_map(item)["prob"])[1].astype(float)
    axis = next(i for i, c in enumerate(ORIENTATION["spleen"]) if c in "LR")
    line = np.moveaxis(probability, axis, 0)[:, 5, 5]
    assert len(line) == SHAPE[0] and coarse < len(line) / 4
    assert len(np.unique(line)) > 2 * coarse  # nearest voxels would repeat those of the coarse grid


@pytest.mark.parametrize(
    ("name", "configs"),
    [*((name, ["train"]) for name in NAMES), *((name, ["train", "evaluate"]) for name in ("brats", "hippocampus"))],
)
def test_dice_is_one_for_what_is_right_and_zero_for_what_is_missed(name, configs, cases, datalist, workflow):
    """By the validation of a training, and by an evaluation."""
    (phantom, _), *_ = cases(name)
    definition, weights = voxelwise(name, phantom)
    flow = workflow(
        *(name, "train", configs),
        datalist=datalist(name),
        cache="none",
        network_def=definition,
        network="$@network_def.to(@device)",
        card={},  # there is none of such a network
        **WINDOWS,
    )
    network, engine = (flow.parser.get_parsed_content(key) for key in ("network_def", "validate#evaluator"))
    network.load_state_dict(weights)
    missed = len(read(name, "train")["classes"]) > 1
    if missed:
        with torch.no_grad():
            network.bias[-1] = -1e6  # the last class is never found
    engine.run()
    metrics = engine.state.metrics
    dice = [metrics[f"dice_{c}"] for c in read(name, "train")["classes"]]
    if missed:
        assert dice[-1] == 0
        assert dice[:-2] == [1] * len(dice[:-2]) and dice[-2] > 0.4  # the next class takes the place of the missed one
    else:
        assert dice == [1]
    assert metrics["mean_dice"] == pytest.approx(np.mean(dice), abs=1e-5)


@EVERY_BUNDLE
def test_the_loss_is_what_its_name_says(name, parse):
    """Dice of each class but the background, over the batch together, plus cross-entropy over all voxels.

    There, a voxel of an exclusive class weighs as the root of how much rarer than background its class is, to the
    power of the Dice loss of the class.
    """
    config = read(name, "train")
    softmax, classes = config["activation"] == "softmax", list(config["classes"].values())
    draw = np.random.default_rng(3)
    label = draw.choice([0, *levels_of(name)], size=(2, 1, 6, 5, 4))
    logits = draw.normal(size=(2, len(classes) + softmax, 6, 5, 4)) * 2
    masks = np.concatenate([np.isin(label, values) for values in classes], axis=1)
    if softmax:
        powers = np.exp(logits)
        probability = powers / powers.sum(1, keepdims=True)
        chosen = np.take_along_axis(probability, label, axis=1)  # label value k is channel k
        probability = probability[:, 1:]
    else:
        probability = 1 / (1 + np.exp(-logits))
        entropy = -np.where(masks, np.log(probability), np.log(1 - probability)).mean()
    dice = [
        2 * (probability[:, k] * masks[:, k]).sum() / (probability[:, k].sum() + masks[:, k].sum())
        for k in range(len(classes))
    ]
    if softmax:
        counts = np.bincount(label.ravel())
        weight = (counts[0] / counts) ** (0.5 * (1 - np.array([1, *dice])))
        entropy = -(weight[label] * np.log(chosen)).sum() / weight[label].sum()
    loss = parse(name, ["train"]).get_parsed_content("loss")
    found = loss(torch.tensor(logits), torch.tensor(label)).item()
    assert found == pytest.approx(1 - np.mean(dice) + entropy, abs=1e-5)


# --------------------------------------------------------------------------------- who trains and who validates


def layout_of_empty_files(name, folder, count):
    """The names of a data set's files; splits look at nothing else."""
    layouts = {
        "btcv": lambda n: [f"img/img{n:04}.nii.gz", f"label/label{n:04}.nii.gz"],
        "brats": lambda n: [f"c{n:03}/c{n:03}_{part}.nii.gz" for part in (*CHANNELS["brats"], "seg")],
    }
    default = lambda n: [f"imagesTr/c{n:03}.nii.gz", f"labelsTr/c{n:03}.nii.gz"]  # noqa: E731
    numbers = [*range(1, 11), *range(21, 41)] if name == "btcv" else range(count)
    for number in numbers:
        for file in layouts.get(name, default)(number):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
    return len(numbers)


def names_of(cases):
    return [str(case["image"]) for case in cases]


@EVERY_BUNDLE
def test_no_case_that_validates_is_trained_on(name, parse, tmp_path):
    count = layout_of_empty_files(name, tmp_path / "data", 12)
    validated = []
    for fold in range(5):
        for fraction in (1.0, 0.3):
            parser = parse(name, ["train"], dataset_dir=str(tmp_path / "data"), fold=fold, label_fraction=fraction)
            training, validation = (
                names_of(parser.get_parsed_content(f"{part}#dataset#data")) for part in ("train", "validate")
            )
            assert training and validation
            assert not set(training) & set(validation)
            if fraction == 1:
                assert len(training) + len(validation) == count
                validated, whole = validated + validation, training
            else:
                assert set(training) < set(whole)
                assert len(training) == round(0.3 * (count - len(validation)))
    assert len(validated) == len(set(validated)) == count  # each case once


@EVERY_BUNDLE
def test_the_parts_of_a_data_list_go_where_they_belong(name, cases, datalist, parse):
    first, second, third = (names_of([case])[0] for _, case in cases(name))
    options = {"datalist": datalist(name), "dataset_dir": None, "cache": "none"}
    train = parse(name, ["train"], **options)
    assert names_of(train.get_parsed_content("train#dataset").data) == [second]
    assert names_of(train.get_parsed_content("validate#dataset").data) == [first]
    for section, expected in (("validation", first), ("test", third)):
        evaluate = parse(name, ["train", "evaluate"], **options, evaluated=section)
        assert names_of(evaluate.get_parsed_content("validate#dataset").data) == [expected]


# ------------------------------------------------------------------------------------------ one short training

EPOCHS, WARMUP, RATE = 4, 1, 0.01
OPTIONS = {
    **TINY_TRAINING,
    "roi_size": [32, 32, 32],
    "spacing": "$None",
    "epochs": EPOCHS,
    "warmup_epochs": WARMUP,
    "learning_rate": RATE,
    "checkpoints_kept": 10,
    **without_figures(read("hippocampus", "train")),
}


def training(folder, data, **overrides):
    return create_workflow(
        config_file=[str(ROOT / file) for file in config_files("hippocampus", ["train"])],
        workflow_type="train",
        logging_file=False,
        bundle_root=str(ROOT / bundle("hippocampus")),
        dataset_dir=str(data),
        **{**OPTIONS, **places(folder), **overrides},
    )


def watched(flow):
    """Runs a training; gives the rates, files and first crop values of every step."""
    trainer, steps = flow.parser.get_parsed_content("train#trainer"), []
    validated = set()

    def note(engine):
        groups = engine.optimizer.param_groups
        steps.append(
            {
                "epoch": engine.state.epoch,
                "rates": [group["lr"] for group in groups],
                "files": list(engine.state.batch["file"]),
                "crops": engine.state.batch["image"].clone(),
                "labels": engine.state.batch["label"].clone(),
            }
        )

    # after the batch is there, before the scheduler steps
    trainer.add_event_handler(Events.ITERATION_STARTED, note)
    validator = flow.parser.get_parsed_content("validate#evaluator")
    validator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: validated.update(item["file"] for item in engine.state.batch)
    )
    flow.run()
    return steps, validated


@pytest.fixture(scope="module")
def run(samples, quiet, tmp_path_factory):
    """A training whose network forgets everything before its last epoch."""
    folder = tmp_path_factory.mktemp("run")
    flow = training(folder, samples("hippocampus"))
    trainer = flow.parser.get_parsed_content("train#trainer")

    @trainer.on(Events.EPOCH_STARTED(once=EPOCHS))
    def forget(engine):
        with torch.no_grad():
            for parameter in engine.network.parameters():
                parameter.zero_()

    steps, validated = watched(flow)
    return folder, flow, steps, validated


def test_the_learning_rate_rises_then_falls_to_nothing(run):
    _, flow, steps, _ = run
    per_epoch = len(steps) // EPOCHS
    assert per_epoch == 2 and len(steps) == EPOCHS * per_epoch
    warmup, total = WARMUP * per_epoch, EPOCHS * per_epoch
    for number, step in enumerate(steps):
        rate = RATE * expected_rate(number, warmup, total)
        assert step["rates"] == pytest.approx([rate, rate], rel=1e-6)
    rates = [step["rates"][1] for step in steps]
    assert rates[0] == pytest.approx(RATE / 100)
    assert rates[warmup] == RATE
    assert rates[(warmup + total) // 2] == pytest.approx(RATE / 2)
    assert 0 < rates[-1] < 0.1 * RATE
    assert flow.parser.get_parsed_content("train#optimizer").param_groups[1]["lr"] == 0  # after the last step


@EVERY_BUNDLE
def test_every_bundle_warms_up_and_decays_over_its_own_epochs(name, cases, datalist, parse):
    options = {**TINY_TRAINING, "cache": "none", "epochs": 40, "warmup_epochs": 10}
    parser = parse(name, ["train"], datalist=datalist(name), **options)
    scheduler, optimizer = (parser.get_parsed_content(f"train#{key}") for key in ("lr_scheduler", "optimizer"))
    rates = []
    for _ in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    top = read(name, "train")["learning_rate"]
    np.testing.assert_allclose(rates, [top * expected_rate(n, 10, 40) for n in range(41)], rtol=1e-6, atol=1e-12)
    assert read(name, "train")["warmup_epochs"] == 5


def test_nothing_is_trained_on_what_validates(run, samples):
    _, _, steps, validated = run
    trained = {file for step in steps for file in step["files"]}
    assert trained and validated and not trained & validated
    assert len(trained | validated) == len(list((samples("hippocampus") / "imagesTr").iterdir()))


def test_the_kept_weights_are_those_of_the_best_validation(run):
    folder, *_ = run
    dice = [float(row["val_mean_dice"]) for row in read_metrics(folder / "out/metrics.csv")]
    best = int(np.argmax(dice)) + 1
    assert len(dice) == EPOCHS and dice[best - 1] > dice[-1]
    kept = torch.load(folder / "models/model.pt", weights_only=True)
    for epoch in range(1, EPOCHS + 1):
        weights = torch.load(folder / f"models/checkpoint_epoch={epoch}.pt", weights_only=True)["model"]
        assert all(torch.equal(kept[key], weights[key]) for key in weights) == (epoch == best), epoch


def test_a_seed_repeats_the_run_and_another_does_not(run, samples, quiet, tmp_path):
    _, _, steps, _ = run
    again, _ = watched(training(tmp_path / "same", samples("hippocampus"), epochs=1))
    other, _ = watched(training(tmp_path / "other", samples("hippocampus"), epochs=1, seed=1))
    assert all(torch.equal(a["crops"], b["crops"]) for a, b in zip(steps, again, strict=False))
    assert not any(
        a["crops"].shape == b["crops"].shape and torch.equal(a["crops"], b["crops"])
        for a, b in zip(again, other, strict=True)
    )
    assert len(again) == 2
    assert not torch.equal(steps[0]["crops"], steps[2]["crops"])  # epochs differ


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, samples, quiet, tmp_path):
    """Weights, rates, crops and the best validation so far."""
    _, _, steps, _ = run
    flow = training(tmp_path, samples("hippocampus"))
    trainer = flow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    watched(flow)
    assert sorted(p.name for p in (tmp_path / "models").glob("checkpoint*"))[-1] == "checkpoint_epoch=2.pt"
    rest = training(tmp_path, samples("hippocampus"), resume=True)
    resumed, _ = watched(rest)
    assert [step["epoch"] for step in resumed] == [3, 3, 4, 4]
    folder = run[0]
    for mine, whole in zip(resumed, steps[4:], strict=True):
        assert mine["rates"] == pytest.approx(whole["rates"])
        assert mine["files"] == whole["files"] and torch.equal(mine["crops"], whole["crops"])
    before, after = (read_metrics(f / "out/metrics.csv") for f in (folder, tmp_path))
    assert before[:3] == after[:3]  # the fourth epoch began with a network that had forgotten
    for part in ("model", "optimizer"):
        a, b = (torch.load(f / "models/checkpoint_epoch=3.pt", weights_only=True)[part] for f in (folder, tmp_path))
        assert same(a, b), part
    best = max(float(row["val_mean_dice"]) for row in after)
    last = torch.load(tmp_path / "models/checkpoint_epoch=4.pt", weights_only=True)
    assert last["best"]["best"] == pytest.approx(best, rel=1e-4)
