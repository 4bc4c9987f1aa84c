"""Deterministic mode: tiles keep the contract, and a request gets the same bits whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import open_backend
from backends.api.build import Host, Row, build
from backends.api.conformance import CHECKS, Opener, config
from backends.api.conformance.bench import SPEC, Ask, Made, Weights, compare, generate, one, prompt
from backends.api.limits import Limits
from backends.api.tiled import TILE, Tiled, cut
from engine.config import Resolved
from engine.errors import BackendLost
from engine.model.spec import ModelSpec

NOISY = {"temperature": 0.9, "seed": 11, "top_p": 0.9, "top_k": 40}
ASKS = [
    Ask(prompt=prompt(3, seed=1), make=8, chunk=32),
    Ask(prompt=prompt(30, seed=2), make=8, chunk=32),
    Ask(prompt=prompt(25, seed=3), make=8, chunk=9, values=NOISY),
    Ask(prompt=prompt(39, seed=4), make=8, chunk=13),
    Ask(prompt=prompt(7, seed=5), make=8, chunk=2, values=NOISY | {"min_p": 0.02}),
]


def whole(name: str, **overrides: Any) -> Resolved:
    return config(name, deterministic=True, max_tokens=32, **overrides)


@pytest.fixture(scope="module")
def conforming() -> Iterator[Opener]:
    options = {"max_draft": 3}
    yield (
        opener := Opener(
            lambda spec, given: open_backend("reference", spec, given), whole("reference", options=options)
        )
    )
    opener.close()


@pytest.mark.parametrize("check", CHECKS)
def test_tiles_keep_the_contract(conforming: Opener, check: str) -> None:
    CHECKS[check](conforming)


@pytest.fixture(scope="module", params=["jax", "torch"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    backend = open_backend(request.param, SPEC, whole(request.param))
    assert isinstance(backend, Tiled)
    backend.load(Weights())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads only wait for one another
    yield Host(backend, taps=("logits",))
    torch.set_num_threads(threads)
    backend.close()


def same(a: Made, b: Made) -> None:
    assert a.tokens == b.tokens
    assert all(np.array_equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def test_the_same_bits_alone_batched_and_in_any_chunks(host: Host) -> None:
    alone = [one(host, ask) for ask in ASKS]
    for chunk in (32, 5, 1):
        for a, ask in zip(alone, ASKS, strict=True):
            same(a, one(host, replace(ask, chunk=chunk)))
    for reverse in (False, True):
        for a, b in zip(alone, generate(host, ASKS, reverse=reverse), strict=True):
            same(a, b)


def test_the_same_bits_from_a_warm_cache(host: Host) -> None:
    ids = prompt(22, seed=8)
    cold = one(host, Ask(prompt=ids, make=1))
    root = host.open()
    host.run([(root, host.row(root, ids[:17], output=0))])
    warm = host.open(shared=root, cached=16)
    result = host.run([(warm, host.row(warm, ids[16:]))])
    assert result.tokens[0, 0] == cold.tokens[0]
    assert np.array_equal(np.asarray(result.taps["logits"][-1], np.float32), cold.logits[0])
    for text in (root, warm):
        host.close(text)


def test_it_agrees_with_the_reference(host: Host) -> None:
    reference = open_backend("reference", SPEC, config("reference", max_tokens=32))
    reference.load(Weights())
    compare(generate(Host(reference, taps=("logits",)), ASKS), generate(host, ASKS), ASKS)


class Shapes:
    """A backend within that notes the shapes of its steps."""

    def __init__(self, spec: ModelSpec, given: Resolved) -> None:
        self.real = open_backend("reference", spec, replace(given, deterministic=False))
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def forward(self, step: Any) -> int:
        self.sizes.append(len(step.tokens))
        return self.real.forward(step)


def test_every_step_within_has_the_one_shape() -> None:
    backend = Tiled(SPEC, whole("reference"), Shapes)  # type: ignore[arg-type]
    backend.load(Weights())
    generate(Host(backend), ASKS)
    assert set(backend.inner.sizes) == {TILE}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["reference", "jax", "torch"])
def test_all_page_edits_of_a_step_may_be_of_one_tile(name: str) -> None:
    """As of rows of which all but a token is cached, beside those of slots that have no row."""
    backend = open_backend(name, SPEC, whole(name))
    backend.load(Weights())
    limits = backend.limits
    entries = [(slot, i, 0) for slot in range(limits.slots) for i in range(limits.max_row_pages[0])]
    most = entries[: limits.max_edits]
    assert min(len(most), limits.max_edits) >= Limits.of(SPEC, whole(name)).max_edits
    rows = [Row(slot=0, tokens=[1], start=0, upper=1), Row(slot=1, tokens=[2], start=0, upper=1)]
    backend.sample(backend.forward(build(limits, 0, rows, [most] * len(limits.groups))))
    assert backend.collect(0).counts.tolist() == [1, 1]
    backend.close()


def test_a_part_of_a_step_that_is_refused_ends_the_backend() -> None:
    """What came before it is on its way, and can't be taken back: that is said, not hidden behind a failed step."""
    backend = Tiled(SPEC, whole("reference"), Shapes)  # type: ignore[arg-type]
    backend.load(Weights())
    rows = [Row(slot=0, tokens=[1] * TILE, start=0, upper=TILE), Row(slot=1, tokens=[-1], upper=5)]
    edits = [[(0, i, i) for i in range(-(-TILE // group.page))] for group in backend.limits.groups]
    with pytest.raises(BackendLost, match="refused a part of a step"):  # slot 1 was never seated
        backend.forward(build(backend.limits, 0, rows, edits))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=6))
def test_tiles_cover_a_step(rows: list[tuple[int, int]]) -> None:
    lens = np.array([n for n, _ in rows], np.int32)
    drafts = np.array([min(d, n - 1) for n, d in rows], np.int32)
    step: Any = type("Step", (), {"lens": lens, "drafts": drafts})
    tiles = cut(step)
    fed = [0] * len(rows)
    for tile in tiles:
        assert 0 < sum(p.count for p in tile) <= TILE
        assert len({p.row for p in tile}) == len(tile)
        for p in tile:
            assert p.first == fed[p.row]
            fed[p.row] += p.count
            assert p.last == (fed[p.row] == lens[p.row])
            assert not p.last or p.count > drafts[p.row]
    assert fed == lens.tolist()
