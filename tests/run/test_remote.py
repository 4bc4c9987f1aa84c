"""A backend that is several processes: the protocol through a socket, and what happens when one of them misbehaves.
Every rank is a whole reference backend (replica.py); tests/parity/test_tp.py and tests/backends/test_mesh.py have real
meshes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.api.build import Host
from backends.api.conformance import config
from backends.api.conformance.bench import SPEC, Weights
from engine.errors import BackendLost, ConfigError, ModelError
from engine.mesh import MeshSpec
from engine.run import remote
from engine.run.remote import RemoteBackend

FILE = str(Path(__file__).with_name("replica.py"))
TWO = config("torch", mesh=MeshSpec(tp=2))


def opened(how: str = "well") -> RemoteBackend:
    return RemoteBackend(SPEC, TWO, program=(FILE, how))


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    stop = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < stop:
        time.sleep(0.02)
    return not any(map(alive, pids))


class Short(Weights):
    """One matrix is too short."""

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        value = super().read(name, part)
        return value[1:] if name == "layers.1.mlp.up" else value


class Missing(Weights):
    """One matrix is not there."""

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        if name == "layers.1.mlp.up":
            raise ModelError("layers.1.mlp.up: not there", field=name)
        return super().read(name, part)


@pytest.mark.parametrize("source", [Short, Missing])
def test_weights_that_fail_are_named_and_no_step_is_taken(source: type[Weights]) -> None:
    host = Host(opened())
    try:
        with pytest.raises(ModelError) as found:
            host.backend.load(source(), version=5)
        assert found.value.field == "layers.1.mlp.up"
        text = host.open()
        step = host.step([(text, host.row(text, [1, 2]))])
        with pytest.raises(Exception, match="load comes before the first forward"):
            host.backend.forward(step)
        host.backend.load(Weights(), version=6)
        host.backend.sample(host.backend.forward(step))
        assert host.backend.collect(step.step).version == 6
    finally:
        host.backend.close()


def step_of(backend: RemoteBackend) -> tuple[Host, Any]:
    backend.load(Weights())
    host = Host(backend)
    text = host.open()
    return host, host.step([(text, host.row(text, [3, 4, 5]))])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "rank 1 failed: ZeroDivisionError: a fault of ours"),
        ("fails", "rank 1 failed: no memory is left"),
        ("exits", "the process of rank 1 ended with exit code 7"),
        ("disagrees", "rank 1 chose other tokens than rank 0 in step 1"),
        ("hangs", "rank 1 gave no answer after"),
    ],
)
def test_one_that_misbehaves_ends_all(how: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(remote, "BLAME_SECONDS", 0.2)
    backend = opened(how)
    pids = backend.pids
    _, step = step_of(backend)

    def turn() -> None:
        backend.sample(backend.forward(step))  # one that ends may be gone before this is sent
        backend.collect(step.step, timeout=0.5)

    with pytest.raises(BackendLost, match=says):
        turn()
    assert not any(map(alive, pids))
    with pytest.raises(BackendLost):
        backend.forward(step)
    assert not backend.status().ready
    backend.close()


def test_one_that_was_killed_is_named_at_the_next_forward() -> None:
    backend = opened()
    pids = backend.pids
    _, step = step_of(backend)
    os.kill(pids[0], signal.SIGKILL)
    os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)  # to the last of its threads
    with pytest.raises(BackendLost, match="the process of rank 0 was killed by SIGKILL"):
        backend.forward(step)
    assert not any(map(alive, pids))


def test_what_a_process_refuses_at_the_start_is_raised_here() -> None:
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="rank 1 has no device") as found:
        opened("refuses")
    assert found.value.field == "mesh"
    assert len(os.listdir("/proc/self/fd")) <= files


def test_forward_waits_for_nobody_and_threads_may_ask() -> None:
    backend = opened("slow")
    try:
        _, step = step_of(backend)
        start = time.monotonic()
        backend.sample(backend.forward(step))
        assert time.monotonic() - start < 0.5
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(backend.status().device))
        thread.start()
        thread.join()
        assert seen == ["2 x numpy"]
        result = backend.collect(step.step)
        assert time.monotonic() - start >= 1.0
        assert result.counts.tolist() == [1]
        assert result.tokens.dtype == np.int32
    finally:
        backend.close()


ORPHAN = """
import time
from tests.run.test_remote import opened
backend = opened()
print(*backend.pids, flush=True)
time.sleep(1000)
"""


def test_they_die_with_their_parent() -> None:
    process = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(pids)
