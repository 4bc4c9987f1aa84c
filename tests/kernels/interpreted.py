"""Random ragged steps through kernels_cuda.attention, interpreted: run as a program, since Triton must be told so
before it is imported. Prints a line of JSON for each case, then for each planted fault whether it is noticed.

bfloat16 is missing: the interpreter multiplies its bits as integers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kernels_cuda.attention import FLOAT8, Plan, Rows, attention, fresh, plan

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Rows as (tokens fed, positions before them, position of the table's first entry), in ascending order of tokens.

    sms: of the device that is planned for, many = keys are cut into more parts. pad: rows and tokens beside the real.
    """

    rows: tuple[tuple[int, int, int], ...]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page: int = 4
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    store: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    sms: int = 1
    pad: tuple[int, int] = (0, 0)


CASES = {
    "decode, page boundaries": Case(rows=((1, 0, 0), (1, 3, 0), (1, 4, 0), (1, 63, 0), (1, 64, 0))),
    "decode in parts": Case(rows=((1, 300, 0), (1, 5, 0), (1, 520, 0)), sms=8, page=16, head_dim=16),
    "decode, padded": Case(rows=((1, 9, 0), (1, 33, 0)), pad=(2, 3)),
    "verify rows": Case(rows=((1, 30, 0), (3, 7, 0), (5, 61, 0)), cap=4.0),
    "verify in parts, sinks": Case(rows=((1, 30, 0), (4, 290, 0)), sms=8, sinks=True, page=8),
    "all kinds of rows": Case(rows=((1, 12, 0), (2, 4, 0), (17, 0, 0), (40, 31, 0)), sinks=True),
    "long rows, padded": Case(rows=((17, 30, 0), (33, 0, 0)), q_heads=6, pad=(2, 5)),
    "long rows in parts": Case(rows=((20, 250, 0),), sms=64, q_heads=2, kv_heads=1),
    "window": Case(rows=((1, 40, 0), (3, 9, 0), (20, 25, 0)), window=7, sinks=True),
    "window and base": Case(rows=((1, 40, 32), (3, 30, 20), (20, 25, 16)), window=9, cap=5.0),
    "window in parts": Case(rows=((1, 700, 300),), window=400, sms=16),
    "head 80, group 3": Case(rows=((1, 18, 0), (18, 3, 0)), q_heads=3, kv_heads=1, head_dim=80),
    "head 96, no group": Case(rows=((2, 18, 0),), q_heads=2, head_dim=96, page=1),
    "head 256": Case(rows=((1, 18, 0), (17, 3, 0)), q_heads=2, kv_heads=1, head_dim=256),
    "float16": Case(rows=((1, 40, 0),), dtype=torch.float16, store=torch.float16),
    "int8": Case(rows=((1, 40, 0), (17, 20, 0)), store=torch.int8),
    "float8": Case(rows=((1, 40, 0), (17, 20, 0)), store=FLOAT8, sms=8),
}
ALLOWED = {"torch.float32": 4e-6, "torch.float16": 2e-3, "torch.bfloat16": 2e-2}
"""Largest difference from float64, whose values are about 1."""
FAULTS = {
    "a query sees the next key": (
        "verify rows",
        "entry[None, :] <= position[:, None]",
        "entry[None, :] <= position[:, None] + 1",
    ),
    "a window is one longer": ("window", "position[:, None] - WINDOW)", "position[:, None] - WINDOW - 1)"),
    "blocks begin too late": ("window", "length + before - WINDOW + 1, 0)", "length + before - WINDOW + STEP, 0)"),
    "values of the next head": (
        "decode, page boundaries",
        "at += KV_HEADS * DIM",
        "at += KV_HEADS * DIM + (KV_HEADS - 1) * DIM",
    ),
    "tokens of a page": ("decode, page boundaries", "i // PAGE, i % PAGE", "i // PAGE, i % 2"),
    "sinks in every part": (
        "verify in parts, sinks",
        "peak = tl.where(split == 0, sink, peak)\n                total = tl.where(split == 0, 1.0, total)",
        "peak, total = sink, total + 1.0",
    ),
    "parts overlap": (
        "decode in parts",
        "end = tl.minimum(end, low_key + each)",
        "end = tl.minimum(end, low_key + each + 1)",
    ),
    "sums are not faded": ("decode, page boundaries", "v, acc * fade[:, None]", "v, acc"),
    "the scale of keys for values": ("int8", "tl.load(scales + KV_HEADS + head)", "tl.load(scales + head)"),
    "whole blocks reach too far": (
        "long rows, padded",
        "tl.minimum(length + before + 1, end)",
        "tl.minimum(length + count, end)",
    ),
    "tiles of the row before": ("all kinds of rows", "+ middle - skip <= tile", "+ middle - skip < tile"),
    "a query of the next row": ("all kinds of rows", "(query < count) &", "(query < count + (r < rows - 1)) &"),
    "base is forgotten": (
        "window and base",
        "length = tl.load(start + r) - bottom",
        "length = tl.load(start + r) - bottom * 0",
    ),
    "bits of float8": ("float8", ".to(tl.float32) * 256.0", ".to(tl.float32) * 128.0"),
}
"""Name -> the case that notices, what stands in kernels_cuda/paged.py and what is put there."""


class Step(NamedTuple):
    """A case made of random numbers, and what a plain reference says. pages: of each row."""

    q: torch.Tensor
    store: torch.Tensor
    rows: Rows
    plan: Plan
    sinks: torch.Tensor | None
    scales: torch.Tensor | None
    want: torch.Tensor


def make(case: Case, seed: int) -> Step:
    """Entries that no row may see hold NaN, or the largest number; so does page 0, to which tables point past ends."""
    g = torch.Generator().manual_seed(seed)
    width = max(-(-(n + before - base) // case.page) for n, before, base in case.rows)
    pages = 1 + torch.randperm(len(case.rows) * width, generator=g).view(-1, width)
    dims = (2, case.kv_heads, case.head_dim)
    worst = float("nan") if case.store.is_floating_point else 127
    store = torch.full(((len(case.rows) * width + 1) * case.page + 1, *dims), worst).to(case.store)
    scales = None
    if case.store.itemsize == 1:
        scales = torch.rand((2, case.kv_heads), generator=g) + 0.5
        scales *= 1 / 64 if case.store == torch.int8 else 1
    q = torch.randn((sum(n for n, _, _ in case.rows) + case.pad[1], case.q_heads, case.head_dim), generator=g)
    q = (2 * q).to(case.dtype)
    sinks = torch.randn(case.q_heads, generator=g).to(case.dtype) if case.sinks else None
    want, token, scale = torch.zeros(q.shape, dtype=torch.float64), 0, case.head_dim**-0.5
    for (n, before, base), own in zip(case.rows, pages, strict=True):
        entry = torch.tensor([own[i // case.page] * case.page + i % case.page for i in range(n + before - base)])
        noise = torch.randn((len(entry), *dims), generator=g)
        store[entry] = (
            (noise * 64).round().clamp(-127, 127).to(torch.int8) if case.store == torch.int8 else noise.to(case.store)
        )
        kv = store[entry].double() * (1 if scales is None else scales.double()[None, :, :, None])
        k, v = (x.repeat_interleave(case.q_heads // case.kv_heads, 1) for x in (kv[:, 0], kv[:, 1]))
        s = torch.einsum("qhd,khd->hqk", q[token : token + n].double(), k) * scale
        s = s if case.cap is None else torch.tanh(s / case.cap) * case.cap
        at, key = torch.arange(before, before + n)[:, None], torch.arange(base, before + n)
        seen = (key <= at) & (key > at - (case.window or 1 << 30))
        s = s.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.double()[:, None, None].expand(-1, n, 1)], -1)
        want[token : token + n] = torch.einsum("hqk,khd->qhd", s.softmax(-1)[..., : len(entry)], v)
        token += n
    for own, (n, before, base) in zip(pages, case.rows, strict=True):
        own[-(-(n + before - base) // case.page) :] = 0  # whose entries nobody may see
    pages = torch.cat([pages, torch.zeros((len(pages), 64), dtype=pages.dtype)], 1)
    return Step(q, store, *_tell(case, pages, token), sinks, scales, want)


def _tell(case: Case, pages: torch.Tensor, tokens: int) -> tuple[Rows, Plan]:
    more = case.pad[0]
    lens, before, base = (list(x) for x in zip(*case.rows, strict=True))
    first = torch.tensor([0, *lens, *[0] * more]).cumsum(0)
    number = lambda x: torch.tensor([*x, *[0] * more], dtype=torch.int32)  # noqa: E731
    pages = torch.cat([pages, torch.full((more, pages.shape[1]), 0)])
    reach = max(n + b - s for n, b, s in case.rows)
    made = plan(lens, reach, sms=case.sms, rows=len(lens) + more, tokens=tokens + case.pad[1])
    return Rows(first.int(), number(before), number(base), pages.int()), made


def measure(name: str, seed: int = 0, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Largest difference from the reference, and how much stands where no row has a token. dtype: another one."""
    case = CASES[name]
    if dtype is not None:
        case = replace(case, dtype=dtype, store=case.store if case.store.itemsize == 1 else dtype)
    step = make(case, seed)
    send = lambda x: None if x is None else x.to(device)  # noqa: E731
    got = attention(
        step.q.to(device),
        step.store.to(device),
        Rows(*map(send, step.rows)),
        step.plan,
        page=case.page,
        scale=case.head_dim**-0.5,
        window=case.window,
        cap=case.cap,
        sinks=send(step.sinks),
        scales=send(step.scales),
    ).cpu()
    real = len(got) - case.pad[1]
    worst = (got[:real].double() - step.want[:real]).abs().max().item()
    padding = got[real:].abs().sum().item()
    return {"case": name, "dtype": str(case.dtype), "seed": seed, "error": worst, "padding": padding}


def right(found: dict[str, Any]) -> bool:
    """Whether a measured case is as it should be; NaN is not."""
    return found["error"] <= ALLOWED[found["dtype"]] and found["padding"] == 0


def plant(name: str, folder: Path) -> None:
    """Load kernels_cuda.paged with one fault. Triton reads the source of a file, so there must be one."""
    _, old, new = FAULTS[name]
    text = (ROOT / "kernels_cuda" / "paged.py").read_text()
    assert text.count(old) == 1, f"{name}: stands {text.count(old)} times"
    file = folder / "paged.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("kernels_cuda.paged", file)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["kernels_cuda.paged"] = module
    spec.loader.exec_module(module)


class Replayed:
    """A recorder without a device: a piece is played by calling it."""

    taken = 0

    def __call__(self, piece: Callable[[], object]) -> Callable[[], object]:
        return piece


def run(name: str) -> dict[str, Any]:
    """Whether the torch backend makes the same tokens with these kernels as without: chunks, decode, a window."""
    from backends import open_backend
    from backends.api.build import Host
    from backends.api.conformance.bench import SPEC, Ask, Weights, config, generate, prompt
    from backends.torch import attend

    given = config("torch", max_tokens=32, **BACKENDS[name])
    spec = SPEC
    if given.deterministic:  # over a window it gathers pages, and is not captured
        layers = tuple(replace(layer, mixer=replace(layer.mixer, window=None)) for layer in SPEC.layers)
        spec, given = replace(SPEC, layers=layers), replace(given, pages=given.pages[:1])
    asks = [Ask(prompt=prompt(n, seed=n), make=3, chunk=20) for n in (10 if given.deterministic else 30, 1)]
    made, plain = [], attend.choose
    for kernel in (lambda a, c: ("triton", ""), plain):
        attend.choose = kernel
        backend = open_backend("torch", spec, given)
        backend.load(Weights())
        if given.deterministic and not made:  # as it is captured
            backend.inner.capture(Replayed())  # type: ignore[attr-defined]
        made.append([m.tokens for m in generate(Host(backend), asks)])
        backend.close()
    return {"backend": name, "same": made[0] == made[1]}


def prompts() -> dict[str, Any]:
    """Fresh prompts over their own keys: largest difference from torch's, and whether a neighbour's NaN stays there."""
    lens, dim = (20, 37, 70), 64
    q, kv = torch.randn(sum(lens), 4, dim).half(), torch.randn(sum(lens), 2, 2, dim).half()
    first = torch.tensor([0, *lens]).cumsum(0).int()
    rows, made = Rows(first, first, first, first), plan(lens, max(lens), sms=1, fresh=True)
    got = fresh(q, kv, rows, made, scale=dim**-0.5)
    want = []
    for at in zip(first.tolist(), first.tolist()[1:], strict=False):
        own = (x[slice(*at)].float().transpose(0, 1) for x in (q, kv[:, 0], kv[:, 1]))
        want.append(torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True))
    worst = (got.float() - torch.cat(want, 1).transpose(0, 1)).abs().max().item()
    kv[lens[0] :] = float("nan")
    clean = torch.equal(fresh(q, kv, rows, made, scale=dim**-0.5)[: lens[0]], got[: lens[0]])
    return {"case": "fresh prompts", "error": worst, "clean": clean}


BACKENDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp8": {"cache_dtype": "fp8"},
    "deterministic": {"deterministic": True},
}
"""Settings of the backend that is run."""


def main(seed: int) -> None:
    """All cases, then the backend, then all faults."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for name in CASES:
        print(json.dumps(measure(name, seed)), flush=True)
    print(json.dumps(prompts()), flush=True)
    for backend in BACKENDS:
        print(json.dumps(run(backend)), flush=True)
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            plant(fault, Path(folder))
            print(json.dumps({"fault": fault, "noticed": not _survives(FAULTS[fault][0], seed)}), flush=True)


def _survives(name: str, seed: int) -> bool:
    try:
        return right(measure(name, seed))
    except Exception:  # noqa: BLE001 a fault may read what is not there
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]))
