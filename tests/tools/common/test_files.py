"""A file that cannot be written is named, with the room on its disk, and what was there stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.common.files import atomic_path

FULL = """
import resource, sys, torch
from tools.common.cards import save_weights
from tools.common.files import write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    if sys.argv[2] == "json":
        write_json(sys.argv[1], list(range(50_000)))
    else:
        save_weights(sys.argv[1], {"weight": torch.rand(50_000)}, {})
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["json", "weights"])
def test_without_room_the_old_file_stays_and_the_new_one_is_named(tmp_path, kind):
    pytest.importorskip("resource", reason="needs a limit on the size of files")
    path = tmp_path / "file.pt"
    path.write_text("old")
    line = [sys.executable, "-c", FULL, str(path), kind]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=100)
    assert f"{path}: not written: " in done.stdout and f"are free in {tmp_path}" in done.stdout, done
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write(path, function):
    with atomic_path(path) as temporary:
        temporary.write_text(function())


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"{tmp_path}/file/metrics.csv: not written: .* are free in {tmp_path}/file"):
        write(tmp_path / "file/metrics.csv", str)


def test_an_error_of_another_file_stays_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*other.txt'"):
        write(tmp_path / "file.txt", (tmp_path / "other.txt").read_text)
