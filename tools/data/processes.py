"""Reads scans in processes of their own, which may crash or hang without taking the command along."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
import torch

from tools.data.scans import files_of, paths_of, series_folder

logger = logging.getLogger(__name__)

PATIENCE = 50.0  # seconds after which a scan that is still read is named
COMPUTING = 50.0  # seconds of processor time that a scan may take: what needs more does not end
SECONDS_PER_GB = 100.0  # that it may take longer


class _Reader:
    """A process that reads one scan after the other."""

    def __init__(self, inspect: Callable[[dict], Any]) -> None:
        self.inspect = inspect
        self.number: int | None = None  # of the scan that it reads
        self.process: multiprocessing.Process | None = None

    def start(self, number: int, item: dict) -> None:
        """Begin to read a scan."""
        if self.process is None:
            self.pipe, other = multiprocessing.Pipe()
            self.process = multiprocessing.Process(target=_serve, args=(self.inspect, other), daemon=True)
            self.process.start()
            other.close()  # so that the end of the process ends the pipe
        self.number, self.item, self.named = number, item, False
        self.began, self.limit = time.monotonic(), self._computed() + COMPUTING + SECONDS_PER_GB * _size(item) / 1e9
        self.pipe.send(item)

    def result(self) -> Any:
        """Return what was found, as text if nothing was; None if the scan is still read."""
        took = time.monotonic() - self.began
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except EOFError:
            self.stop()
            return "kills the process that reads it (a crash of the reader, or memory ran out)"
        if self._computed() > self.limit:
            self.stop()
            return f"is not read within {COMPUTING:.0f} seconds of processor time: its reader hangs"
        if took > PATIENCE and not self.named:
            self.named = True
            logger.warning("%s: still reading after %.0f seconds", ", ".join(paths_of(self.item)), took)
        return None

    def _computed(self) -> float:
        """Seconds of processor time of the process; a busy machine or a slow disk do not count."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:  # it has ended
            return 0.0
        return times.user + times.system

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None
            self.pipe.close()


def _serve(inspect: Callable[[dict], Any], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the command
    torch.set_num_threads(1)
    while True:
        try:
            item = pipe.recv()
        except EOFError:  # the command has ended
            return
        pipe.send(inspect(item))


def _size(item: dict) -> int:
    """Bytes of the files of a scan."""
    size = 0
    for path in map(series_folder, files_of(item)):
        size += sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())
    return size


def in_processes(inspect: Callable[[dict], Any], items: Sequence[dict], workers: int) -> Iterator[Any]:
    """Yield `inspect(item)` for each item, in their order; text where the process died, or took too long."""
    readers = [_Reader(inspect) for _ in range(min(workers, len(items)))]
    waiting = iter(enumerate(items))
    results: dict[int, Any] = {}
    try:
        for number in range(len(items)):
            while number not in results:
                for reader in readers:
                    if reader.number is None and (task := next(waiting, None)) is not None:
                        reader.start(*task)
                busy = [reader for reader in readers if reader.number is not None]
                wait([reader.pipe for reader in busy], timeout=1)
                for reader in busy:
                    if (result := reader.result()) is not None:
                        results[reader.number], reader.number = result, None
            yield results.pop(number)
    finally:
        for reader in readers:
            reader.stop()
