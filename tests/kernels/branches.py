"""Random trees of rows through kernels_cuda.cascade, interpreted: run as a program, since Triton must be told before it
is imported. Prints a line of JSON for each case, then one for each fault: whether its case noticed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels_cuda import cascade
from kernels_cuda.attention import Rows

ROOT = Path(__file__).parents[2]
Group = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """shared: groups as ScheduleStep has them. own: positions of each row that are its own, its token among them.

    sms: of the device that is planned for, many = keys are cut into more tiles and parts. pad: rows beside the real.
    """

    shared: tuple[Group, ...]
    own: tuple[int, ...]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page: int = 4
    cap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    store: torch.dtype = torch.float32
    sms: int = 1
    pad: int = 0

    @property
    def lengths(self) -> list[int]:
        """Of the rows, after the step."""
        reach = [0] * len(self.own)
        for first, last, _, end in self.shared:
            reach[first : last + 1] = [end + 1] * (last + 1 - first)
        return [a + b for a, b in zip(reach, self.own, strict=True)]


def grown(seed: int, **fields: Any) -> Case:
    """A random tree of up to three levels, ragged, of whole pages."""
    rng, page = random.Random(seed), fields.get("page", 4)
    groups, rows = list[Group](), rng.randrange(4, 10)

    def grow(first: int, last: int, begin: int, level: int) -> None:
        at = first
        while at <= last:
            size = min(rng.randrange(1, last + 2 - at), last + 1 - at)
            if rng.random() < 0.7 and level < 3:
                end = begin + page * rng.randrange(1, 40 // page)
                groups.append((at, at + size - 1, begin, end - 1))
                grow(at, at + size - 1, end, level + 1)
            at += size

    grow(0, rows - 1, 0, 0)
    return Case(shared=tuple(groups), own=tuple(rng.choice([1, 2, 7, 30]) for _ in range(rows)), **fields)


CASES = {
    "no group": Case(shared=(), own=(1, 2, 33)),
    "one group": Case(shared=((0, 2, 0, 39),), own=(1, 9, 4, 7)),
    "a group of one": Case(shared=((0, 1, 0, 7), (2, 2, 0, 15)), own=(5, 1, 3, 2)),
    "three levels, padded": Case(
        shared=((0, 4, 0, 11), (0, 1, 12, 31), (2, 3, 12, 15), (2, 3, 16, 35)), own=(1, 5, 40, 2, 3, 8), pad=2
    ),
    "more rows than a tile has": Case(shared=((1, 10, 0, 19),), own=(1, 2, 3) * 4, q_heads=8),
    "many tiles along a row, parts": Case(
        shared=((0, 2, 0, 255), (0, 1, 256, 399)), own=(270, 1, 2, 1), sms=64, page=16, sinks=True
    ),
    "soft cap, sinks, group of 3": grown(3, q_heads=6, cap=3.0, sinks=True),
    "no heads in common, head 24": grown(4, q_heads=2, head_dim=24, page=1),
    "float16": grown(5, dtype=torch.float16, store=torch.float16),
    "int8": grown(6, store=torch.int8),
    "random": grown(7),
}
ALLOWED = {torch.float32: 2e-6, torch.float16: 2e-3}
"""Largest difference from float64, whose values are about 1."""
FAULTS = (  # module, what is wrong, the case that notices, what stands there and what instead
    ("tree", "a tile's rows are one short", "one group", "real = m < size * GROUP", "real = m < (size - 1) * GROUP"),
    ("tree", "all rows of a tile are its first", "one group", "first + r + m // GROUP", "first + r + m * 0"),
    ("tree", "a row reads what it shares again", "one group",
     "low = tl.load(covered + r)", "low = tl.load(covered + r) * 0"),
    ("tree", "a row does not see itself", "no group", "end = tl.load(start + r) + 1\n", "end = tl.load(start + r)\n"),
    ("tree", "parts overlap", "many tiles along a row, parts",
     "end = tl.minimum(end, low + each)", "end = tl.minimum(end, low + each + 1)"),
    ("tree", "tiles reach into the next", "one group", "(end - low) // STEP * STEP", "tl.cdiv(end - low, STEP) * STEP"),
    ("tree", "sums are not weighed", "one group", "weight = tl.exp2(its - top)", "weight = 1.0"),
    ("tree", "a slot is left out", "no group", "for i in range(filled + last)", "for i in range(filled + last - 1)"),
    ("tree", "a sink in another base", "soft cap, sinks, group of 3", "* 1.4426950408889634", "* 1.0"),
    ("cascade", "levels fill the same slots", "three levels, padded", "slot + i) for r", "i) for r"),
    ("cascade", "a level covers only itself", "three levels, padded",
     "[end + 1] * size, [slot", "[end + 1 - begin] * size, [slot"),
)  # fmt: skip


def measure(name: str) -> dict[str, Any]:
    """Largest difference from a plain softmax over float64. What no row may see holds NaN, or 127 for 8 bits."""
    case = CASES[name]
    g = torch.Generator().manual_seed(0)
    lengths, heads = case.lengths, case.q_heads // case.kv_heads
    count, width = len(lengths), -(-max(lengths) // case.page) + 1
    table = torch.randperm(count * width, generator=g).view(count, width)
    for first, last, begin, end in case.shared:
        here = slice(begin // case.page, (end + 1) // case.page)
        table[first : last + 1, here] = table[first, here].clone()
    dims = (2, case.kv_heads, case.head_dim)
    store = torch.full((count * width * case.page + 1, *dims), float("nan") if case.store.is_floating_point else 127)
    store, seen = store.to(case.store), torch.zeros(len(store), dtype=torch.bool)
    cells = [
        [int(table[r, i // case.page]) * case.page + i % case.page for i in range(n)] for r, n in enumerate(lengths)
    ]
    for own in cells:
        _fill(store, seen, own, g)
    q = (2 * torch.randn((count + case.pad, case.q_heads, case.head_dim), generator=g)).to(case.dtype)
    sinks = torch.randn(case.q_heads, generator=g).to(case.dtype) if case.sinks else None
    scales = (torch.rand((2, case.kv_heads), generator=g) + 0.5) / 64 if case.store == torch.int8 else None
    want = torch.zeros((count, case.q_heads, case.head_dim), dtype=torch.float64)
    for r, own in enumerate(cells):
        kv = store[own].double() * (1 if scales is None else scales.double()[None, :, :, None])
        k, v = kv.repeat_interleave(heads, 2).unbind(1)
        s = torch.einsum("hd,khd->hk", q[r].double(), k) * case.head_dim**-0.5
        s = s if case.cap is None else torch.tanh(s / case.cap) * case.cap
        if sinks is not None:
            s = torch.cat([s, sinks.double()[:, None]], 1)
        want[r] = torch.einsum("hk,khd->hd", s.softmax(-1)[:, : len(own)], v)
    got = _attend(case, q, store, table, lengths, sinks, scales)
    worst = (got[:count].double() - want).abs().max().item()
    return {"case": name, "error": worst, "padding": got[count:].abs().sum().item()}


def _fill(store: torch.Tensor, seen: torch.Tensor, cells: list[int], g: torch.Generator) -> None:
    """Random numbers where there are none."""
    new = torch.tensor(cells)[~seen[cells]]
    noise = torch.randn((len(new), *store.shape[1:]), generator=g)
    store[new] = (
        (noise * 64).round().clamp(-127, 127).to(torch.int8) if store.dtype == torch.int8 else noise.to(store.dtype)
    )
    seen[new] = True


def _attend(
    case: Case,
    q: torch.Tensor,
    store: torch.Tensor,
    table: torch.Tensor,
    lengths: list[int],
    sinks: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    group = case.q_heads // case.kv_heads
    count, pad = len(lengths), [0] * case.pad
    heads = cascade.tuning(group, case.head_dim, case.dtype.itemsize, False).heads
    made = cascade.cut(case.shared, count, group=group, kv_heads=case.kv_heads, heads=heads, sms=case.sms)
    shape = cascade.fit(made, max(case.own), kv_heads=case.kv_heads, sms=case.sms)
    shape = replace(shape, rows=count + case.pad)
    host = cascade.pad(made, shape)
    rows = Rows(
        torch.tensor([*range(count + 1), *[count] * case.pad], dtype=torch.int32),
        torch.tensor([*(n - 1 for n in lengths), *pad], dtype=torch.int32),
        torch.zeros(count + case.pad, dtype=torch.int32),
        torch.cat([table, torch.full((case.pad, table.shape[1]), -1)]).int(),
    )
    out, tiles = torch.zeros_like(q), cascade.Tiles(*map(torch.from_numpy, host))
    more = {"page": case.page, "scale": case.head_dim**-0.5, "cap": case.cap, "sinks": sinks}
    cascade.attention(q, store, out, rows, tiles, shape, scales=scales, **more)
    if scales is None and case.dtype == torch.float32:
        again = torch.zeros_like(q)
        cascade.plain(q, store, again, rows, tiles, shape, **more)
        assert (out - again).abs().max() < 4e-6, "the plain form gives something else"
    return out


def right(found: dict[str, Any]) -> bool:
    """Whether a measured case is as it should be; NaN is not."""
    return found["error"] <= ALLOWED[CASES[found["case"]].dtype] and found["padding"] == 0


def plant(module: str, name: str, old: str, new: str, folder: Path) -> None:
    """Load a kernel's module with one fault. Triton reads the source of a file, so there must be one."""
    text = (ROOT / "kernels_cuda" / f"{module}.py").read_text()
    assert text.count(old) == 1, f"{name}: stands {text.count(old)} times"
    file = folder / f"{module}.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"kernels_cuda.{module}", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[f"kernels_cuda.{module}"] = made
    spec.loader.exec_module(made)
    if module == "cascade":
        globals()["cascade"] = made


def main() -> None:
    """All cases; then for each fault whether its case notices."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    from kernels_cuda import tree

    sound = {"cascade": cascade, "tree": tree}
    for name in CASES:
        print(json.dumps(measure(name)), flush=True)
    for module, fault, case, old, new in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            plant(module, fault, old, new, Path(folder))
            noticed = not _survives(case)
        sys.modules[f"kernels_cuda.{module}"] = sound[module]
        globals()["cascade"] = sound["cascade"]
        print(json.dumps({"fault": fault, "noticed": noticed}), flush=True)


def _survives(name: str) -> bool:
    try:
        return right(measure(name))
    except (AssertionError, IndexError, RuntimeError):  # a fault may read what is not there
        return False


if __name__ == "__main__":
    main()
