"""Caches of 8 bits: every backend holds the same bytes, and what it computes from them is what the reference does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backends import open_backend
from backends.api.build import Host
from backends.api.conformance import CHECKS, Opener, config
from backends.api.conformance.bench import ASKS, FULL, SPEC, Ask, Weights, compare, generate, prompt
from backends.api.step import NONFINITE
from backends.jax import caches as jax_caches
from backends.reference import caches as reference_caches
from backends.reference.caches import Caches, Cells, Row
from backends.torch import attend as torch_attend
from backends.torch import caches as torch_caches
from engine.model.groups import Place

KINDS = ("int8", "fp8")
NAMES = ("reference", "jax", "torch")
OPTIONS = {"reference": {"max_draft": 3}}
FEW = ("chunks", "batches", "brim", "tenants", "stale", "prefixes", "windows", "garbage", "copies", "weights")
"""Checks of what a cache does."""
EXACT = 2e-4


def opener(name: str, kind: str) -> Opener:
    given = config(name, cache_dtype=kind, token_buckets=(16,), options=OPTIONS.get(name, {}))
    return Opener(partial(open_backend, name), given)


@pytest.fixture(scope="module")
def openers() -> Iterator[dict[tuple[str, str], Opener]]:
    kept, threads = {(name, kind): opener(name, kind) for name in NAMES for kind in KINDS}, torch.get_num_threads()
    torch.set_num_threads(1)
    yield kept
    torch.set_num_threads(threads)
    for each in kept.values():
        each.close()


def numbers() -> NDArray[np.float32]:
    """Every number of e4m3fn, what lies between two, their neighbours in float32, and what is past all."""
    held = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    held = np.unique(held[np.isfinite(held)])
    edges = np.concatenate([held, (held[1:] + held[:-1]) / 2, np.arange(-129, 129, 0.5)]).astype(np.float32)
    near = [edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))]
    wild = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * np.float32(90)
    rest = np.array([0, -0.0, 1e-20, 464, 465, 1e9, -1e9, 3e38, np.inf, -np.inf, np.nan], np.float32)
    out = np.concatenate([*near, wild, rest])
    return out[: len(out) // 8 * 8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
def test_the_same_bytes(kind: str, wide: str) -> None:
    """In numpy, jax and torch, and each as far from the number as half a step."""
    scales = np.array([[1.0, 0.37], [0.011, 3.0]], np.float32)
    inverses = 1 / scales
    with np.errstate(over="ignore"):
        x = numbers().reshape(-1, 1, 2, 4)[:, [0, 0]] * scales[:, :, None]  # [T, 2, kv_heads, head_dim]
    x = x.astype(ml_dtypes.bfloat16 if wide == "bfloat16" else np.float32)
    want = np.stack([reference_caches.narrow(x[:, side], inverses[side], kind) for side in (0, 1)], 1)
    full = x.astype(np.float32)
    like = jnp.zeros(1, jax_caches.BITS.get(kind, jnp.int8))
    found = {
        "torch": torch_caches.narrow(
            torch.from_numpy(full).to(torch_caches.DTYPES[wide]), torch_caches.DTYPES[kind], torch.from_numpy(inverses)
        )
        .view(torch.uint8)
        .numpy(),
        "jax": np.asarray(
            jax.jit(lambda v, s: jax_caches.to_lines(v, like, s))(jnp.asarray(x).swapaxes(1, 2), jnp.asarray(inverses))
        ).swapaxes(1, 2),
    }
    number = ~np.isnan(full)
    for name, got in found.items():
        same = got.view(np.uint8) == want.view(np.uint8)
        assert same[number].all(), name
        rest = np.ascontiguousarray(got).view(want.dtype)[~number].astype(np.float32)
        assert (rest == 0).all() if kind == "int8" else np.isnan(rest).all()
    most = 127 if kind == "int8" else 448
    ratio = np.clip(full * inverses[:, :, None], -most, most)[number]
    step = 1 if kind == "int8" else 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(ratio), 1e-9))) - 3, -9)
    assert (np.abs(want.astype(np.float32)[number] - ratio) <= step / 2).all()


@pytest.mark.parametrize("check", FEW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_conforms(openers: dict[tuple[str, str], Opener], name: str, kind: str, check: str) -> None:
    try:
        CHECKS[check](openers[name, kind])
    except BaseException:
        openers[name, kind].close()
        raise


def cache_of(backend: Any, place: Place) -> NDArray[Any]:
    """What a backend holds of a layer, [2, positions, kv_heads, head_dim], in the reference's dtype."""
    group = backend.limits.groups[place.group]
    if isinstance(backend.caches, torch_caches.Caches):
        store = backend.caches.groups[place.group][place.rank][:-1]
        out = store.view(torch.uint8).numpy().transpose(1, 0, 2, 3)
    else:
        whole = np.asarray(backend.caches[place.group]).view(np.uint8)
        lines = whole.reshape(len(group.layers), -1, group.kv_heads, 2, group.head_dim)[place.rank]
        out = lines.transpose(2, 0, 1, 3)
    return np.ascontiguousarray(out)


class Pinned(Caches):
    """The reference's caches, which hold what another backend held after the same steps: what either made of a number
    between two steps is no difference then. seen: bytes, and how many differed."""

    def __init__(self, limits: Any, dtype: str, other: Any) -> None:
        super().__init__(limits, dtype)
        self.other, self.seen = other, [0, 0]

    def write(
        self, place: Place, rows: Sequence[Row], cells: Sequence[Sequence[Cells]], k: Any, v: Any, scales: Any
    ) -> None:
        super().write(place, rows, cells, k, v, scales)
        memory = self.groups[place.group].memory[place.rank]
        theirs = cache_of(self.other, place).view(memory.dtype)
        for cell in cells[place.group]:
            own, right = memory[:, cell.new], theirs[:, cell.new]
            apart = np.abs(ordered(own) - ordered(right))
            assert apart.max() <= 1, "bytes differ by more than a step"
            self.seen[0] += apart.size
            self.seen[1] += int((apart > 0).sum())
            memory[:, cell.new] = right


def ordered(held: NDArray[Any]) -> NDArray[np.int32]:
    """Numbers as integers whose neighbours are neighbours."""
    if held.dtype == np.int8:
        return held.astype(np.int32)
    bits = held.view(np.uint8).astype(np.int32)
    return np.where(bits < 128, bits, 128 - bits)


def pinned(other: Opener, reference: Opener, asks: Sequence[Ask]) -> Pinned:
    """Assert that a backend agrees with a reference that holds its bytes."""
    theirs, right = (Host(host.backend, taps=host.taps) for host in (other(), reference()))
    backend: Any = right.backend
    made = generate(theirs, asks)
    before, backend.caches = backend.caches, Pinned(backend.limits, backend.config.cache_dtype, theirs.backend)
    try:
        assert theirs.tolerance == EXACT
        compare(generate(right, asks), made, asks)
        return backend.caches  # type: ignore[no-any-return]
    finally:
        backend.caches = before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_agrees_with_the_reference(openers: dict[tuple[str, str], Opener], name: str, kind: str) -> None:
    """Logits within what float32 is off by, given the same bytes, in chunks and side by side; and the bytes are the
    same but for the few numbers that lie between two of them."""
    for asks in (ASKS, FULL):
        held = pinned(openers[name, kind], openers["reference", kind], asks)
        assert held.seen[0] > 4000
        assert held.seen[1] <= held.seen[0] / 1000


def test_it_shows_that_there_are_8_bits(openers: dict[tuple[str, str], Opener]) -> None:
    """The tolerance is not so wide that a cache of float32 would pass."""
    wide = Host(opener("torch", "float32")().backend, taps=("logits",))
    for kind in KINDS:
        narrow = Host(openers["torch", kind]().backend, taps=("logits",))
        with pytest.raises(AssertionError, match=r"logits differ|token \d+ differs"):
            compare(generate(wide, ASKS), generate(narrow, ASKS), ASKS)


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_scales_show(
    openers: dict[tuple[str, str], Opener], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys read by the scale of values, and the reverse."""
    widen = torch_caches.widen

    def swapped(held: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None) -> torch.Tensor:
        return widen(held, dtype, None if scales is None else scales.flip(0))

    monkeypatch.setattr(torch_attend, "widen", swapped)
    with pytest.raises(AssertionError):
        pinned(openers["torch", kind], openers["reference", kind], ASKS)


@pytest.mark.slow
@pytest.mark.parametrize("side", [0, 1])
def test_a_wrong_scale_shows_in_jax(
    openers: dict[tuple[str, str], Opener], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, or values, written by their neighbour's scale."""
    to_lines = jax_caches.to_lines

    def rolled(kv: jax.Array, cache: jax.Array, inverses: jax.Array) -> jax.Array:
        return to_lines(kv, cache, inverses.at[side].set(inverses[side, ::-1]))

    monkeypatch.setattr("backends.jax.attend.to_lines", rolled)
    bad = opener("jax", "int8")
    with pytest.raises(AssertionError):
        pinned(bad, openers["reference", "int8"], ASKS)
    bad.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_not_finite_is_told(openers: dict[tuple[str, str], Opener], name: str, kind: str) -> None:
    """By the step that computes it; int8 can't hold it for the steps after."""
    host = openers[name, kind]()
    host.backend.load(Weights(poison=[7]), version=1)
    text = host.open()
    result = host.run([(text, host.row(text, [*(t for t in prompt(5) if t != 7), 7]))])
    host.close(text)
    host.backend.load(Weights())
    assert result.status.tolist() == [NONFINITE]


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_a_byte_a_number(openers: dict[tuple[str, str], Opener], name: str) -> None:
    host = openers[name, "int8"]()
    numbers = sum(
        n * g.page * len(g.layers) * 2 * g.kv_heads * g.head_dim
        for n, g in zip(host.limits.pages, host.limits.groups, strict=True)
    )
    spare = sum(len(g.layers) * 2 * g.kv_heads * g.head_dim for g in host.limits.groups) if name == "torch" else 0
    assert host.backend.status().memory["cache"] == numbers + spare
    assert len(SPEC.layers) == 2
