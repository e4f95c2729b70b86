"""Shared by all tests: their order, the real scans, and commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", database=None, deadline=None, print_blob=True)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared/data"


# files that start processes or train; the longest first, so that no process ends long after the others
LONG = (
    "test_study_smoke",
    "test_new_bundle",
    "test_install",
    "test_seg_commands",
    "test_commands",
    "test_methods",
    "test_seg_export",
    "test_seg_training",
    "test_bad_input",
    "test_learning",
    "test_verify",
    "test_distributed",
    "test_seg_federated",
    "test_configs",
    "test_seg_configs",
    "test_seg_inference",
    "test_resume",
    "test_kill",
    "test_release",
    "test_hybridmim",
    "test_quickstart",
)

# more of what faster tests look at, too: see README.md, "Develop it"
SLOW = (
    "test_the_smoke_preset",  # each of its commands is tested by itself
    # bundles of the same template as hybridmim_brats_seg
    *(f"test_every_bundle_passes[hybridmim_{name}_seg]" for name in ("btcv", "hippocampus", "liver", "spleen")),
    # SwinUNETR after UNet: its smallest crop is 64 voxels wide
    "test_every_term_has_a_gradient_to_its_head_and_to_the_encoder[swin]",
    "test_swin_unetr_takes_a_step",
    "test_swin_unetr_views_differ_by_dropout_only",
    "test_in_bfloat16_they_are_as_near_to_32_bit_as_the_plain_ones[swin_unetr]",  # emulated: minutes
    "test_in_bfloat16_they_are_as_near_to_32_bit_as_the_plain_ones[unetr]",
    "test_same_parameters_output_and_gradients[swin_unetr-True]",
    "test_monais_client_loads_verifies_and_exports_it",
    "test_the_pre_training_bundle_runs_with_its_scripts",
    "test_the_three_commands_follow_each_other",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, so that a broken one is seen soon."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else -1)
    for item in items:
        if item.name in SLOW:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans; a user's machine does not have it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real scans in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks are many times slower with several threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quiet():
    """Undoes what a workflow's `initialize` changes in this process."""
    hook, state = sys.excepthook, torch.get_rng_state()
    yield
    sys.excepthook = hook
    torch.set_rng_state(state)


@pytest.fixture(scope="session")
def command():
    """Runs a command in a process of its own: `command("-m", "monai.bundle", …)`, options as keywords."""

    def run(*arguments, cwd=ROOT, check=True, **options):
        line = [sys.executable, *map(str, arguments)]
        for name, value in options.items():
            line += [f"--{name}", str(value)]
        done = subprocess.run(
            line,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout}\n{done.stderr}"
        return done

    return run
