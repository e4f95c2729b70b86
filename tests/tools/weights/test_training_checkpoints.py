"""Checkpoints are whole or absent, whatever ends the process that writes them."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

from tools.common.cards import save_weights
from tools.common.files import NotWrittenError, remove_leftovers
from tools.weights.checkpoints import WeightsError, read_weights
from tools.weights.training_checkpoints import newest_checkpoint, save_checkpoint

resource = pytest.importorskip("resource", reason="limits and forks are those of Linux and macOS")


def content(value):
    return {"model": {"weight": torch.full((1000,), float(value))}, "trainer": {"iteration": value}}


def zeroed(path):
    """The file with a block of zeros, as a file system may leave it after a power failure; torch reads it."""
    data = bytearray(path.read_bytes())
    where = data.index(torch.full((4,), float(torch.load(path)["trainer"]["iteration"])).numpy().tobytes())
    data[where : where + 512] = bytes(512)
    path.write_bytes(data)
    assert (torch.load(path, weights_only=True)["model"]["weight"] == 0).sum() >= 128
    return path


def killed_at(event, write):
    """Run `write` in a process that kills itself before its `event`-th opening, renaming or deletion of a file.

    Returns:
        What it was about to do, or None if it had ended before.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        left = [event]

        def kill(name, arguments):
            if name in ("open", "os.rename", "os.remove") and "checkpoint" in str(arguments[0]):
                if left[0] == 0:
                    os.write(writer, name.encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(kill)
        write()
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read().decode() or None


def test_a_kill_at_any_moment_loses_nothing(tmp_path):
    """With one checkpoint kept, there is always one: the old or the new."""
    moments = []
    for event in range(20):
        folder = tmp_path / str(event)
        save_checkpoint(folder, content(1), 1, None, kept=1)
        moment = killed_at(event, lambda folder=folder: save_checkpoint(folder, content(2), 2, None, kept=1))
        left = newest_checkpoint(folder)
        value = int(left.stem[-1])
        assert torch.equal(read_weights(left)["weight"], content(value)["model"]["weight"])
        remove_leftovers(folder)
        assert all(path.name.startswith("checkpoint_epoch=") for path in folder.iterdir())
        if moment is None:
            break
        moments.append(moment)
    assert value == 2 and len(list(folder.iterdir())) == 1
    assert {"open", "os.rename", "os.remove"} <= {*moments}
    assert moments.index("os.rename") < moments.index("os.remove")


def test_a_full_disk_leaves_no_half_file(tmp_path):
    """A limit on the size of files stops the writer in the middle, as a full disk does."""
    save_checkpoint(tmp_path, content(1), 1, None, kept=1)
    (soft, hard), before = resource.getrlimit(resource.RLIMIT_FSIZE), sorted(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        for write, name in (
            (lambda: save_checkpoint(tmp_path, content(2), 2, None, kept=1), "checkpoint_epoch=2.pt"),
            (lambda: save_weights(tmp_path / "model.pt", content(2)["model"], {}), "model.pt"),
        ):
            with pytest.raises(NotWrittenError) as error:
                write()
            said = f"{tmp_path / name}: not written: File too large; "
            assert str(error.value).startswith(said) and str(error.value).endswith(f"B are free in {tmp_path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before
    assert newest_checkpoint(tmp_path).name == "checkpoint_epoch=1.pt"


def test_a_damaged_newest_one_falls_back_to_the_one_before_by_name(tmp_path, caplog):
    for epoch, step in ((3, None), (4, 70), (4, None), (5, 90)):
        save_checkpoint(tmp_path, content(epoch), epoch, step, kept=9)
    names = ["checkpoint_epoch=5_step=90.pt", "checkpoint_epoch=4.pt", "checkpoint_epoch=4_step=70.pt"]
    for name in names:
        assert newest_checkpoint(tmp_path).name == name and name not in caplog.text
        zeroed(tmp_path / name)
        newest_checkpoint(tmp_path)
        assert f"{tmp_path / name}: damaged" in caplog.text and "the checkpoint before it is used" in caplog.text
    last = tmp_path / "checkpoint_epoch=3.pt"
    last.write_bytes(last.read_bytes()[:-100])
    assert newest_checkpoint(tmp_path) is None and f"{last}: damaged" in caplog.text


def test_weights_with_zeroed_tensors_are_refused(tmp_path):
    save_weights(tmp_path / "model.pt", content(7)["model"], {})
    assert torch.equal(torch.load(tmp_path / "model.pt")["weight"], content(7)["model"]["weight"])  # by plain torch
    path = zeroed(save_checkpoint(tmp_path, content(7), 7, None, kept=1))
    with pytest.raises(WeightsError, match=r"damaged: .* does not have the checksum") as error:
        read_weights(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["checkpoint_epoch=best.pt", "checkpoint_epoch=9 (copy).pt", "checkpoint_epoch=.pt"])
def test_strange_names_are_ignored(tmp_path, name):
    (tmp_path / name).write_text("of somebody else")
    assert newest_checkpoint(tmp_path) is None
    saved = save_checkpoint(tmp_path, content(1), 1, None, kept=1)
    assert newest_checkpoint(tmp_path) == saved and (tmp_path / name).exists()


def test_the_newest_are_kept(tmp_path):
    """Later ones than the one that is written are of another run, or damaged: they are not ours to delete."""
    save_checkpoint(tmp_path, content(50), 50, None, kept=2)
    for epoch, step in ((9, None), (10, 95), (10, None), (11, 105)):
        save_checkpoint(tmp_path, content(epoch), epoch, step, kept=2)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"checkpoint_epoch=10.pt", "checkpoint_epoch=11_step=105.pt", "checkpoint_epoch=50.pt"}


def test_only_what_a_killed_writer_left_is_removed(tmp_path):
    mine = [".123.model.pt", ".7.checkpoint_epoch=3.pt", ".99999.metrics.csv"]
    others = [".gitignore", ".x.model.pt", "model.pt", ".5."]
    for name in (*mine, *others):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others}
