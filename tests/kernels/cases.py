"""Random ragged cases for attention and KV write, with plain float64 references; and how faults are planted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
PAGE, ENTRIES, ROWS, TOKENS = 16, 24, 6, 24
INTERPRET = pltpu.InterpretParams(detect_races=True)
Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a kernel is compiled for. dtype: of the cache; one of 8 bits has scales, and is asked in float32."""

    q_heads: int
    kv_heads: int
    head: int
    dtype: str
    window: int | None = None
    cap: float | None = None
    sinks: bool = False

    @property
    def scaled(self) -> bool:
        return self.dtype in ("int8", "float8_e4m3fn")

    @property
    def asks(self) -> str:
        return "float32" if self.scaled else self.dtype

    @property
    def page(self) -> int:
        return 2 * PAGE if self.scaled else PAGE


KINDS = {
    "grouped": Kind(q_heads=8, kv_heads=4, head=128, dtype="bfloat16"),
    "window, sinks": Kind(q_heads=4, kv_heads=2, head=64, dtype="bfloat16", window=20, sinks=True),
    "float32": Kind(q_heads=2, kv_heads=2, head=128, dtype="float32"),
    "cap, odd group": Kind(q_heads=3, kv_heads=1, head=64, dtype="float32", cap=3.0),
    "wide, window": Kind(q_heads=8, kv_heads=1, head=256, dtype="float32", window=33),
    "int8": Kind(q_heads=8, kv_heads=2, head=128, dtype="int8", window=45),
    "fp8, sinks": Kind(q_heads=3, kv_heads=3, head=64, dtype="float8_e4m3fn", sinks=True),
}


class Row(NamedTuple):
    """length: queries, the last positions of the row; before: positions cached before them. parents: of each query but
    the first, which it follows, where that is not the one before."""

    length: int
    before: int
    parents: tuple[int, ...] = ()

    def path(self, i: int) -> list[int]:
        """Query i and those that it follows, last first."""
        out = [i]
        while out[-1]:
            out.append(self.parents[out[-1] - 1] if self.parents else out[-1] - 1)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step on one layer. Pages that nobody may read hold NaN, and so do places past a row's end.

    keys, values: of each row [positions, kv_heads, head]; those outside of a window are NaN. The cache holds them over
    scales [2, kv_heads]; NaN is 99 in int8.
    """

    kind: Kind
    rows: list[Row]
    q: Array
    keys: list[Array]
    values: list[Array]
    sinks: Array
    scales: Array
    cache: Array
    table: Array
    base: Array
    at: int
    tiles: Array
    total: int

    @property
    def tree(self) -> tuple[Array, Array, Array]:
        """As attention.Tree has it: root [R], stands [T], bits [2, T]. What nobody looks at is anything."""
        root = np.array([row.before if row.parents else 1 << 30 for row in self.rows], np.int32)
        stands, bits = np.full(len(self.q), 10**6, np.int32), np.full(len(self.q), 2**64 - 1, np.uint64)
        token = 0
        for row in self.rows:
            for i in range(row.length):
                path = row.path(i)
                stands[token] = row.before + len(path) - 1
                if row.parents:
                    bits[token] = sum(1 << j for j in path[: self.kind.window])
                token += 1
        return root, stands, bits.view(np.int32).reshape(-1, 2).T.copy()


def rounded(x: Array, dtype: str) -> Array:
    """What is left of x in a dtype."""
    x = np.clip(np.rint(x), -128, 127) if dtype == "int8" else x
    return np.array(jnp.asarray(x, dtype).astype(jnp.float32))


def draw_rows(draw: np.random.Generator) -> list[Row]:
    """Rows that are empty, decode, verify drafts at the end of a long text or read a prompt; many at a page's edge."""
    rows, left = [], TOKENS
    for _ in range(ROWS):
        length = int(min(left, draw.choice([0, 1, 1, 1, 2, 4, draw.integers(1, 18)])))
        before = int(draw.choice([0, PAGE * draw.integers(0, 20) - min(length, 1) * draw.integers(-1, 2), 300]))
        rows.append(Row(length, max(before, 0)))
        left -= length
    return rows


def draw_trees(draw: np.random.Generator) -> list[Row]:
    """Rows of `draw_rows`, of which most with guesses are random trees: bushes, chains, and what lies between; one of
    them is large."""
    rows, large = draw_rows(draw), int(draw.integers(ROWS))
    rows[large] = Row(int(draw.integers(30, 65)), int(draw.choice([0, PAGE, 200, 255, 300])))
    for r, row in enumerate(rows):
        wide = int(draw.choice([1, 3, 64]))
        if r == large or draw.random() < 0.7:
            parents = tuple(int(draw.integers(max(0, i - wide), i)) for i in range(1, row.length))
            rows[r] = row._replace(parents=parents)
    return rows


def make(kind: Kind, seed: int, most: int, rows: list[Row] | None = None, tokens: int = TOKENS, small: int = 0) -> Case:
    """most: queries of a tile; small: of one of a tree."""
    draw = np.random.default_rng(seed)
    rows = rows or draw_rows(draw)
    count, page_size = ROWS * ENTRIES + 2, kind.page
    scales = np.ones((2, kind.kv_heads), np.float32)
    if kind.scaled:
        scales = draw.uniform(0.01, 0.03, (2, kind.kv_heads)).astype(np.float32)
    names, used = draw.permutation(count), 0
    cache = np.full((2 * count, page_size, kind.kv_heads * 2 * kind.head), np.nan, np.float32)
    table, base = draw.integers(0, count, (ROWS, ENTRIES)), np.zeros(ROWS, np.int64)
    keys, values, tiles, token = [], [], [], 0
    for r, (length, before, parents) in enumerate(rows):
        shape = length + before, kind.kv_heads, kind.head
        stored = [rounded(draw.normal(size=shape).astype(np.float32) / s[:, None], kind.dtype) for s in scales]
        low = max(0, before - kind.window + 1) if kind.window else 0
        for x in stored:
            x[:low] = np.nan
        base[r] = low // page_size * page_size
        for entry in range(-(-(length + before - base[r]) // page_size) if length else 0):
            page, at = count + names[used], base[r] + entry * page_size
            lines = np.stack([x[at : at + page_size] for x in stored], 2)
            cache[page, : len(lines)] = lines.reshape(len(lines), -1)
            table[r, entry], used = names[used], used + 1
        keys.append(stored[0] * scales[0, :, None])
        values.append(stored[1] * scales[1, :, None])
        size = small if parents else most
        tiles += [(r, token + i, min(size, length - i), before + i) for i in range(0, length, size)]
        token += length
    listed = np.full((tokens, 4), 10**6)
    listed[: len(tiles)] = np.reshape(tiles, (-1, 4))
    return Case(
        kind=kind,
        rows=rows,
        q=rounded(draw.normal(size=(tokens, kind.q_heads, kind.head)).astype(np.float32), kind.asks),
        keys=keys,
        values=values,
        sinks=draw.normal(size=kind.q_heads).astype(np.float32),
        scales=scales,
        cache=np.nan_to_num(cache, nan=99) if kind.dtype == "int8" else cache,
        table=table.astype(np.int32),
        base=base.astype(np.int32),
        at=count,
        tiles=listed.astype(np.int32),
        total=len(tiles),
    )


def want(case: Case) -> Array:
    """Attention, written to be read, in float64: [tokens that are fed, q_heads, head]."""
    kind, out = case.kind, []
    for row, k, v in zip(case.rows, case.keys, case.values, strict=True):
        for i in range(row.length):
            path = row.path(i)[::-1]
            seen = [*range(row.before), *(row.before + j for j in path)][-(kind.window or 0) :]
            line = []
            for h in range(kind.q_heads):
                g = h * kind.kv_heads // kind.q_heads
                query = case.q[len(out), h].astype(np.float64)
                s = k[seen, g].astype(np.float64) @ query * kind.head**-0.5
                s = kind.cap * np.tanh(s / kind.cap) if kind.cap else s
                s = np.append(s, case.sinks[h]) if kind.sinks else s
                p = np.exp(s - s.max())
                line.append((p / p.sum())[: len(seen)] @ v[seen, g].astype(np.float64))
            out.append(np.stack(line))
    return np.stack(out) if out else np.zeros((0, kind.q_heads, kind.head))


def races() -> bool:
    """Whether the interpreter found one in its last call."""
    found: Any = import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races
    return bool(found.races_found)


@contextmanager
def planted(module: str, old: str, new: str, *above: str) -> Iterator[ModuleType]:
    """The last of `above` (or the module), loaded anew over `module` with a line changed, for a while."""
    names = [module, *above]
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        for name in names:
            path = ROOT / (name.replace(".", "/") + ".py")
            made = module_from_spec(spec_from_loader(name, SourceFileLoader(name, str(path))))  # type: ignore[arg-type]
            source = path.read_text()
            if name == module:
                assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {path}"
                source = source.replace(old, new)
            sys.modules[name] = made
            exec(compile(source, str(path), "exec"), made.__dict__)
        yield made
    finally:
        sys.modules.update(kept)
