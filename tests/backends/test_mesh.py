"""Meshes pass the whole conformance suite. jax's in a process of its own, as its devices are settled when it starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from backends import open_backend
from backends.api.conformance import CHECKS, Opener, config
from backends.api.conformance.bench import ASKS, Ask, compare, generate, one, prompt
from engine.mesh import MeshSpec
from engine.run.remote import RemoteBackend

SLOW = ("closed", "warm")
"""Start a mesh anew."""


DRAWN = [
    Ask(prompt=prompt(n, seed=n), make=6, chunk=32, values={"temperature": 0.9, "seed": n, "top_p": 0.9})
    for n in (3, 30, 25)
]


def opener(name: str, tp: int) -> Opener:
    make = RemoteBackend if name == "torch" else lambda spec, given: open_backend(name, spec, given)
    return Opener(make, config(name, mesh=MeshSpec(tp=tp)))


def agrees(mesh: Opener) -> None:
    """With the reference, on what the suite feeds."""
    with closing(Opener(lambda spec, given: open_backend("reference", spec, given), config("reference"))) as alone:
        compare(generate(alone(), ASKS), generate(mesh(), ASKS), ASKS)


@pytest.fixture(scope="module")
def torch() -> Iterator[Opener]:
    with closing(opener("torch", 2)) as mesh:
        yield mesh


@pytest.mark.parametrize("check", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CHECKS])
def test_torch_conforms(torch: Opener, check: str) -> None:
    try:
        CHECKS[check](torch)
    except BaseException:
        torch.close()
        raise


def test_torch_agrees_with_the_reference(torch: Opener) -> None:
    agrees(torch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp"), [("jax", 2), ("jax", 4), ("torch", 4)])
def test_conforms_in_a_process_of_its_own(name: str, tp: int) -> None:
    command = [sys.executable, "-m", "tests.backends.test_mesh", name, str(tp)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split() == [*CHECKS, "agrees"]


def test_a_mesh_that_comes_too_late_is_told_what_to_do() -> None:
    code = """
from radixmesh import Engine
from engine.errors import ConfigError
small = {"backend": "jax", "skip_tokenizer": True, "max_len": 32, "sched.max_tokens": 8, "sched.token_buckets": [8]}
Engine(**small).shutdown()
try:
    Engine(mesh="tp=2", **small)
except ConfigError as error:
    print(error.field, error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert ran.stdout.startswith("mesh mesh: tp=2 needs 2 devices, there are 1: jax had started in this process before")
    assert "backend.jax.devices" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_deterministic_mode_gives_the_same_bits(name: str) -> None:
    command = [sys.executable, "-m", "tests.backends.test_mesh", name, "2", "deterministic"]
    subprocess.run(command, timeout=280, check=True)


def same_bits(name: str, tp: int) -> None:
    """Alone, in chunks of another size, and batched."""
    host = opener(name, tp)(fresh=True, deterministic=True, max_tokens=32)
    host.taps = ("logits",)
    alone = [one(host, ask) for ask in DRAWN]
    again = [one(host, replace(ask, chunk=5)) for ask in DRAWN]
    batch = generate(host, DRAWN)
    for a, *others in zip(alone, again, batch, strict=True):
        for b in others:
            assert a.tokens == b.tokens
            assert all(np.array_equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
    host.backend.close()


if __name__ == "__main__" and sys.argv[3:] == ["deterministic"]:
    same_bits(sys.argv[1], int(sys.argv[2]))
elif __name__ == "__main__":
    with closing(opener(sys.argv[1], int(sys.argv[2]))) as mesh:
        for name, check in CHECKS.items():
            check(mesh)
            print(name, flush=True)
        agrees(mesh)
        print("agrees")
