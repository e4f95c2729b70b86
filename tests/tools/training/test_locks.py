"""One run at a time in a folder: locks of living, dead, frozen and distant processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from tools.training import locks
from tools.training.locks import FolderInUseError, FolderLock

HOLD = """
import sys, time
from tools.training import locks
locks.BEAT, locks.SETTLE = 0.1, 0.3
try:
    locks.FolderLock(sys.argv[1]).acquire()
except locks.FolderInUseError as error:
    sys.exit(f"refused: {error}")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that takes the lock of `tmp_path`."""
    started = []

    def start():
        line = [sys.executable, "-c", HOLD, str(tmp_path)]
        started.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    monkeypatch.setattr(locks, "SETTLE", 0.0)
    lock = FolderLock(tmp_path)
    yield lock
    lock.release()


def elsewhere(lock):
    """A lock of a process on another machine."""
    holder = {"host": "node7", "process": 41, "mark": "41-1", "place": "node7", "command": "python -m monai.bundle"}
    lock.path.write_text(json.dumps(holder))


def test_a_living_process_keeps_its_folder_and_is_named(hold, lock):
    other = hold()
    assert other.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=rf"host {os.uname().nodename}, process {other.pid} \("):
        lock.acquire()
    other.kill()
    other.wait()
    lock.acquire()
    assert json.loads(lock.path.read_text())["process"] == os.getpid()


def test_a_lock_is_given_back(lock):
    lock.acquire()
    FolderLock(lock.path.parent).acquire()  # the same process
    FolderLock(lock.path.parent).release()
    assert not lock.path.exists()


def test_of_several_starts_at_a_dead_lock_one_gets_it(hold, lock):
    dead = hold()
    assert dead.stdout.readline() == "held\n"
    dead.kill()
    dead.wait()
    starts = [hold() for _ in range(3)]
    assert sorted(start.stdout.readline() for start in starts) == ["", "", "held\n"]


@pytest.mark.parametrize("content", ["distant", "", '{"host": "node7"'])
def test_a_lock_that_does_not_change_is_that_of_a_dead_process(lock, content):
    elsewhere(lock)
    if content != "distant":
        lock.path.write_text(content)
    lock.acquire()
    assert lock.path.read_text() == lock.text


def test_a_lock_that_changes_is_that_of_a_living_process_elsewhere(lock):
    elsewhere(lock)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.1):
            os.utime(lock.path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="host node7, process 41"):
            lock.acquire()
    finally:
        ended.set()
        thread.join()


def test_a_process_that_stood_still_ends_when_its_folder_was_taken(hold, lock):
    other = hold()
    assert other.stdout.readline() == "held\n"
    before = lock.path.stat().st_mtime_ns
    until = time.monotonic() + 20
    while lock.path.stat().st_mtime_ns == before:  # it beats
        assert time.monotonic() < until
    elsewhere(lock)
    assert other.wait(20) == 1
    assert "run of host node7, process 41" in other.stderr.read()
