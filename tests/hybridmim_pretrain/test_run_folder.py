"""Whose folder it is: the identity of a run, what continues it, and what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from tools.common.errors import root_cause
from tools.common.tables import read_metrics
from tools.training.locks import FolderInUseError
from tools.training.run_folder import RunError

from . import test_resume
from .bundle import TINY, places


@pytest.fixture
def train(workflow, ct_scans):
    def run(**options):
        workflow("train", ["train", "small"], **{**TINY, "dataset_dir": str(ct_scans), "epochs": 2, **options}).run()

    return run


def refusal(start):
    with pytest.raises(RuntimeError) as error:
        start()
    return root_cause(error.value)


def files(folder, *left_out):
    """Contents; TensorBoard opens its file whenever a trainer is built."""
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name}
    return {str(name): path.read_bytes() for name, path in found.items() if name.parts[0] not in left_out}


def identity(folder):
    return json.loads((folder / "out/run.json").read_text())


def test_a_run_says_who_it_is(train, tmp_path):
    train()
    run = identity(tmp_path)
    assert (run["host"], run["process"]) == (os.uname().nodename, os.getpid())
    assert run["versions"]["torch"] == torch.__version__
    assert run["schedule"] == {"epochs": 2, "steps_per_epoch": 2, "warmup_epochs": 1}
    assert (len(run["training"]), len(run["validation"]), run["earlier"]) == (4, 2, [])
    assert files(tmp_path / "out")["run.json"] == files(tmp_path / "models")["run.json"]
    assert not list(tmp_path.rglob("run.lock"))


def test_a_start_in_the_folder_of_another_run_is_refused_or_moves_it_aside(train, tmp_path):
    train(cache="disk")
    first, before = identity(tmp_path)["id"], [files(tmp_path / name, "cache") for name in ("out", "models")]
    error = refusal(train)
    assert isinstance(error, RunError)
    assert f"{tmp_path / 'out'} holds the run {first} (" in str(error) and str(error).count("process") == 2
    error = refusal(lambda: train(output_dir=str(tmp_path / "other")))
    assert f"{tmp_path / 'models'} holds the run {first} (" in str(error)
    assert [files(tmp_path / name, "cache") for name in ("out", "models")] == before
    cached = files(tmp_path / "out/cache")
    train(cache="disk", overwrite="true", epochs=1)
    assert identity(tmp_path)["id"] != first
    assert len(read_metrics(tmp_path / "out/metrics.csv")) == 1
    assert [p.name for p in (tmp_path / "models").glob("checkpoint*")] == ["checkpoint_epoch=1.pt"]
    for name, old in zip(("out", "models"), before, strict=True):
        old.pop("checked_scans.json", None)
        assert files(tmp_path / name / "previous" / first) == old
    assert files(tmp_path / "out/cache") == cached


def test_auto_begins_and_continues(train, tmp_path, capsys):
    train(resume="auto")
    run = identity(tmp_path)
    assert "resumed from" not in capsys.readouterr().out
    train(resume="auto", learning_rate=0.5)
    said = capsys.readouterr().out
    assert f"resumed from {tmp_path / 'models/checkpoint_epoch=2.pt'}" in said
    assert "changed  learning_rate: 0.5, before 0.001; that of the checkpoint is used" in said
    again = identity(tmp_path)
    assert (again["id"], again["resumed"]) == (run["id"], True)
    assert again["earlier"] == [{key: run[key] for key in ("time", "host", "process", "command")}]


def test_auto_begins_again_after_a_run_without_a_checkpoint(train, tmp_path):
    train()
    run = identity(tmp_path)["id"]
    for path in (tmp_path / "models").glob("checkpoint*"):
        path.unlink()
    train(resume="auto")
    assert [row["epoch"] for row in read_metrics(tmp_path / "out/metrics.csv")] == ["1", "2"]
    assert (identity(tmp_path)["id"], identity(tmp_path)["resumed"]) == (run, False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"epochs": 3}, ["found epochs 3, expected 2 as the run began", "learning rate would jump"]),
        ({"batch_size": 1, "weight_cl": 0}, ["found steps_per_epoch 4, expected 2 as the run began"]),
        ({"seed": 1}, ["scan(s) would be trained on, but validated this run before", "/ct_"]),
    ],
    ids=["epochs", "batch", "split"],
)
def test_what_would_spoil_the_run_is_refused_unless_wanted(train, tmp_path, changed, words):
    train()
    before = [files(tmp_path / name) for name in ("out", "models")]
    error = refusal(lambda: train(resume="auto", **changed))
    assert isinstance(error, RunError)
    assert all(word in str(error) for word in [*words, "--resume_changed true"]), str(error)
    assert [files(tmp_path / name) for name in ("out", "models")] == before
    train(resume="auto", resume_changed="true", **changed)
    assert len(identity(tmp_path)["earlier"]) == 1


def test_data_that_moved_are_the_same(train, ct_scans, tmp_path):
    train()
    moved = shutil.copytree(ct_scans, tmp_path / "moved")
    train(resume="true", dataset_dir=str(moved))


def test_folders_of_two_runs_do_not_mix(train, tmp_path):
    train(**places(tmp_path / "a"))
    train(**places(tmp_path / "b"))
    mixed = {"output_dir": str(tmp_path / "a/out"), "ckpt_dir": str(tmp_path / "b/models")}
    error = refusal(lambda: train(**mixed, resume="auto"))
    assert isinstance(error, RunError)
    assert all(f"the run {identity(tmp_path / name)['id']} (" in str(error) for name in "ab")


def test_a_start_that_fails_leaves_no_run(train, tmp_path):
    refusal(lambda: train(cache="ssd"))
    assert not list(tmp_path.rglob("run.json"))
    train()


def test_overwriting_and_resuming_together_is_refused(train):
    assert "overwrite: found true, together with resume: auto" in str(
        refusal(lambda: train(overwrite="true", resume="auto"))
    )


def test_the_second_of_two_runs_at_once_is_refused(train, ct_scans, tmp_path, monkeypatch):
    """The first is a command of its own; it is killed, and then hinders nobody."""

    def while_it_runs(path):
        if path.exists() and not refused:
            refused.append(refusal(lambda: train(resume="auto")))
        return read_metrics(path)

    refused: list[Exception] = []
    monkeypatch.setattr(test_resume, "read_metrics", while_it_runs)
    test_resume.kill_after_epoch(2, ct_scans, tmp_path, 0)
    (error,) = refused
    assert isinstance(error, FolderInUseError)
    assert f"the run of host {os.uname().nodename}, process " in str(error)
    train(resume="auto", **{**test_resume.OPTIONS, "dataset_dir": str(ct_scans)})
    assert len(read_metrics(tmp_path / "out/metrics.csv")) == test_resume.EPOCHS
