"""Names of processes that hold after a restart, because the system uses the numbers of processes again."""

from __future__ import annotations

import os

import psutil


def process_mark(number: int | None = None) -> str:
    """Number and start of a process; of this one by default.

    Raises:
        psutil.NoSuchProcess: there is no such process, or nothing but its exit code is left of it.
    """
    process = psutil.Process(os.getpid() if number is None else number)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(process.pid)
    return f"{process.pid}-{process.create_time():.0f}"


def is_alive(mark: str) -> bool:
    """Whether the process of a mark is alive, on this machine."""
    try:
        return process_mark(int(mark.split("-")[0])) == mark
    except (psutil.NoSuchProcess, ValueError):
        return False
