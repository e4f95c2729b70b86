"""On what the runs of a study ran: the machine, and the versions of what counts."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.study.settings import ROOT
from tools.common.text import bytes_text


def describe() -> dict[str, str]:
    """Device, processor, cores, memory, and versions of Python, torch, MONAI and this repository, as they are now."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processor": _processor(),
        "cores": str(cores()),
        "memory": bytes_text(memory),
        "python": platform.python_version(),
        "torch": version("torch"),
        "monai": version("monai"),
        "commit": _commit(),
    }


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the working tree, with a `+` if it holds changes."""
    words = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"
    return done.stdout.strip()
