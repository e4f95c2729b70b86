"""The checks of the Model Zoo: all bundles and a variant pass, and each check finds what it is for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tools.shipping.release import stage
from tools.shipping.verify import (
    BUNDLES,
    BundleError,
    build_network,
    find_bundles,
    network_checks,
    static_checks,
    verify,
)

NAMES = [folder.name for folder in find_bundles(())]


@pytest.fixture
def bundle(sources, tmp_path):
    """A copy of the hippocampus bundle with a tiny network."""
    folder = Path(shutil.copytree(sources / "hybridmim_hippocampus_seg", tmp_path / "hybridmim_hippocampus_seg"))
    for path in (folder / "configs").glob("*.yaml"):
        path.write_text(path.read_text().replace("[64, 64, 128, 256, 512, 64]", "[4, 4, 8, 8, 16, 4]"))
    return folder


def problems(checks):
    return [problem for check in checks for problem in check.problems]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", NAMES)
def test_every_bundle_passes(sources, name, capsys):
    verify(str(sources / name))
    out = capsys.readouterr().out
    assert out.startswith(f"{name}\n")
    assert "wrong" not in out
    for title in (
        "metadata",
        "licence",
        "links in README.md",
        "network in and out",
        "TorchScript",
        "workflow properties",
    ):
        assert f"  {title:22}ok" in out
    assert "skipped: no --schema" in out


@pytest.mark.parametrize("name", NAMES)
def test_every_bundles_metadata_satisfies_the_schema(name, shared_data):
    checks = static_checks(BUNDLES / name, shared_data / "meta_schema.json")
    assert {check.title: check.skipped for check in checks}["metadata schema"] == ""
    assert problems(checks) == []


@pytest.mark.parametrize("variant", ["swin_unetr", "unetr"])
def test_a_released_variant_passes(sources, tmp_path, variant):
    """SwinUNETR, which is exported by tracing, and UNETR, which takes one window alone."""
    folder = stage(sources / "hybridmim_hippocampus_seg", tmp_path, variant)
    for path in (folder / "configs").glob("*.yaml"):
        text = path.read_text().replace("swin_feature_size: 48", "swin_feature_size: 12")
        path.write_text(text.replace("vit_hidden_size: 768", "vit_hidden_size: 48"))
    assert problems(static_checks(folder) + network_checks(folder)) == []


def test_own_weights_are_checked_and_exported(bundle):
    (bundle / "models").mkdir()
    torch.save(build_network(bundle).state_dict(), bundle / "models/model.pt")
    checks = network_checks(bundle)
    assert problems(checks) == []
    assert not any(check.skipped for check in checks)
    torch.save({"a": torch.ones(1)}, bundle / "models/model.pt")
    assert any("WeightsError" in problem for problem in problems(network_checks(bundle)))


def test_two_bundles_with_scripts_do_not_mix(sources, tmp_path):
    """Each imports its own `scripts`, and nothing of them is left."""
    before, path = {name for name in sys.modules if name.startswith("scripts")}, list(sys.path)
    folder = Path(shutil.copytree(sources / "hybridmim_pretrain", tmp_path / "other"))
    edit(folder / "scripts/hybridmim.py", "class HybridMIM(", "class Renamed(")
    assert any("HybridMIM" in problem for problem in problems(network_checks(folder)))
    assert {name for name in sys.modules if name.startswith("scripts")} == before
    assert sys.path == path


# ------------------------------------------------------------------------------- what the checks of files find


@pytest.mark.parametrize(
    ("config", "text", "found"),
    [
        ("metadata.json", "{", "is not valid JSON"),
        ("train.yaml", "a: [1", "ParserError"),
        ("inference.yaml", "a: 1\na: 2\n", "Duplicate key"),
        ("evaluate.yaml", "a: '%no'\n", "KeyError"),
        ("small.yaml", "evaluator#amp: false\n", "KeyError"),  # of inference, but this is an overlay on training
    ],
)
def test_a_config_that_cannot_be_read_is_found(bundle, config, text, found):
    (bundle / "configs" / config).write_text(text)
    assert any(
        f"{bundle}/configs/{config}: " in problem and found in problem for problem in problems(static_checks(bundle))
    )


@pytest.mark.parametrize("file", ["LICENSE", "configs/metadata.json", "configs/inference.yaml", "docs/README.md"])
def test_a_missing_file_is_found(bundle, file):
    (bundle / file).unlink()
    assert problems(static_checks(bundle)) == [f"{bundle / file}: does not exist, but is necessary"]


def test_another_licence_is_found(bundle):
    (bundle / "LICENSE").write_text("All rights reserved.")
    assert problems(static_checks(bundle)) == [f"{bundle}/LICENSE: is not the Apache License, Version 2.0"]


def test_a_missing_data_licence_is_found(bundle):
    (bundle / "docs/data_license.txt").unlink()
    assert f"{bundle}/docs/README.md: data_license.txt does not exist" in problems(static_checks(bundle))


def test_a_large_file_is_found(bundle):
    with (bundle / "docs/figure.png").open("wb") as file:
        file.truncate(26 * 2**20)
    assert problems(static_checks(bundle)) == [f"{bundle}/docs/figure.png: 26 MB, expected 25 MB at most"]


def test_a_large_file_without_a_hash_is_found(bundle):
    entry = {"path": "models/model.pt", "url": "https://example.org/model.pt", "hash_type": "sha256"}
    (bundle / "large_files.yml").write_text(yaml.safe_dump({"large_files": [entry]}))
    assert problems(static_checks(bundle)) == [f"{bundle}/large_files.yml: models/model.pt has no hash_val"]


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("version", "0.1", "version is '0.1', expected three numbers as in 0.1.0"),
        ("changelog", {}, "version 0.1.0 has no entry in changelog []"),
        ("changelog", None, "changelog is NoneType, expected dict"),
        ("optional_packages_version", {}, "required_packages_version and optional_packages_version differ"),
    ],
)
def test_wrong_metadata_is_found(bundle, key, value, found):
    path = bundle / "configs/metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert any(found in problem for problem in problems(static_checks(bundle)))


def test_metadata_against_the_schema_is_found(bundle, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps({"properties": {"version": {"type": "number"}}}))
    (problem,) = problems(static_checks(bundle, tmp_path / "schema.json"))
    assert problem == f"{bundle}/configs/metadata.json: version: '0.1.0' is not of type 'number'"


# --------------------------------------------------------------------------- what the checks of networks find


def test_another_number_of_channels_is_found(bundle):
    edit(bundle / "configs/metadata.json", '"num_channels": 3', '"num_channels": 4')
    (check,) = [check for check in network_checks(bundle) if check.title == "network in and out"]
    assert "output channel number `3` doesn't match: `4`" in check.problems[0]


def test_a_property_of_another_name_is_found(bundle):
    edit(bundle / "configs/inference.yaml", "postprocessing: '@postprocessing'", "postprocessing: '@steps'")
    with (bundle / "configs/inference.yaml").open("a") as file:
        file.write("steps: '@postprocessing'\n")
    (check,) = [check for check in network_checks(bundle) if check.title == "workflow properties"]
    assert check.problems == [f"{bundle}/configs/inference.yaml: property postprocessing is wrong"]


def test_a_network_that_cannot_be_built_is_found_and_the_rest_is_checked(bundle, capsys):
    edit(bundle / "configs/inference.yaml", "features: '@unet_features'", "featurs: '@unet_features'")
    with pytest.raises(SystemExit):
        verify(str(bundle))
    out = capsys.readouterr().out
    assert "unexpected keyword argument 'featurs'" in out
    assert f"  {'links in README.md':22}ok" in out


def test_an_unknown_bundle_is_refused():
    with pytest.raises(BundleError, match="nosuch: no such bundle"):
        verify("nosuch")
