"""Every backend passes the whole conformance suite, and agrees with the reference on what the suite feeds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backends import open_backend
from backends.api.conformance import CHECKS, Opener, config
from backends.api.conformance.bench import ASKS, FULL, compare, generate

NAMES = ("reference", "jax", "torch")
OPTIONS = {"reference": {"max_draft": 3}}


def opener(name: str) -> Opener:
    """The suite's opener for a backend."""
    return Opener(lambda spec, given: open_backend(name, spec, given), config(name, options=OPTIONS.get(name, {})))


@pytest.fixture(scope="module")
def openers() -> Iterator[dict[str, Opener]]:
    """One opener a backend for all checks, so that each finds what the one before left on the device."""
    kept, threads = {name: opener(name) for name in NAMES}, torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads only wait for one another
    yield kept
    torch.set_num_threads(threads)
    for each in kept.values():
        each.close()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_conforms(openers: dict[str, Opener], name: str, check: str) -> None:
    try:
        CHECKS[check](openers[name])
    except BaseException:
        openers[name].close()  # a check that fails leaves slots taken; the next one gets a new backend
        raise


@pytest.mark.parametrize("name", [n for n in NAMES if n != "reference"])
def test_agrees_with_reference(openers: dict[str, Opener], name: str) -> None:
    host, reference = openers[name](), openers["reference"]()
    for asks in (ASKS, FULL):
        compare(generate(reference, asks), generate(host, asks), asks)
