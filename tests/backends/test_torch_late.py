"""Once a torch backend is ready nothing compiles on a GPU, nothing in a step waits for the device, and no capture
copies from or to the host: on one that is only pretended (pretended.py), with the kernels' own keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.backends.serve_pretended import CASES

FEW = ("shared",)


def serve(*cases: str, **settings: str) -> str:
    """What it prints of these cases."""
    seed = str(np.random.SeedSequence().entropy % 2**31)  # type: ignore[operator]
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.serve_pretended", seed, *cases],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, f"seed {seed}: {done.stderr[-2000:]}"
    return done.stdout


def test_nothing_compiles_late() -> None:
    pytest.importorskip("triton")
    assert serve(*FEW) == "done\n"


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(CASES) - set(FEW)))
def test_nothing_compiles_late_of(case: str) -> None:
    pytest.importorskip("triton")
    assert serve(case) == "done\n"


@pytest.mark.slow
def test_a_kernel_that_no_step_of_the_warm_up_runs_is_noticed() -> None:
    pytest.importorskip("triton")
    assert ": late: _few_rows" in serve("narrow, none captured", FAULT="rows")
