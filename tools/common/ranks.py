"""Several processes of one run: joining them, sharing work without a time limit, and naming the one that hangs.

Collectives end with an error when one process is late, which does not say which. So processes tell each other that they
live, and at which step they are, through the store in which torchrun lets them meet, which is no collective.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

BEATS = 10  # in the time after which a process counts as hanging
LONGEST_BEAT = 10.0  # seconds
_watch: Watch | None = None
_shared = 0  # pieces of work so far, the same in all processes


def join_processes(timeout_minutes: float) -> None:
    """Initialise `torch.distributed` (NCCL on GPUs, else gloo), if that is not done, and watch all processes.

    Args:
        timeout_minutes: time without a step, or without a sign of life, after which a process counts as hanging.

    Raises:
        ValueError: the time is not above 0.
    """
    global _watch
    if not timeout_minutes > 0:
        raise ValueError(f"timeout_minutes: found {timeout_minutes}, expected minutes above 0")
    if not dist.is_initialized():
        # longer than the watch, which says more when it ends the process
        limit = timedelta(minutes=2 * timeout_minutes)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=limit)
    if _watch is None and dist.get_world_size() > 1:
        _watch = Watch(60 * timeout_minutes)
        _watch.start()


def leave_processes() -> None:
    """Wait for all processes, then end `torch.distributed`; the first, whose process may hold the store, leaves last.

    They wait in the store, not in a barrier: gloo's thread may still drop what belongs to its last collective when
    Python ends, or drops the group with its last DDP network; the process then aborts ("terminate called without an
    active exception") or waits for ever (both seen on busy machines).
    """
    global _watch
    store, rank, size = _get_default_store(), dist.get_rank(), dist.get_world_size()
    store.set(f"ready {rank}", "")
    _wait_for_keys(store, [f"ready {other}" for other in range(size)])
    if rank == 0 and size > 1:
        _wait_for_keys(store, [f"left {other}" for other in range(1, size)])
    if _watch is not None:  # until here it ends this process if another one dies
        _watch.ended.set()
        _watch.join()
        _watch = None
    if rank > 0:
        store.set(f"left {rank}", "")
    dist.destroy_process_group()


def _wait_for_keys(store: dist.Store, keys: list[str]) -> None:
    while True:
        time.sleep(0.1)  # at least once, without the lock of the interpreter, which gloo's thread needs
        if store.check(keys):
            return


def mark_step(text: str) -> None:
    """Note that this process begins a step: from now on, it hangs if no other one begins in time."""
    if _watch is not None:
        _watch.step, _watch.moved = text, time.monotonic()


def in_shares(work: Callable[[list[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
    """Let each process work on its share of the items; return the results for all, in all processes.

    It may take any time: processes that are ready look in the store for the results of the others. (Those that hang are
    ended by the watch.)

    Args:
        work: returns a result for each item; called in all processes.
        items: the same in all processes.
    """
    global _shared
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(list(items))
    _shared += 1
    rank, size, store = dist.get_rank(), dist.get_world_size(), _get_default_store()
    # pickles of this run's own processes, as those that torch's collectives for objects exchange
    store.set(f"share {_shared} {rank}", pickle.dumps(work(list(items[rank::size]))))
    results: list[Any] = [None] * len(items)
    keys = [f"share {_shared} {other}" for other in range(size)]
    _wait_for_keys(store, keys)
    for other, key in enumerate(keys):
        results[other::size] = pickle.loads(store.get(key))
    return results


class Watch(threading.Thread):
    """Tells the others where this process is, and ends it when one of them, or the run, stands still.

    Args:
        limit: seconds without a sign of life of a process, or, once steps have begun, without a step of this one.
    """

    def __init__(self, limit: float) -> None:
        super().__init__(name="watch of the processes", daemon=True)
        self.limit = limit
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store = _get_default_store().clone()  # a connection of its own: the other may be waiting
        self.step, self.moved = "before the first step", float("inf")
        self.ended = threading.Event()
        self.place = f"host {socket.gethostname()}, process {os.getpid()}"

    def run(self) -> None:
        """Beat and look until the end."""
        beats, heard = 0, {rank: (b"", time.monotonic()) for rank in range(self.size)}
        with suppress(RuntimeError):  # the store is gone, and with it the run
            while not self.ended.is_set():
                beats += 1
                self.store.set(f"beat {self.rank}", f"{beats}|{self.place}|{self.step}")
                for rank, (last, _) in heard.items():
                    key = f"beat {rank}"
                    if self.store.check([key]) and (now := self.store.get(key)) != last:
                        heard[rank] = (now, time.monotonic())
                self._judge(heard)
                self.ended.wait(min(LONGEST_BEAT, self.limit / BEATS))

    def _judge(self, heard: dict[int, tuple[bytes, float]]) -> None:
        now = time.monotonic()
        silence = {rank: now - when for rank, (_, when) in heard.items()}
        if max(now - self.moved, *silence.values()) <= self.limit:
            return
        silent = [rank for rank, seconds in silence.items() if seconds > self.limit / 2]
        lines = [
            f"  rank {rank} ({place}): {step}{', gives no sign of life' if rank in silent else ''}"
            for rank, (last, _) in heard.items()
            for _, place, step in [(last.decode() or "|not named|before the first step").split("|")]
        ]
        what = f"rank {', '.join(map(str, silent))} hangs" if silent else "no step is completed"
        sys.stderr.write(f"\n{what} for {self.limit / 60:g} minutes (timeout_minutes):\n" + "\n".join(lines) + "\n")
        sys.stderr.flush()
        self._wait_for(rank for rank in heard if rank not in silent)
        os._exit(1)  # the main thread waits in a collective

    def _wait_for(self, ranks: Iterable[int]) -> None:
        """Let those that live say the same: the first end breaks the others' collective, with an error of its own."""
        until, keys = time.monotonic() + self.limit / 2, [f"told {rank}" for rank in ranks]
        with suppress(RuntimeError):  # the store is gone: its process waited for this one
            self.store.set(f"told {self.rank}", "")
            while not self.store.check(keys) and time.monotonic() < until:
                time.sleep(0.05)
