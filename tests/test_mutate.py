"""The list of mutations fits the code, without running any: `python -m tests.mutate` does that."""

from __future__ import annotations

import ast
import shlex
import shutil

import pytest
import yaml

from tests.mutate import ROOT, Mutation, read_mutations


def test_every_text_stands_in_its_files():
    for mutation in read_mutations():
        files = list(ROOT.glob(mutation.files))
        assert files, f"{mutation.name}: no file matches {mutation.files}"
        assert all(mutation.old in file.read_text("utf-8") for file in files), mutation.name
        assert mutation.new != mutation.old


def test_every_mutation_leaves_code_that_can_be_read():
    for mutation in read_mutations():
        file = next(ROOT.glob(mutation.files))
        text = file.read_text("utf-8").replace(mutation.old, mutation.new)
        ast.parse(text) if file.suffix == ".py" else yaml.load(text, yaml.CSafeLoader)


def test_every_mutation_names_tests_that_are_there():
    for mutation in read_mutations():
        files = [word for word in shlex.split(mutation.tests) if word.startswith("tests/")]
        assert files and all((ROOT / file.partition("::")[0]).is_file() for file in files), mutation.name


def test_a_text_that_is_not_found_is_named_and_changes_nothing(tmp_path):
    shutil.copy(ROOT / "tools/losses.py", tmp_path / "losses.py")
    with pytest.raises(LookupError, match=r"gone: losses.py: expected the text"):
        Mutation("gone", "*.py", "no such text", "", "tests/tools/test_losses.py").apply(tmp_path)
    with pytest.raises(LookupError, match=r"gone: files: found none"):
        Mutation("gone", "*.yaml", "text", "", "tests/tools/test_losses.py").apply(tmp_path)
    assert (tmp_path / "losses.py").read_bytes() == (ROOT / "tools/losses.py").read_bytes()
