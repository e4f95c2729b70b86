"""`new_bundle` writes a bundle for any data set, or nothing at all."""

from __future__ import annotations

import json
import re
import zipfile

import nibabel as nib
import numpy as np
import pytest
import yaml
from monai.bundle import ConfigParser
from monai.networks.nets import BasicUNet, SwinUNETR, ViT

from tests.test_docs import is_plain
from tools.commands.check import check
from tools.commands.datalist import msd
from tools.commands.new_bundle import identifier, new_bundle
from tools.common.cards import CardError, save_weights
from tools.common.files import write_json
from tools.data.cases import find_cases
from tools.data.preparation import Preparation
from tools.data.scans import ScanError
from tools.data.transforms import Above
from tools.samples.sample_data import sample_data
from tools.shipping.release import release
from tools.shipping.verify import BUNDLES, verify
from tools.training.cards import training_card
from tools.weights.networks import describe_network, different

SHAPE = (40, 36, 34)
SMALL = {"memory_gb": 4, "workers": 0, "small": True}


def draw(seed, values=(1, 2), mr=False):
    """A scan in HU with a body and a box for each label value, and its labels."""
    generator = np.random.default_rng(seed)
    image = np.full(SHAPE, -1000.0, np.float32)
    image[4:-4, 4:-4, 4:-4] = 0
    label = np.zeros(SHAPE, np.uint8)
    for number, value in enumerate(values):
        corner = np.array([8 + 12 * number, 10, 10]) + generator.integers(0, 3, 3)
        box = tuple(slice(start, start + 9) for start in corner)
        image[box], label[box] = 60 + 50 * number, value
    image += generator.normal(0, 5, SHAPE)
    return (image + 1000 if mr else image), label


def save(path, array, spacing=(2.0, 2.0, 2.5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), np.diag([*spacing, 1])), path)


def write_set(root, images, labels, cases=5, **options):
    """Cases at `images.format(n)` and `labels.format(n)`."""
    for n in range(cases):
        image, label = draw(n, **options)
        save(root / images.format(n), image)
        save(root / labels.format(n), label)
    return root


def config(folder, name="train"):
    return yaml.safe_load((folder / f"configs/{name}.yaml").read_text(encoding="utf-8"))


def make(tmp_path, root, name="organ", **options):
    new_bundle(name, str(root), bundles_dir=tmp_path / "bundles", **{**SMALL, **options})
    return tmp_path / f"bundles/hybridmim_{name}_seg"


@pytest.fixture
def folders(tmp_path):
    return write_set(tmp_path / "set", "images/ct_{}.nii.gz", "labels/ct_{}.nii.gz")


# ----------------------------------------------------------------------------------------------------------- layouts


def decathlon(root):
    write_set(root, "imagesTr/a_{}.nii.gz", "labelsTr/a_{}.nii.gz")
    entries = [{"image": f"imagesTr/a_{n}.nii.gz", "label": f"labelsTr/a_{n}.nii.gz"} for n in range(5)]
    labels = {"0": "background", "1": "Left kidney", "2": "cyst"}
    write_json(root / "dataset.json", {"modality": {"0": "CT"}, "labels": labels, "training": entries})


def nnunet(root):
    for n in range(5):
        image, label = draw(n, mr=True)
        save(root / f"imagesTr/a_{n}_0000.nii.gz", image)
        save(root / f"imagesTr/a_{n}_0001.nii.gz", 2 * image)
        save(root / f"labelsTr/a_{n}.nii.gz", label)
    names = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz"}
    write_json(root / "dataset.json", {**names, "labels": {"background": 0, "whole": [1, 2], "core": 2}})


LAYOUTS = {
    "folders": (
        lambda root: write_set(root, "images/a_{}.nii.gz", "labels/a_{}.nii.gz"),
        {"class_1": [1], "class_2": [2]},
    ),
    "nnunet": (nnunet, {"whole": [1, 2], "core": [2]}),
    "decathlon": (decathlon, {"Left_kidney": [1], "cyst": [2]}),
    "btcv": (lambda root: write_set(root, "img{:04d}.nii.gz", "label{:04d}.nii.gz"), {"class_1": [1], "class_2": [2]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_a_bundle_that_finds_and_accepts_its_cases(tmp_path, layout, capsys):
    write, classes = LAYOUTS[layout]
    write(tmp_path / "set")
    folder = make(tmp_path, tmp_path / "set")
    written = config(folder)
    assert written["classes"] == classes
    assert written["in_channels"] == (2 if layout == "nnunet" else 1)
    assert written["activation"] == ("sigmoid" if layout == "nnunet" else "softmax")
    assert written["modalities"] == (["0000", "0001"] if layout == "nnunet" else None)
    assert ("window" in written) == (layout != "nnunet")
    assert len(find_cases(tmp_path / "set", written["layout"], written["modalities"])) == 5
    capsys.readouterr()
    check(str(tmp_path / "set"), bundle=str(folder), workers=0)  # ends with status 1 if anything is wrong
    assert "WARNING" not in capsys.readouterr().out


def test_the_files_of_brats_are_channels_by_name(tmp_path):
    sample_data(str(tmp_path / "set"), "brats", cases=2)
    written = config(make(tmp_path, tmp_path / "set", classes={"whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]}))
    assert (written["layout"], written["modalities"]) == ("brats", ["t1", "t1ce", "t2", "flair"])
    assert written["intensity"]["_target_"] == "NormalizeIntensityd"  # it is skull-stripped


def test_a_data_list_names_cases_and_classes(tmp_path, folders):
    write_json(folders / "dataset.json", {"channel_names": {"0": "CT"}, "labels": {"background": 0, "b": 2, "a": 1}})
    msd(str(folders), str(tmp_path / "list.json"), folds=2)
    folder = make(tmp_path, folders, datalist=str(tmp_path / "list.json"))
    assert config(folder)["classes"] == {"a": [1], "b": [2]}
    assert list(config(folder)["classes"]) == ["a", "b"]  # in the order of the channels of the network
    decisions = json.loads((folder / "docs/plan.json").read_text())["decisions"]
    assert decisions[0]["why"] == "as the data list says"
    training, validation = (
        len(json.loads((tmp_path / "list.json").read_text())[part]) for part in ("training", "validation")
    )
    assert decisions[0]["decided"] == f"{validation} validate" != "1 validate"  # as of five folds
    assert any(row["found"].startswith(f"{training} cases to train") for row in decisions)


def test_the_plan_is_kept_and_says_why(tmp_path, folders, capsys):
    folder = make(tmp_path, folders, classes={"kidney": [1], "tumour": [2]})
    record = json.loads((folder / "docs/plan.json").read_text())
    assert record["classes"]["kidney"] == {"values": [1], "ml": 7.29}  # 9³ voxels of 10 mm³
    written, printed = config(folder), capsys.readouterr().out
    for row in record["decisions"]:
        assert row["found"] and row["decided"] and row["why"]
        assert row["what"].split()[0] in printed
    assert written["spacing"] == [2.0, 2.0, 2.5]
    assert written["window"][0] > -1000  # air is outside of the labels
    assert written["flip_probability"][0] == 0  # the boxes always lie side by side
    marks = {path.name for path in folder.rglob("*") if path.is_file() and "TO FILL IN" in path.read_text()}
    assert marks == {"metadata.json", "README.md", "data_license.txt", "plan.json"}
    assert not [name for name in (path.name for path in folder.parent.iterdir()) if name.startswith(".")]


def test_any_name_stands_in_the_files(tmp_path):
    root = write_set(tmp_path / 'my "set" #1', "images/{}.nii.gz", "labels/{}.nii.gz", cases=2)
    labels = {"0": "background", "1": 'left "kidney" # <<x>>\n', "2": "no"}
    write_json(root / "dataset.json", {"name": 'a "b"\n: #% if %#', "labels": labels, "training": entries(root)})
    folder = make(tmp_path, root)
    assert config(folder)["classes"] == {"left_kidney_x": [1], "class_no": [2]}
    meta = json.loads((folder / "configs/metadata.json").read_text(encoding="utf-8"))
    assert 'a "b" : #% if %#' in meta["data_source"]


def entries(root):
    names = sorted(path.name for path in (root / "images").iterdir())
    return [{"image": f"images/{name}", "label": f"labels/{name}"} for name in names]


@pytest.mark.parametrize("name", ["on", "null", "1", "2e3", "", "#", "0x1f", "Größe", "a b"])
def test_an_identifier_is_a_text_in_yaml(name):
    found = identifier(name)
    assert yaml.safe_load(f"{found}: 1") == {found: 1}
    assert re.fullmatch(r"\w+", found)


# ------------------------------------------------------------------------------------------------ pre-trained weights


NETWORKS = {
    "UNet": (lambda: BasicUNet(3, 1, 1, [8, 8, 16, 32, 64, 8]), "BasicUNet", 16),
    "SwinUNETR": (lambda: SwinUNETR(in_channels=1, out_channels=1, feature_size=12), "SwinUNETR", 32),
    "SwinUNETR v2": (lambda: SwinUNETR(1, 1, feature_size=12, use_v2=True), "SwinUNETR", 32),
    "ViT": (lambda: ViT(1, (32,) * 3, (16,) * 3, 24, 48, 2, 2), "UNETR", 16),
}


def backbone(folder, network):
    """Pre-trained weights with their card."""
    window = {**config(BUNDLES / "hybridmim_pretrain"), "window": [-1000, 1000]}
    parser = ConfigParser({key: window[key] for key in ("intensity", "window")})
    how = Preparation([2.0, 2.0, 3.0], parser.get_parsed_content("intensity"), Above(0.25))
    card = training_card(network, how, [32, 32, 32], 9, BUNDLES / "hybridmim_pretrain")
    save_weights(folder / "backbone.pt", network.state_dict(), card)
    return folder / "backbone.pt", how, card


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_bring_their_network_and_preparation(tmp_path, folders, kind):
    make_network, named, stride = NETWORKS[kind]
    weights, how, card = backbone(tmp_path, make_network())
    folder = make(tmp_path, folders, pretrained=str(weights), small=False)
    for name in ("train", "inference"):
        parser = ConfigParser(config(folder, name))
        parser.update({"bundle_root": str(folder), "pretrained": str(weights)})
        own = parser.get_parsed_content("prepared" if name == "train" else "own")
        assert own.plain() == how.plain()
        assert [line for line in own.lines if line[0] == "WARNING"] == []
        network = parser.get_parsed_content("network_def")
        assert named in {type(network).__name__, *(base.__name__ for base in type(network).__mro__)}
        assert different(card["network"], {**describe_network(network), "name": kind.split()[0]}) == {}
        assert parser["stride"] == stride
    assert_documented(folder)


def assert_documented(folder):
    """The README's table of keys has the defaults of the bundle's own train.yaml."""
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| .+ \|$", (folder / "docs/README.md").read_text(), re.MULTILINE)
    written = config(folder)
    listed = [(key, yaml.safe_load(value)) for key, value in rows if key in written]
    assert list(map(repr, listed)) == [repr(item) for item in written.items() if is_plain(item[1])]


def test_a_small_bundle_is_small_in_its_own_configs(tmp_path, folders):
    folder = make(tmp_path, folders, small="true")  # as it is typed
    written, overlay = config(folder), config(folder, "small")
    for key in overlay.keys() - {"epochs"}:
        assert written[key] == overlay[key]
    assert config(folder, "inference")["unet_features"] == overlay["unet_features"]
    assert written["epochs"] * 2 >= 1500  # steps of two of the four cases
    assert_documented(folder)


def test_weights_without_a_card_are_refused(tmp_path, folders):
    weights, *_ = backbone(tmp_path, NETWORKS["UNet"][0]())
    weights.with_suffix(".json").unlink()
    with pytest.raises(CardError, match=r"backbone.json does not exist, expected the card"):
        make(tmp_path, folders, pretrained=str(weights))
    with pytest.raises(CardError, match=r"nowhere.pt does not exist, expected backbone.pt"):
        make(tmp_path, folders, pretrained=str(tmp_path / "nowhere.pt"))


def test_weights_of_ct_are_refused_for_mr(tmp_path):
    root = write_set(tmp_path / "set", "images/{}.nii.gz", "labels/{}.nii.gz", cases=2, mr=True)
    weights, *_ = backbone(tmp_path, NETWORKS["UNet"][0]())
    with pytest.raises(ScanError, match=r"trained on a window of \[-1000.*\] HU, but the scans are MR"):
        make(tmp_path, root, pretrained=str(weights))


# ---------------------------------------------------------------------------------------------------------- bad input


def unlabelled(root):
    save(root / "images/a.nii.gz", draw(0)[0])


def strangers(root):
    write_set(root, "images/ct_{}.nii.gz", "labels/seg_{}.nii.gz", cases=2)


def partly(root):
    write_set(root, "images/{}.nii.gz", "labels/{}.nii.gz", cases=3)
    (root / "labels/1.nii.gz").unlink()


def flat(root):
    for n in range(2):
        for part in ("images", "labels"):
            save(root / f"{part}/a{n}.nii.gz", np.ones((30, 30, 1)))


def values(*found):
    return lambda root: write_set(root, "images/{}.nii.gz", "labels/{}.nii.gz", cases=2, values=found)


def pictures(root):
    write_set(root, "images/{}.nii.gz", "labels/{}.nii.gz", cases=2, mr=True)


CT = values(1, 2)
WRONG = {
    "no folder": (lambda root: None, {}, "dataset_dir: .*set does not exist"),
    "no labels": (unlabelled, {}, "found no labelled case but images/ .*expected dataset.json.*tools plan"),
    "no common name": (strangers, {}, "no image and label share a name: found ct_0.*in images and seg_0.*rename them"),
    "one without": (partly, {}, r"(?s)1 problem.*images/1.nii.gz has no label, expected 1.nii.gz.*in a datalist"),
    "one case": (
        lambda root: write_set(root, "images/{}.nii.gz", "labels/{}.nii.gz", cases=1),
        {},
        "found 1 labelled case .*, expected at least 2",
    ),
    "absent class": (
        CT,
        {"classes": {"a": [1], "b": [2], "c": [3]}},
        r"no voxel of c in 2 labels .*\[1, 2\].*--classes",
    ),
    "unknown value": (CT, {"classes": {"a": [1]}}, "unknown label values: found 2 .*expected 0, 1"),
    "empty labels": (values(), {}, "found no labelled voxel in 2 labels"),
    "no class": (CT, {"classes": ["a"]}, r"classes: found \['a'\], expected names and their label values"),
    "background": (CT, {"classes": {"air": [0]}}, r"found \[0\] for air, .*above 0"),
    "no label map": (CT, {"classes": {"a": [1, 2]}}, r"a has the exclusive label values \[1, 2\].*expected one"),
    "2D": (flat, {}, r"2 of 2 cases cannot be used.*(?s:.*)is 2D: found a single slice"),
    "memory": (
        CT,
        {"memory_gb": 0.01},
        r"memory_gb: found 0.01 GB, expected at least .* GB for a batch of 1 crop.s. of 32×32×32",
    ),
    "no memory": (CT, {"memory_gb": 0}, "memory_gb: found 0, expected GB above 0"),
    "name": (CT, {"name": "my organ"}, "name: found 'my organ', expected letters, digits and underscores"),
    "no HU": (pictures, {"modality": "CT"}, r"found CT \(--modality\), but .*nothing below -200.*--modality MR"),
    "HU": (CT, {"modality": "MR"}, r"found MR \(--modality\), but all 2 scans have values below -200.*--modality CT"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, fault):
    write, options, message = WRONG[fault]
    write(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tmp_path / "set", **options)
    assert not (tmp_path / "bundles").exists() or not list((tmp_path / "bundles").iterdir())


def test_an_existing_bundle_is_not_touched(tmp_path, folders):
    folder = make(tmp_path, folders)
    (folder / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"hybridmim_organ_seg exists already, expected a new name"):
        make(tmp_path, folders)
    assert (folder / "mine.txt").exists()


def test_what_is_not_fit_is_not_left(tmp_path, folders, monkeypatch):
    """The disk is full, the template is broken …: nothing half-written stays."""
    monkeypatch.setattr("tools.commands.new_bundle.write_json", lambda path, record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path, folders)
    assert list((tmp_path / "bundles").iterdir()) == []


@pytest.mark.parametrize("labels", [["a"], {"a": None}, {"one": "a"}])
def test_labels_that_name_nothing_are_refused(tmp_path, folders, labels):
    write_json(folders / "dataset.json", {"file_ending": ".nii.gz", "labels": labels})
    with pytest.raises(ScanError, match=r"labels: found .*expected value → name"):
        make(tmp_path, folders)


def test_labels_to_ignore_are_refused(tmp_path, folders):
    write_json(folders / "dataset.json", {"file_ending": ".nii.gz", "labels": {"background": 0, "a": 1, "ignore": 2}})
    with pytest.raises(ScanError, match=r"found 'ignore' \(\[2\]\), expected classes"):
        make(tmp_path, folders)


# ----------------------------------------------------------------------------------------------------- a whole bundle


@pytest.mark.slow
def test_a_new_bundle_trains_evaluates_segments_and_is_released(tmp_path, folders, command):
    """Typed as a new user would, from the folder of scans to the zip."""
    done = command(
        *("-m", "tools", "new_bundle", "organ", "--dataset_dir", folders, "--classes", "{kidney: [1], cyst: [2]}"),
        *("--bundles_dir", tmp_path, "--small", "true", "--memory_gb", 4),
    )
    folder = tmp_path / "hybridmim_organ_seg"
    lines = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("python -m monai.bundle")]
    assert len(lines) == 3
    tiny = ("--unet_features", "[4,4,8,8,16,4]", "--roi_size", "[32,32,32]")
    for line in lines:
        words = [word.strip('"') for word in line[1:]]
        words = [str(folders) if word == "/path/to/scans" else word for word in words]
        training = ("--epochs", 1, "--num_workers", 0) if "training" in words else ()
        command(*words, *tiny, *training)
    measured = (folder / "eval/evaluation_cases.csv").read_text().splitlines()
    assert {row.split(",")[1] for row in measured[1:]} >= {"kidney", "cyst"}
    maps = sorted((folder / "eval").rglob("ct_0_seg.nii.gz"))
    assert nib.load(maps[0]).shape == SHAPE
    tiny_text = folder / "configs/inference.yaml"
    tiny_text.write_text(
        re.sub(r"(?m)^unet_features: \[.*\]", "unet_features: [4, 4, 8, 8, 16, 4]", tiny_text.read_text())
    )
    verify(str(folder))
    release(str(folder), output=str(tmp_path / "dist"))
    (archive,) = (tmp_path / "dist").glob("*.zip")
    names = zipfile.ZipFile(archive).namelist()
    assert {f"{folder.name}/{name}" for name in ("models/model.pt", "models/model.json", "docs/plan.json")} <= {*names}


def test_head_and_neck(tmp_path, shared_data):
    """Real CT, of which the sides of the parotids must not be mirrored."""
    root = shared_data / "Task_HeadNeckCT"
    content = json.loads((root / "dataset.json").read_text())
    write_json(tmp_path / "few.json", {**content, "training": content["training"][:4]})
    folder = make(tmp_path, root, datalist=str(tmp_path / "few.json"))
    written = config(folder)
    assert list(written["classes"]) == ["brainstem", "spinal_cord", "right_parotid", "left_parotid", "mandible"]
    assert written["flip_probability"][0] == 0
    assert 3.7 < written["spacing"][0] < 5  # no finer than the scans
    assert written["window"][0] < 0 < written["window"][1]
