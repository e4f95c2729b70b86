"""The five segmentation bundles are what the template makes of their facts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tools.commands.bundles import FACTS, TEMPLATE, bundle_files, bundles

ROOT = Path(__file__).resolve().parents[3]
EVERY_BUNDLE = pytest.mark.parametrize("facts", sorted(FACTS.glob("*.yaml")), ids=lambda path: path.stem)


def committed(folder: Path) -> dict[str, bytes]:
    """The files of a bundle that Git keeps, or would: not what runs left there."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=folder, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name: (folder / name).read_bytes() for name in names if name}


def test_the_bundles_are_up_to_date(tmp_path):
    """Edit the template or the facts, then run `python -m tools bundles`."""
    bundles(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {path.name for path in ROOT.glob("bundles/*_seg")}
    for name in sorted(written):
        files = {path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*") if path.is_file()}
        expected = {path.as_posix(): file.read_bytes() for path, file in files.items()}
        found = committed(ROOT / "bundles" / name)
        assert sorted(found) == sorted(expected)
        assert [path for path in found if found[path] != expected[path]] == [], name


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


def test_the_template_is_yaml_that_looks_like_a_config():
    """Its YAML files can be read as they are: conditions are comments, placeholders are plain words."""
    for path in TEMPLATE.rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
