"""Two processes (gloo): work in shares that outlasts the time-out of collectives, the end, and one that hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from tools.weights.training_checkpoints import newest_checkpoint

SHARES = """
import time, torch.distributed as dist
from tools.common.ranks import in_shares, join_processes, leave_processes
join_processes(0.02)  # 1.2 s, and 2.4 s for collectives
def work(items):
    time.sleep(5 * dist.get_rank())
    return [item * item for item in items]
print(in_shares(work, range(5)), in_shares(work, [7]), flush=True)
leave_processes()
"""

LEAVES = """
import time, torch, torch.distributed as dist
from tools.common.ranks import join_processes, leave_processes
join_processes(1)
dist.all_reduce(torch.ones(1))
time.sleep(2 * (dist.get_rank() == LATE))
came = time.time()
leave_processes()
assert not dist.is_initialized()
print(came, time.time())
"""

DIES = """
import os, signal, torch.distributed as dist
from tools.common.ranks import join_processes, leave_processes
join_processes(0.05)  # 3 s
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGTERM)
leave_processes()
"""

SIGNALLED = """
import os, signal, time, torch.distributed as dist
from monai.engines import Evaluator, Trainer
from tools.common.ranks import join_processes
from tools.training.checkpointing import SaveCheckpoints

class Training(Trainer):
    def _iteration(self, engine, batch):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

class Slow:
    def state_dict(self):
        time.sleep(3)
        return {}

join_processes(1)
trainer, validator = Training("cpu", 2, [0, 1], decollate=False), Evaluator("cpu", [0], decollate=False)
state = {"trainer": trainer, "slow": Slow()}
saving = SaveCheckpoints("FOLDER", state, validator, interval=1, minutes=None, kept=1)
saving.attach(trainer)
saving.run(trainer)
"""

HANGS = """
import os, signal, time, torch, torch.distributed as dist
from tools.common.ranks import join_processes, mark_step
join_processes(0.05)  # 3 s
for step in range(1, 10):
    time.sleep(0.8 * (1 - dist.get_rank()))  # the other is late first, and its end must not come before this one's
    mark_step(f"step {step}")
    time.sleep(0.5)  # more than a beat
    if step == 4 and dist.get_rank() == 1:
        STOP
    dist.all_reduce(torch.ones(1))
"""


@pytest.fixture
def two():
    """Runs code in two processes of one group, without torchrun, which waits half a minute for one that is stopped."""
    started: list[subprocess.Popen] = []

    def run(code):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in "01":
            env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank}
            line = [sys.executable, "-c", code]
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(line, env=env, **pipe))
        return started

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_shares_may_take_longer_than_collectives(two):
    for process in two(SHARES):
        out, err = process.communicate(timeout=120)
        assert out == "[0, 1, 4, 9, 16] [49]\n", err


@pytest.mark.parametrize("late", [0, 1])  # the first holds the store
def test_no_process_leaves_before_all_are_ready(two, late):
    said = [process.communicate(timeout=120) for process in two(LEAVES.replace("LATE", str(late)))]
    assert not any(err for _, err in said), said
    (came, _), (_, left) = (map(float, said[rank][0].split()) for rank in (late, 1 - late))
    assert came < left


def test_one_that_dies_at_the_end_is_not_waited_for(two):
    first, _ = two(DIES)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "rank 1 hangs for 0.05 minutes (timeout_minutes):" in err


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process there")
def test_after_a_signal_none_ends_before_the_checkpoint_is_written(two, tmp_path):
    first, second = two(SIGNALLED.replace("FOLDER", tmp_path.as_posix()))
    second.wait(60)  # torchrun would end the other one now
    written = newest_checkpoint(tmp_path)
    _, err = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (75, 75), err
    assert written is not None


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "rank 1 hangs for 0.05 minutes (timeout_minutes):"),
        ("time.sleep(100)", "no step is completed for 0.05 minutes (timeout_minutes):"),
    ],
    ids=["stopped", "waits"],
)
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a signal that stops a process")
def test_a_process_that_hangs_is_named_and_ends_the_run(two, stop, said):
    first, second = two(HANGS.replace("STOP", stop))
    _, err = first.communicate(timeout=120)
    assert first.returncode == 1
    assert err.count(said) == 1  # it ends at once, before the collective does with an error
    assert "Traceback" not in err
    assert f"rank 0 (host {socket.gethostname()}, process {first.pid}): step 4\n" in err
    silent = ", gives no sign of life" if "SIGSTOP" in stop else ""
    assert f"rank 1 (host {socket.gethostname()}, process {second.pid}): step 4{silent}\n" in err
