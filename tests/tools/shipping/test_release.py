"""Releases: what is in a zip and what is not, that it is always the same, variants, and what is refused."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.networks.nets import UNETR

from tools.common.cards import card_path, save_weights
from tools.shipping.install import install
from tools.shipping.monailabel import require_bundle
from tools.shipping.release import merge_overlay, release, stage
from tools.shipping.verify import BUNDLES, BundleError, build_network, find_bundles, verify
from tools.weights.networks import describe_network

NAMES = [folder.name for folder in find_bundles(())]
EVERY_BUNDLE = pytest.mark.parametrize("name", NAMES)
MODULES = {"pytorch-ignite": "ignite", "pyyaml": "yaml"}  # where they are not called as the package is
NOT_IN_A_RUN = {"jsonschema", "highdicom"}  # verify does without; for dicom_seg.yaml alone


@pytest.fixture(scope="module")
def dist(sources, tmp_path_factory):
    """All bundles, released."""
    folder = tmp_path_factory.mktemp("dist")
    release(*(str(sources / name) for name in NAMES), output=str(folder), base_url="https://example.org/files/")
    return folder


@pytest.fixture(scope="module")
def variants(sources, tmp_path_factory):
    """All bundles as SwinUNETR variants, unpacked."""
    folder = tmp_path_factory.mktemp("variants")
    release(*(str(sources / name) for name in NAMES), output=str(folder), variant="swin_unetr")
    for archive in folder.glob("*.zip"):
        zipfile.ZipFile(archive).extractall(folder)
    return folder


@pytest.fixture
def bundle(sources, tmp_path):
    """A copy of the hippocampus bundle, to be changed."""
    return Path(shutil.copytree(sources / "hybridmim_hippocampus_seg", tmp_path / "source/hybridmim_hippocampus_seg"))


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def members(archive):
    return zipfile.ZipFile(archive).namelist()


# ------------------------------------------------------------------------------------------------ what is inside


@EVERY_BUNDLE
def test_a_zip_holds_the_bundle_and_the_tools(dist, sources, name):
    names = set(members(dist / f"{name}_v0.1.0.zip"))
    source = sources / name
    expected = {
        path.relative_to(source).as_posix() for part in ("configs", "docs") for path in (source / part).iterdir()
    }
    expected |= {path.relative_to(BUNDLES.parent).as_posix() for path in (BUNDLES.parent / "tools").rglob("*.py")}
    expected |= {f"scripts/{path.name}" for path in (source / "scripts").glob("*.py")}
    expected |= {"LICENSE", "README.md"}
    assert names == {f"{name}/{path}" for path in expected}


def test_what_runs_leave_behind_stays_out(bundle, tmp_path):
    torch.save(build_network(bundle).state_dict(), tmp_path / "model.pt")
    left = ["models/checkpoint_epoch=1.pt", "models/model.ts", "eval/metrics.csv", "eval/cache/a.pt", "mlruns.db"]
    left += [
        "data/scan.nii.gz",
        "configs/.hidden.yaml",
        "docs/.DS_Store",
        "scripts/__pycache__/a.pyc",
        "large_files.yml",
    ]
    for name in left:
        (bundle / name).parent.mkdir(exist_ok=True, parents=True)
        (bundle / name).write_text("large_files: []" if name.endswith(".yml") else "x")
    shutil.copy(tmp_path / "model.pt", bundle / "models/model.pt")
    release(str(bundle), output=str(tmp_path))
    names = [name.partition("/")[2] for name in members(tmp_path / f"{bundle.name}_v0.1.0.zip")]
    assert "models/model.pt" in names
    assert not set(left) & set(names)


def test_the_same_files_give_the_same_bytes(bundle, tmp_path):
    for run in ("a", "b"):
        release(str(bundle), output=str(tmp_path / run))
        for number, path in enumerate(sorted(bundle.rglob("*"))):
            os.utime(path, (number * 1e6, number * 1e6))
            path.chmod(0o700)
    first, second = (tmp_path / run / f"{bundle.name}_v0.1.0.zip" for run in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    entries = zipfile.ZipFile(first).infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert {(entry.date_time, entry.external_attr >> 16, entry.compress_type) for entry in entries} == {
        ((1980, 1, 1, 0, 0, 0), 0o100644, zipfile.ZIP_STORED)
    }


def test_model_info_is_that_of_the_zoo(dist):
    info = json.loads((dist / "model_info.json").read_text())
    assert sorted(info) == [f"{name}_v0.1.0" for name in NAMES]
    for key, entry in info.items():
        archive = dist / f"{key}.zip"
        assert entry == {
            "checksum": hashlib.sha1(archive.read_bytes()).hexdigest(),
            "source": f"https://example.org/files/{archive.name}",
        }


def test_model_info_keeps_earlier_releases(bundle, tmp_path):
    (tmp_path / "model_info.json").write_text(json.dumps({"other_v1.0.0": {"checksum": "1", "source": "2"}}))
    release(str(bundle), output=str(tmp_path))
    info = json.loads((tmp_path / "model_info.json").read_text())
    assert info["other_v1.0.0"] == {"checksum": "1", "source": "2"}
    assert info[f"{bundle.name}_v0.1.0"]["source"] == ""


@EVERY_BUNDLE
def test_the_readme_is_a_model_card_whose_links_exist(dist, name, tmp_path):
    zipfile.ZipFile(dist / f"{name}_v0.1.0.zip").extractall(tmp_path)
    text = (tmp_path / name / "README.md").read_text()
    matter = yaml.safe_load(re.match(r"---\n(.*?)^---\n", text, re.DOTALL | re.MULTILINE)[1])
    assert matter == {"library_name": "monai", "license": "apache-2.0", "tags": ["monai", "medical"]}
    for page in ("README.md", "docs/README.md"):
        content = (tmp_path / name / page).read_text()
        links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", content) if ":" not in link]
        assert "LICENSE" in {Path(link).name for link in links}
        assert [link for link in links if not (tmp_path / name / page).parent.joinpath(link).exists()] == []


@EVERY_BUNDLE
def test_metadata_names_every_package_that_is_imported(dist, name, tmp_path):
    archive = zipfile.ZipFile(dist / f"{name}_v0.1.0.zip")
    meta = json.loads(archive.read(f"{name}/configs/metadata.json"))
    known = {MODULES.get(package, package) for package in meta["required_packages_version"]}
    known |= {"monai", "torch", "numpy", "tools", "scripts"} | set(sys.stdlib_module_names)
    for file in archive.namelist():
        for node in ast.walk(ast.parse(archive.read(file))) if file.endswith(".py") else ():
            imported = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {module.partition(".")[0] for module in imported} <= known | NOT_IN_A_RUN, file


# ---------------------------------------------------------------------------------------------------- variants


@EVERY_BUNDLE
def test_a_variant_is_what_monai_makes_of_config_and_overlay(variants, name):
    source, made = BUNDLES / name / "configs", variants / f"{name}_swin_unetr/configs"
    for config in ("train", "inference"):
        expected = ConfigParser.load_config_files([source / f"{config}.yaml", source / "swin_unetr.yaml"])
        found = ConfigParser.load_config_file(made / f"{config}.yaml")
        alone = ConfigParser.load_config_file(source / f"{config}.yaml")
        assert found == {key: value for key, value in expected.items() if key in alone}
        comments = re.findall(r"^# ----.*$", (source / f"{config}.yaml").read_text(), re.MULTILINE)
        assert comments == re.findall(r"^# ----.*$", (made / f"{config}.yaml").read_text(), re.MULTILINE)


@EVERY_BUNDLE
def test_a_variant_says_what_it_is(variants, name):
    folder = variants / f"{name}_swin_unetr"
    assert (variants / f"{folder.name}_v0.1.0.zip").is_file()
    meta = json.loads((folder / "configs/metadata.json").read_text())
    assert meta["name"].endswith("(swin_unetr)")
    train = yaml.safe_load((folder / "configs/train.yaml").read_text())
    for part in (meta["network_data_format"]["inputs"]["image"], meta["network_data_format"]["outputs"]["pred"]):
        assert part["spatial_shape"] == train["roi_size"]
    page = (folder / "docs/README.md").read_text()
    assert f"bundles/{folder.name}/configs/train.yaml" in page
    assert f"bundles/{name}/" not in page
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page, re.MULTILINE))
    assert {key: yaml.safe_load(listed[key]) for key in ("roi_size", "learning_rate", "weight_decay")} == {
        key: train[key] for key in ("roi_size", "learning_rate", "weight_decay")
    }


def test_values_that_a_variant_leaves_as_they_are_do_not_differ(bundle, tmp_path):
    folder = stage(bundle, tmp_path, "unetr")
    network = build_network(folder)
    assert isinstance(network, UNETR)
    train = yaml.safe_load((folder / "configs/train.yaml").read_text())
    assert [16 * side for side in network.feat_size] == train["roi_size"]
    page = (folder / "docs/README.md").read_text()
    assert f"This is `{bundle.name}` with `unetr.yaml` merged into its configs.\n" in page
    assert "Values that differ" not in page
    assert (
        "Values that differ on this page: `stride` 32"
        in (stage(bundle, tmp_path, "swin_unetr") / "docs/README.md").read_text()
    )


def test_weights_of_a_run_go_into_a_variant(bundle, tmp_path):
    network = build_network(stage(bundle, tmp_path / "first", "swin_unetr"))
    torch.save(network.state_dict(), tmp_path / "run.pt")
    release(str(bundle), output=str(tmp_path), variant="swin_unetr", weights=str(tmp_path / "run.pt"))
    archive = zipfile.ZipFile(tmp_path / f"{bundle.name}_swin_unetr_v0.1.0.zip")
    assert archive.read(f"{bundle.name}_swin_unetr/models/model.pt") == (tmp_path / "run.pt").read_bytes()


def test_a_small_bundle_needs_no_overlay_in_monai_label(tmp_path):
    """MONAI Label reads train.yaml and inference.yaml alone, and checks no weights: `require_bundle` does."""
    source = BUNDLES / "hybridmim_btcv_seg"
    overlays = [source / f"configs/{name}.yaml" for name in ("inference", "small", "flips")]
    parser = ConfigParser(ConfigParser.load_config_files(overlays))
    parser["bundle_root"] = str(source)
    torch.save(parser.get_parsed_content("network_def").state_dict(), tmp_path / "run.pt")
    release(str(source), output=str(tmp_path), variant="small,flips", weights=str(tmp_path / "run.pt"))
    name = "hybridmim_btcv_seg_small_flips"
    zipfile.ZipFile(tmp_path / f"{name}_v0.1.0.zip").extractall(tmp_path)
    folder = require_bundle(tmp_path / name)
    train, inference = (yaml.safe_load((folder / f"configs/{c}.yaml").read_text()) for c in ("train", "inference"))
    for config in (train, inference):
        assert (config["unet_features"], config["spacing"]) == ([16, 16, 32, 64, 128, 16], [3.0] * 3)
    assert (train["epochs"], inference["flip_axes"]) == (40, [1])
    page = (folder / "docs/README.md").read_text()
    assert "This is `hybridmim_btcv_seg` with `small.yaml` and `flips.yaml` merged into its configs." in page


def save_run(folder, bundle):
    """`model.pt` with its card, as a run of the bundle writes them."""
    network = build_network(bundle)
    intensity = {"scaling": "percentiles", "range": [5, 90], "to": [0.001, 1.0]}
    preparation = {"orientation": "RAS", "spacing": [2, 2, 2], "intensity": intensity, "foreground_above": 0.01}
    card = {"network": describe_network(network), "preparation": preparation, "roi_size": [48, 64, 48], "versions": {}}
    save_weights(folder / "model.pt", network.state_dict(), card)
    return folder / "model.pt"


def test_a_card_goes_with_its_weights_and_is_used_after_installation(bundle, tmp_path):
    weights = save_run(bundle / "models", bundle)
    release(str(bundle), output=str(tmp_path))
    archive = tmp_path / f"{bundle.name}_v0.1.0.zip"
    install(archive.as_uri(), hashlib.sha256(archive.read_bytes()).hexdigest(), str(tmp_path / "installed"))
    folder = tmp_path / "installed" / bundle.name
    assert (folder / "models/model.json").read_bytes() == card_path(weights).read_bytes()
    verify(str(folder))
    parser = ConfigParser()
    parser.read_config(folder / "configs/inference.yaml")
    parser["bundle_root"] = str(folder)
    assert parser.get_parsed_content("as_trained").spacing == [2, 2, 2]


def test_weights_of_a_run_bring_their_own_card_or_none(bundle, tmp_path):
    save_run(bundle / "models", bundle)
    other = save_run(tmp_path / "run", bundle)
    release(str(bundle), output=str(tmp_path / "with"), weights=str(other))
    card_path(other).unlink()
    release(str(bundle), output=str(tmp_path / "without"), weights=str(other))
    name = f"{bundle.name}_v0.1.0.zip"
    assert f"{bundle.name}/models/model.json" in members(tmp_path / "with" / name)
    assert f"{bundle.name}/models/model.json" not in members(tmp_path / "without" / name)


def test_a_card_of_other_weights_is_not_released(bundle, tmp_path):
    weights = save_run(bundle / "models", bundle)
    torch.save(build_network(bundle).state_dict(), weights)
    refused(bundle, tmp_path, r"model\.json: belongs to other weights")


def test_comments_stay_when_an_overlay_is_merged():
    config = "a: 1  # what a is\nb:  # what b is\n  c: 2\n\n# ---- part\nd:\n- 3\ne: 4\n"
    assert merge_overlay(config, "# overlay\na: 5\nb:\n  f: 6\nd: []\nother: 7\n") == (
        "a: 5  # what a is\nb:\n  f: 6\n\n# ---- part\nd: []\ne: 4\n"
    )


def test_an_overlay_of_an_unknown_layout_is_not_merged():
    with pytest.raises(BundleError, match="could not be merged"):
        merge_overlay("a:\n  b: 1\n# a comment at the margin\n  c: 2\n", "a:\n  b: 2\n")


# -------------------------------------------------------------------------------------------- what is refused


def refused(folder, tmp_path, match, **options):
    with pytest.raises(BundleError, match=match):
        release(str(folder), output=str(tmp_path / "dist"), **options)
    assert not (tmp_path / "dist").exists()


def test_weights_of_another_network_are_refused(bundle, tmp_path):
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "other.pt")
    refused(bundle, tmp_path, "conv.weight", weights=str(tmp_path / "other.pt"))
    (bundle / "models").mkdir()
    torch.save(build_network(bundle).state_dict(), bundle / "models/model.pt")
    refused(bundle, tmp_path, rf"{bundle.name}_swin_unetr/models/model\.pt", variant="swin_unetr")


def test_weights_are_for_one_bundle(tmp_path):
    with pytest.raises(BundleError, match="--weights: found 2 bundles"):
        release(*NAMES[:2], output=str(tmp_path / "dist"), weights="model.pt")


def test_one_bad_bundle_stops_all(bundle, sources, tmp_path):
    edit(bundle / "configs/metadata.json", version="0.2.0")
    with pytest.raises(BundleError):
        release(str(sources / NAMES[0]), str(bundle), output=str(tmp_path / "dist"))
    assert not (tmp_path / "dist").exists()


def test_an_unknown_variant_is_refused(bundle, tmp_path):
    refused(bundle, tmp_path, r"has no configs/vit\.yaml", variant="vit")


def test_a_variant_that_sets_unknown_keys_is_refused(bundle, tmp_path):
    (bundle / "configs/vit.yaml").write_text("no_such_key: 1\n")
    refused(bundle, tmp_path, r"vit\.yaml sets \['no_such_key'\]", variant="vit")


def test_large_files_must_be_there_and_right(bundle, tmp_path):
    entry = {"path": "models/model.pt", "url": "https://example.org/model.pt", "hash_type": "sha256"}
    torch.save(build_network(bundle).state_dict(), tmp_path / "model.pt")
    entry["hash_val"] = hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest()
    (bundle / "large_files.yml").write_text(yaml.safe_dump({"large_files": [entry]}))
    refused(bundle, tmp_path, "python -m monai.bundle download_large_files --bundle_path")
    (bundle / "models").mkdir()
    (bundle / "models/model.pt").write_text("another file")
    refused(bundle, tmp_path, "found another sha256 than large_files.yml gives")
    shutil.copy(tmp_path / "model.pt", bundle / "models/model.pt")
    release(str(bundle), output=str(tmp_path / "dist"))
