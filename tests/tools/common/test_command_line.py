"""Folders of any name on the command line: of `python -m tools`, and of `python -m monai.bundle run`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import fire
import pytest
from monai.bundle import scripts

from image_files import write_nifti
from tools.commands.check import check
from tools.common.command_line import keep_text
from tools.common.errors import root_cause

BUNDLE = Path(__file__).resolve().parents[3] / "bundles/hybridmim_btcv_seg"
PRETRAIN = BUNDLE.with_name("hybridmim_pretrain")
READ_AS = {  # what Fire makes of a name
    "2023_01": "the int 202301",
    "1.10": "the float 1.1",
    "1e3": "the float 1000.0",
    "a,b": "the tuple ('a', 'b')",
    "True": "the bool True",
    "[x]": "the list ['x']",
    "{a}": "the set {'a'}",
}
PLAIN = ("007", "50%", "a b", "a$b", "a@b", "it's", "CT-2.5")
SIGNS = ("$x", "@x", "None", "a#b", "%x")


@pytest.mark.parametrize("name", [*READ_AS, *PLAIN, *SIGNS])
def test_our_commands_take_every_name(tmp_path, monkeypatch, capsys, name):
    (tmp_path / name).mkdir()
    write_nifti(tmp_path / name / "a.nii")
    monkeypatch.chdir(tmp_path)
    fire.Fire(keep_text({"check": check}), command=["check", "--dataset_dir", name, "--workers", "0"])
    assert capsys.readouterr().out.startswith("scans      1 readable")


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """What the start of a run says about a folder of this name; None if it is read as it was typed."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(typed, folder=None, more=(), configs=("inference",), bundle=BUNDLE):
        if folder is not None:
            (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path)
        files = str([f"{bundle}/configs/{name}.yaml" for name in configs])
        line = ["run", "path", "--config_file", files, "--bundle_root", str(bundle)]
        line += ["--logging_file", "False", "--dataset_dir", typed, *more]
        monkeypatch.setattr(sys, "argv", ["monai.bundle", *line])
        try:
            fire.Fire({"run": scripts.run}, command=line)
        except Exception as error:
            return str(root_cause(error))
        return None

    return run


@pytest.mark.parametrize("name", PLAIN)
def test_bundles_take_most_names(error_of, name):
    assert error_of(name, name) is None


@pytest.mark.parametrize("name", READ_AS)
def test_bundles_say_how_to_write_a_name_that_is_no_text_for_fire(error_of, name):
    expected = f"dataset_dir: found {name}, which is read as {READ_AS[name]}, expected a path: write ./{name}"
    assert error_of(name, name) == expected
    assert error_of(f"./{name}") is None


@pytest.mark.parametrize("name", ["$x", "@x", "None"])
def test_bundles_say_how_to_write_a_name_that_is_a_sign_of_a_config(error_of, name):
    assert error_of(name, name) == f"dataset_dir: found {name}, which is not read as a path, expected ./{name}"
    assert error_of(f"./{name}") is None


def test_bundles_say_how_to_write_a_hash(error_of):
    said = error_of("a#b", "a#b")
    assert said.startswith("dataset_dir: found a#b, in which the config parser reads # as ::")
    expression = re.search(r'the expression "\\(.*)"$', said)[1]
    assert expression == r"$'a\x23b'" and error_of(expression) is None


def test_a_key_that_no_config_has_is_refused_with_those_that_are_like_it(error_of):
    said = error_of("scans", more=["--num_worker", "2"])
    assert said.startswith("num_worker: found on the command line, but in no config file; expected one of their keys: ")
    assert "num_workers" in said
    assert error_of("scans", more=["--xyz=2"]).endswith("expected one of their keys")


@pytest.mark.parametrize(
    "more",
    [
        ("--num_workers", "2"),
        ("--num-workers=2",),
        ("--swin_feature_size", "24"),  # of an overlay that is not read
        ("--initialize#2", "$None"),
        ("--many", "2", "--num_workers", "$@many * 2"),
        ("--run_name", "first"),  # of MONAI's tracking
        ("--finalize", "$print()"),  # which MONAI looks for
    ],
)
def test_keys_of_the_configs_of_monai_and_of_other_options_are_taken(error_of, more):
    assert error_of("scans", more=more) is None


@pytest.mark.parametrize("typed", ["two", "True", "[2]"])
def test_what_is_no_number_is_refused_where_the_config_has_one(error_of, typed):
    said = error_of("scans", more=["--num_workers", typed])
    assert said.startswith("num_workers: found ") and said.endswith(", expected a number, such as 0")


@pytest.mark.parametrize(
    ("key", "small", "enough", "expected"),
    [
        *((key, 0, 1, "a whole number, 1 or more") for key in ("epochs", "batch_size", "swin_window_size")),
        ("log_interval", 0, 1, "a whole number, 1 or more"),
        ("num_workers", -1, 0, "a whole number, 0 or more"),
        ("seed", -1, 0, "a whole number, 0 or more"),
        *((key, -0.5, 0, "a number, 0 or more") for key in ("warmup_epochs", "learning_rate", "weight_decay")),
        *((key, 0, 0.1, "a number above 0") for key in ("clip_norm", "timeout_minutes")),
    ],
)
def test_a_number_that_is_too_small_is_named(error_of, key, small, enough, expected):
    train = {"configs": ["train"], "bundle": PRETRAIN}
    assert error_of("scans", more=[f"--{key}", str(small)], **train) == f"{key}: found {small}, expected {expected}"
    assert error_of("scans", more=[f"--{key}", str(enough)], **train) is None
    half = error_of("scans", more=[f"--{key}", "1.5"], **train)
    assert half == (f"{key}: found 1.5, expected {expected}" if "whole" in expected else None)


def test_each_of_several_processes_refuses_what_one_does(error_of):
    """Before they join."""
    said = error_of("scans", more=["--epocs", "5"], configs=["train", "multi_gpu_train"])
    assert said == "epocs: found on the command line, but in no config file; expected one of their keys: epochs?"
