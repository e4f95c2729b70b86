"""Names of processes that hold after a restart, because the system uses their numbers again; memory of this one."""

from __future__ import annotations

import ctypes
import gc
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
    """Free what only refers to itself, as drawn figures do, and give all that is free back to the system.

    Python frees such objects seldom, because they are few, however large. And the C library keeps holes between what is
    still held. Both look as if a run grew from validation to validation (docs/reliability.md). Other libraries than
    glibc have no function for the second.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
