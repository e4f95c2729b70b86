"""The five segmentation bundles are what the template makes of their facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tools.commands.bundles import FACTS, TEMPLATE, bundle_files, bundles

ROOT = Path(__file__).resolve().parents[3]
RUNS = {"models", "eval"}  # folders of a bundle that runs write to
EVERY_BUNDLE = pytest.mark.parametrize("facts", sorted(FACTS.glob("*.yaml")), ids=lambda path: path.stem)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a bundle, by their path in it; what runs leave there is none of it."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.read_bytes() for name, path in paths.items() if name.parts[0] not in RUNS}


def test_the_bundles_are_up_to_date(tmp_path):
    """If this fails: edit the template or the facts, not the bundles, and run `python -m tools bundles`."""
    bundles(tmp_path)
    own = {path.parents[1].name for path in ROOT.glob("bundles/*/docs/plan.json")}  # of whoever works here
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in ROOT.glob("bundles/*_seg")} - own
    for written in sorted(tmp_path.iterdir()):
        expected, found = contents(written), contents(ROOT / "bundles" / written.name)
        assert sorted(found) == sorted(expected)
        assert [name for name in expected if found[name] != expected[name]] == [], written.name


@EVERY_BUNDLE
def test_nothing_of_the_template_is_left_in_a_bundle(facts):
    for name, text in bundle_files(facts).items():
        assert not [mark for mark in ("<<", ">>", "#%", "%#", "\0") if mark in text], name


@EVERY_BUNDLE
def test_every_fact_is_used(facts, tmp_path):
    """A fact that nothing misses has a wrong name, or is not needed any more."""
    known = yaml.safe_load(facts.read_text(encoding="utf-8"))
    complete = bundle_files(facts)
    for left_out in known:
        file = tmp_path / facts.name
        file.write_text(yaml.safe_dump({k: v for k, v in known.items() if k != left_out}, sort_keys=False))
        try:
            assert bundle_files(file) != complete, left_out
        except ValueError as error:
            assert left_out in str(error)


@pytest.mark.parametrize("fact", ["epochs", "classes"])
def test_a_missing_fact_is_named(tmp_path, fact):
    facts = yaml.safe_load((FACTS / "liver.yaml").read_text(encoding="utf-8"))
    del facts[fact]
    file = tmp_path / "kidney.yaml"
    file.write_text(yaml.safe_dump(facts), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"kidney.yaml.*'{fact}'"):
        bundle_files(file)


@pytest.mark.parametrize(
    "wrong, expected",
    [({"no_flips": {"left": "kidneys have a side"}}, "'left'.*left-right"), ({"intensity": "hu"}, "'hu'.*hu_window")],
    ids=["axis", "intensity"],
)
def test_a_word_that_the_template_does_not_know_is_named(tmp_path, wrong, expected):
    facts = yaml.safe_load((FACTS / "btcv.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "kidney.yaml"
    file.write_text(yaml.safe_dump({**facts, **wrong}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"kidney.yaml.*{expected}"):
        bundle_files(file)


def test_an_empty_file_of_facts_is_named(tmp_path):
    file = tmp_path / "kidney.yaml"
    file.touch()
    with pytest.raises(ValueError, match=r"kidney.yaml: 'intensity' is missing"):
        bundle_files(file)


def test_any_text_of_the_facts_stands_in_the_metadata_as_it_is(tmp_path):
    facts = yaml.safe_load((FACTS / "brats.yaml").read_text(encoding="utf-8"))
    text = 'a "CT" set, \\n, of Łódź'
    file = tmp_path / "kidney.yaml"
    file.write_text(yaml.safe_dump({**facts, "data_source": text, "channels": [text] * 4}), encoding="utf-8")
    meta = json.loads(bundle_files(file)["configs/metadata.json"])
    assert meta["data_source"] == text
    assert set(meta["network_data_format"]["inputs"]["image"]["channel_def"].values()) == {text}


def test_names_of_channels_that_look_like_numbers_stay_texts(tmp_path):
    facts = yaml.safe_load((FACTS / "brats.yaml").read_text(encoding="utf-8"))
    names = ["0000", "0001", "t2", "no"]
    file = tmp_path / "kidney.yaml"
    file.write_text(yaml.safe_dump({**facts, "modalities": names}), encoding="utf-8")
    assert yaml.safe_load(bundle_files(file)["configs/train.yaml"])["modalities"] == names


def test_the_template_is_yaml_that_looks_like_a_config():
    """Its YAML files can be read as they are: conditions are comments, placeholders are plain words."""
    for path in TEMPLATE.rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
