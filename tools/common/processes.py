"""Names of processes that hold after a restart, because the system uses their numbers again; memory of this one."""

from __future__ import annotations

import ctypes
import os
import sys

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


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library has a function for it (glibc).

    Otherwise the holes between what is still held stay this process's own: it seems to grow from validation to
    validation although nothing is kept (docs/reliability.md).
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
