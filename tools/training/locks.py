"""A folder belongs to one run at a time: a lock file that needs no `flock`, which many shared file systems lack.

`run.lock` is created with O_EXCL, which NFS and the parallel file systems keep to, and names its holder. The holder
changes the file's date every `BEAT` seconds. Whether it lives is decided so:

- on the same machine (and in the same container), by its process number and start;
- elsewhere, by watching: a lock whose date does not change for `PATIENCE` seconds is that of a dead process. No clocks
  are compared.

A dead holder's lock is replaced. A holder that had only stood still (stopped, or cut off from the disk) sees that when
it goes on, and ends.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tools.common.files import atomic_path
from tools.common.processes import is_alive, process_mark
from tools.common.text import command_text

BEAT = 15.0  # seconds
PATIENCE = 90.0  # seconds; clients of NFS may see a date a minute late
SETTLE = 1.0  # seconds in which another start may have replaced the same dead lock
_held: dict[Path, FolderLock] = {}


class FolderInUseError(OSError):
    """Another run is at work in the folder; the message names it."""


class FolderLock:
    """The lock of this process on a folder. Another lock on the same folder in the same process is the same one.

    Args:
        folder: created if it is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder, "run.lock").resolve()
        self.text = json.dumps({**_this_process(), "command": command_text(sys.orig_argv)})
        self.pid = os.getpid()
        self._made = False  # whether this lock made the folder
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock, and hold it until `release` or the end of the process.

        Raises:
            FolderInUseError: another process holds it.
        """
        if self.path in _held:
            return
        self._made = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as file:
                file.write(self.text)
        except FileExistsError:
            self._take_over()
        _held[self.path] = self
        atexit.register(self.release)
        threading.Thread(target=self._beat, name=f"beat of {self.path}", daemon=True).start()

    def release(self) -> None:
        """Give the lock back, if this process holds it."""
        held = _held.get(self.path)
        if held is None or held.pid != os.getpid():  # a forked process has copies of this one's locks
            return
        del _held[self.path]
        held._ended.set()
        with suppress(OSError):
            if self._look()[0] == held.text:
                self.path.unlink()
                if held._made:
                    self.path.parent.rmdir()  # if it is still empty: the start was refused

    def _look(self) -> tuple[str, int]:
        """Content and date; opening makes clients of NFS ask for both anew."""
        with self.path.open(encoding="utf-8") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns

    def _take_over(self) -> None:
        """Replace the lock that is there if its holder is dead."""
        with suppress(FileNotFoundError):  # given back in the meantime
            if not self._is_dead():
                raise FolderInUseError(f"{self.path.parent}: {_holder_text(self._look()[0])} is at work in it")
        with atomic_path(self.path) as temporary:
            temporary.write_text(self.text, encoding="utf-8")
        time.sleep(SETTLE)
        now = self._look()[0]
        if now != self.text:
            raise FolderInUseError(f"{self.path.parent}: {_holder_text(now)} has just begun in it")

    def _is_dead(self) -> bool:
        before = self._look()
        try:
            holder = json.loads(before[0])
            if holder["place"] == _this_process()["place"]:
                return not is_alive(holder["mark"])
        except (ValueError, TypeError, KeyError):  # not yet written, or damaged
            pass
        print(f"{self.path}: watching for {PATIENCE:.0f} s whether {_holder_text(before[0])} is alive", flush=True)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, PATIENCE / 10))
            if self._look() != before:
                return False
        return True

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # the disk may come back
                now = self._look()[0]
                if now != self.text:
                    sys.stderr.write(f"\n{self.path}: {_holder_text(now)} took over while this one stood still\n")
                    sys.stderr.flush()
                    os._exit(1)  # at once, so that nothing is written any more
                os.utime(self.path)


def _this_process() -> dict[str, str | int]:
    host = socket.gethostname()
    space = Path("/proc/self/ns/pid")  # numbers of processes are those of a container
    place = f"{host} {space.readlink()}" if space.is_symlink() else host
    return {"host": host, "process": os.getpid(), "mark": process_mark(), "place": place}


def _holder_text(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"the run of host {holder['host']}, process {holder['process']} ({holder['command']})"
    except (ValueError, TypeError, KeyError):
        return "a run that is not named"
