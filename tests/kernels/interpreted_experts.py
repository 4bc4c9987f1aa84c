"""Experts of kernels_cuda, interpreted: run as a program, since Triton must be told so before it is imported. Prints a
line of JSON for each case, then for each planted fault."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from engine.model.quant import BY, dequantise, quantise
from engine.model.spec import Experts
from models_torch import moe, ops
from models_torch.quantised import Quantised

ROOT = Path(__file__).parents[2]
ALPHA, LIMIT = 1.702, 1.5
MODULES = ("route", "grouped_matmul", "grouped_row")


class Case(NamedTuple):
    """tokens, each through `top` of `count` experts. kind: of 8 bits, "" of float32. clamped: and with biases. all_of:
    the first expert takes every token, and the last none."""

    tokens: int
    count: int
    top: int
    hidden: int
    size: int
    kind: str = ""
    clamped: bool = False
    all_of: bool = False


CASES = [
    Case(1, 5, 3, 40, 24),
    Case(1, 3, 2, 136, 24, "fp8", clamped=True),
    Case(1, 4, 4, 48, 16, "int8"),
    Case(1, 3, 1, 32, 16, "fp8-row", clamped=True),
    Case(2, 20, 8, 48, 32),
    Case(5, 5, 2, 144, 80, "", clamped=True),
    Case(3, 4, 2, 144, 136, "fp8"),
    Case(20, 6, 3, 160, 64, "int8", all_of=True),
    Case(33, 4, 2, 64, 32, "fp8-row", clamped=True),
    Case(70, 4, 2, 96, 40, "", all_of=True),
    Case(130, 2, 1, 40, 136, "fp8"),
    Case(150, 2, 1, 32, 16, all_of=True),
]
ALLOWED = 1e-5
"""Of the largest number of a token."""
FAULTS = {
    "shares of all where they are of the chosen": ("route", "if RENORMALISED else total", "if True else total", 0),
    "the largest again": ("route", "free & (e != at)", "free", 0),
    "choices of an expert lie over each other": ("route", "order + done + rank - 1", "order + start + rank * 0", 7),
    "an expert begins where the one before does": ("route", "(who < expert)", "(who < expert - 1)", 8),
    "a tile too few": ("route", "(start + size) // R + expert + 1", "(start + size) // R + expert", 6),
    "a row of a whole tile is lost": ("route", "start + size - begin, 0), R)", "start + size - begin, 0), R - 1)", 9),
    "another token's row": ("grouped_matmul", "other=0) // TOP", "other=0) // TOP * 0", 6),
    "biases of the first expert": ("grouped_matmul", "gate_bias + e * columns + n", "gate_bias + n", 5),
    "not clamped from below": ("grouped_matmul", "tl.maximum(up, -limit,", "tl.maximum(up, -1000 * limit,", 5),
    "scales of the first expert": ("grouped_matmul", "(e * down + first // 128)", "(first // 128)", 6),
    "one scale for all blocks of a line": ("grouped_matmul", "* across + begin // 128)", "* across)", 6),
    "scales of the first expert's rows": ("grouped_matmul", "(scale + e * columns + n", "(scale + n", 8),
    "the share of another choice": ("grouped_matmul", "tl.load(share + choice,", "tl.load(share + begin + m,", 5),
    "a choice is not added": ("grouped_matmul", "tl.static_range(TOP)", "tl.static_range(TOP - 1)", 5),
    "one token: the first expert": ("grouped_row", "tl.load(chosen + choice)", "tl.load(chosen)", 0),
    "one token: a block's scale too far": ("grouped_row", "across + k // 128", "across + k // 256", 1),
    "one token: not shared": ("grouped_row", "tl.sum(acc, 1) * by", "tl.sum(acc, 1)", 0),
}  # fmt: skip
"""Module, text, what it becomes, and which case must notice."""


def matrices(r: np.random.Generator, shape: tuple[int, ...], case: Case) -> tuple[Any, torch.Tensor]:
    """What a kernel takes, without biases, and the numbers that it stands for."""
    module = importlib.import_module("kernels_cuda.grouped_matmul")
    values = r.standard_normal(shape, np.float32) * 10.0 ** r.integers(-1, 1, (*shape[:2], 1)) / shape[2] ** 0.5
    values = values.astype(np.float32)
    if not case.kind:
        return module.Matrices(torch.from_numpy(values)), torch.from_numpy(values).double()
    made = [quantise(one, case.kind) for one in values]
    body, scale = (
        torch.from_numpy(np.stack(each)) for each in ([q.view(np.uint8) for q, _ in made], [s for _, s in made])
    )
    dtype = torch.int8 if case.kind == "int8" else torch.float8_e4m3fn
    stands = torch.from_numpy(np.stack([dequantise(*m, case.kind) for m in made])).double()
    return module.Matrices(body.view(dtype), scale, BY[case.kind]), stands


def expected(x: torch.Tensor, scores: torch.Tensor, wide: list[Any], biases: list[Any], case: Case, own: bool) -> Any:
    """Token by token, in float64."""
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        best = sorted(range(case.count), key=lambda e: (-float(scores[t, e]), e))[: case.top]
        share = scores[t].exp()
        share = share / (share[best].sum() if own else share.sum())
        for e in best:
            gate, up = (w[e] @ row + (0 if b is None else b[e]) for w, b in zip(wide, biases, strict=False))
            if case.clamped:
                gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
                h = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
            else:
                h = gate * torch.sigmoid(gate) * up
            out[t] += share[e] * (wide[2][e] @ h)
    return out


def measure(case: Case) -> float:
    """The largest difference from float64, of the largest number of its token."""
    route = importlib.import_module("kernels_cuda.route")
    grouped: Any = importlib.import_module("kernels_cuda.grouped_matmul")
    blocks = grouped.Blocks(columns=64, inner=128, warps=1, stages=1, group=2)
    grouped.choose = lambda *_: blocks  # larger than those of a chip's float32: an interpreter pays for each
    products = importlib.import_module(f"kernels_cuda.grouped_{'row' if case.tokens == 1 else 'matmul'}")
    r = np.random.default_rng()
    x = torch.from_numpy(r.standard_normal((case.tokens, case.hidden), np.float32))
    scores = torch.from_numpy(r.standard_normal((case.tokens, case.count), np.float32))
    scores[:, case.count // 2] = scores[:, 0]  # of equal ones the lowest number
    if case.all_of:
        scores[:, 0], scores[:, -1] = 9, -9
    shapes = [(case.size, case.hidden), (case.size, case.hidden), (case.hidden, case.size)]
    made, wide = zip(*(matrices(r, (case.count, *shape), case) for shape in shapes), strict=True)
    biases = [torch.from_numpy(r.standard_normal((case.count, case.size), np.float32)) for _ in range(2)]
    given = biases if case.clamped else [None, None]
    gate, up = (w._replace(bias=b) for w, b in zip(made, given, strict=False))
    own = case.count % 2 == 0
    share, chosen = route.route(scores, case.top, own)
    plan = route.sort(chosen, case.count)
    h = products.gated(x, gate, up, plan, (ALPHA, LIMIT) if case.clamped else None)
    got = products.summed(h, made[2], share, plan).double()
    want = expected(x.double(), scores.double(), list(wide), [b if b is None else b.double() for b in given], case, own)
    off = ((got - want).abs().amax(-1) / want.abs().amax(-1)).max().item()
    return off if off == off else float("inf")


def dispatched(kind: str) -> float:
    """The model's experts by kernels beside the model's experts one by one, of 9 tokens and of one."""

    e = Experts(count=5, top_k=2, size=16, renormalised=True, act="clamped", bias=True)
    shapes = {"gate": (5, 16, 24), "up": (5, 16, 24), "down": (5, 24, 16), "router": (5, 24), "router_bias": (5,)}
    shapes |= {"gate_bias": (5, 16), "up_bias": (5, 16), "down_bias": (5, 24)}
    p: dict[str, Any] = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name in ("gate", "up", "down") if kind else ():
        made, _ = matrices(np.random.default_rng(), shapes[name], Case(9, 5, 2, 24, 16, kind))
        p[name] = Quantised(shape=shapes[name], body=made.body, scale=made.scale, by=made.by)
    worst, tools = 0.0, cast(Any, ops)
    plain = ops.kernel
    for tokens in (9, 1):
        x = torch.randn(tokens, 24)
        want, chosen = moe.moe(e, p, x)
        tools.kernel = lambda name, _: importlib.import_module(f"kernels_cuda.{name}") if name in MODULES else None
        got, same = moe.moe(e, p, x)
        tools.kernel = plain
        assert torch.equal(chosen, same)
        worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
    return worst


def plant(name: str, folder: Path) -> None:
    """Load the modules anew, one with a fault. Triton reads the source of a file, so there must be one."""
    module, old, new, _ = FAULTS[name]
    text = (ROOT / "kernels_cuda" / f"{module}.py").read_text()
    assert old in text, name
    file = folder / f"{module}.py"
    file.write_text(text.replace(old, new))
    for each in MODULES:
        sys.modules.pop(f"kernels_cuda.{each}", None)
    spec = importlib.util.spec_from_file_location(f"kernels_cuda.{module}", file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def main() -> None:
    """All cases; then for each fault the error of the case that must notice."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for case in CASES:
        print(json.dumps({"case": case, "error": measure(case)}), flush=True)
    for kind in ("", "int8", "fp8"):
        print(json.dumps({"model": kind, "error": dispatched(kind)}), flush=True)
    cast(Any, torch).empty = torch.zeros  # what a fault leaves unwritten is no address
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            plant(fault, Path(folder))
            print(json.dumps({"fault": fault, "error": measure(CASES[FAULTS[fault][3]])}), flush=True)


if __name__ == "__main__":
    main()
