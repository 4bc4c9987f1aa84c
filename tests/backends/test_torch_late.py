"""Once a torch backend is ready nothing compiles on a GPU, nothing in a step waits for the device, and no capture
copies from or to the host: on one that is only pretended (pretended.py), with the kernels' own keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.torch.late import Late
from tests.backends.serve_pretended import CASES

FEW = ("shared",)


def run(*cases: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The program, of these cases and a seed of their own."""
    seed = str(np.random.SeedSequence().entropy % 2**31)  # type: ignore[operator]
    return subprocess.run(
        [sys.executable, "-m", "tests.backends.serve_pretended", seed, *cases],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_compiles_late() -> None:
    pytest.importorskip("triton")
    done = run(*FEW)
    assert done.stdout == "done\n", f"{done.args}: {done.stdout}{done.stderr[-2000:]}"


def test_a_kernel_is_counted_once_however_often_a_backend_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    before: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: before.append(event["key"]))
    late = Late()
    for _ in range(2):
        late.listen(torch.device("cuda"))
    with late.inside(True):
        knobs.runtime.jit_post_compile_hook(key="a")
    knobs.runtime.jit_post_compile_hook(key="b")
    assert (late.count, before) == (1, ["a", "b"])


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(CASES) - set(FEW)))
def test_nothing_compiles_late_of(case: str) -> None:
    pytest.importorskip("triton")
    done = run(case)
    assert done.stdout == "done\n", f"{done.args}: {done.stdout}{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "case", "told"),
    [
        ("rows", "narrow, none captured", ": late: _few_rows"),
        ("waits", "none captured", "tolist waits for the device"),
        ("captured", "plain", "to from or to the host is captured"),
    ],
)
def test_planted_faults_are_noticed(fault: str, case: str, told: str) -> None:
    pytest.importorskip("triton")
    done = run(case, FAULT=fault)
    assert told in done.stdout + done.stderr
