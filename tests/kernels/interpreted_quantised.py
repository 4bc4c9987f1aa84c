"""Quantised products of kernels_cuda, interpreted: run as a program, since Triton must be told so before it is
imported. Prints a line of JSON for each case, then for each planted fault the case that notices it.

The interpreter rounds float32 to bfloat16 towards zero.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.model.quant import BY, dequantise, quantise

ROOT = Path(__file__).parents[2]


class Case(NamedTuple):
    """x [rows, inner] times a matrix [columns, inner] of a kind. splits: 0 = as it is chosen."""

    how: str
    rows: int
    columns: int
    inner: int
    kind: str
    splits: int = 0


CASES = [
    Case("one", 1, 40, 272, "int8"),
    Case("one", 1, 136, 2448, "fp8"),
    Case("one", 1, 9, 2048, "fp8-row"),
    Case("gated", 1, 256, 272, "fp8"),
    Case("gated", 1, 256, 2448, "fp8-row"),
    Case("rows", 1, 40, 272, "fp8"),
    Case("rows", 3, 136, 272, "fp8"),
    Case("rows", 20, 70, 256, "fp8-row"),
    Case("rows", 70, 70, 144, "int8"),
    Case("rows", 5, 40, 656, "fp8", 3),
    Case("rows", 17, 70, 512, "int8", 2),
    Case("wide", 0, 136, 272, "fp8"),
    Case("wide", 0, 20, 2064, "int8"),
    Case("narrow", 3, 0, 200, "row"),
    Case("narrow", 17, 0, 256, "block"),
    Case("product", 130, 144, 272, "fp8"),
    Case("product", 9, 272, 160, "fp8-row"),
]
ALONE = ("one", "gated")
"""Cases of the kernel for one row."""
ALLOWED = {"one": 8e-3, "gated": 3e-2, "rows": 8e-3, "wide": 8e-3, "narrow": 0.15, "product": 8e-3}
"""Of the largest number: bfloat16 cut short; the interpreter is up to two steps off in float8_e4m3fn."""
FAULTS = {
    "a mantissa one bit off": ("quantised_matmul", "((bits & 0x7F) << 7)", "((bits & 0x7F) << 6)"),
    "the sign is lost": ("quantised_matmul", "((bits & 0x80) << 8) |", "0 |"),
    "the next block's scale, one row": ("row", "* LANE) // 128", "* LANE) // 256"),
    "the gate's scales for both halves": ("row", "scale, first + many, begin", "scale, first, begin"),
    "the gate's row scales for both halves": ("row", "scale, many + row, row", "scale, row, row"),
    "the first part of a row twice": ("row", "part = _load(at, begin + CHUNK", "part = _load(at, begin"),
    "the first block's scale": ("quantised_matmul", "width + at // 128)", "width)"),
    "the first row of blocks": ("quantised_matmul", "(first // 128) * width + at", "0 * width + at"),
    "rows are not scaled": ("quantised_matmul", "acc *= tl.load(scale + n", "acc *= 1 + 0 * tl.load(scale + n"),
    "a part of the sum is missing": ("quantised_matmul", "in range(splits)", "in range(splits - 1)"),
    "parts overlap": ("quantised_matmul", "range(split * share,", "range(0,"),
    "a copy without scales": ("quantised_matmul", "KIND) * by", "KIND)"),
    "the largest number alone, not its size": ("scaled_matmul", "tl.max(tl.abs(wide), 0)", "tl.max(wide, 0)"),
    "one scale for all parts": ("scaled_matmul", "scale + block * tall + row", "scale + block * 0 + row"),
    "a row has no scale": ("scaled_matmul", "acc *= tl.load(own + m, mask=there, other=0.0)[:, None]", "acc *= 1.0"),
    "blocks of one column": ("scaled_matmul", "width + start // 128)", "width)"),
}  # fmt: skip


def measure(case: Case) -> float:
    """The largest difference from float64, of the largest number."""
    wide = importlib.import_module("kernels_cuda.quantised_matmul")
    narrow = importlib.import_module("kernels_cuda.scaled_matmul")
    r = np.random.default_rng(7)
    x = torch.from_numpy(r.standard_normal((case.rows, case.inner), np.float32)).bfloat16()
    if case.how == "narrow":
        x = (x - 2).bfloat16()  # the largest is below zero
        body, scale = narrow.narrow(x, case.kind)
        body, scale = body[: case.rows], scale[: case.rows]
        each = scale if case.kind == "row" else scale.repeat_interleave(128, 1)
        return worst(body.double() * each.double(), x.double())
    values = r.standard_normal((case.columns, case.inner)) * 10.0 ** r.integers(-2, 1, (case.columns, 1))
    q, s = quantise(values.astype(np.float32), case.kind)
    dtype = torch.int8 if case.kind == "int8" else torch.float8_e4m3fn
    body, scale = torch.from_numpy(q.view(np.uint8).copy()).view(dtype), torch.from_numpy(s)
    stands = torch.from_numpy(dequantise(q, s, case.kind)).double()
    by = BY[case.kind]
    if case.how in ALONE:
        alone = importlib.import_module("kernels_cuda.row")
        given = {"scale": scale, "by": by, "act": "silu" if case.how == "gated" else ""}
        assert not alone.supports(x, body, scale, given["act"])
        want = x.double() @ stands.T
        if case.how == "gated":
            gate, up = want.chunk(2, 1)
            want = torch.nn.functional.silu(gate) * up
        return worst(alone.row_times(x, body, **given).double(), want)
    if case.how == "wide":
        return worst(wide.widened(body, scale, by).double(), stands)
    if case.how == "product":
        own, of = narrow.narrow(x, "row")
        return worst(narrow.product(own, of, body, scale, by).double(), own.double() * of.double() @ stands.T)
    blocks = wide.choose(case.rows, case.columns, case.inner, by)
    if case.splits:
        blocks = wide.Blocks(rows=16, columns=16, inner=128, warps=1, stages=2, splits=case.splits)
    return worst(wide.quantised_matmul(x, body, scale, by, blocks).double(), x.double() @ stands.T)


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """Line by line, as their sizes differ. NaN counts as much as it can."""
    off = ((got - want).abs().amax(-1) / want.abs().amax(-1)).max().item()
    return off if off == off else float("inf")


def plant(name: str, folder: Path) -> str:
    """Load a module with one fault; gives its name. Triton reads the source of a file, so there must be one."""
    module, old, new = FAULTS[name]
    text = (ROOT / "kernels_cuda" / f"{module}.py").read_text()
    assert old in text, name
    file = folder / f"{module}.py"
    file.write_text(text.replace(old, new))
    full = f"kernels_cuda.{module}"
    spec = importlib.util.spec_from_file_location(full, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[full] = made
    spec.loader.exec_module(made)
    return full


def main() -> None:
    """All cases; then for each fault the case that notices."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for case in CASES:
        print(json.dumps({"case": case, "error": measure(case)}), flush=True)
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            full = plant(fault, Path(folder))
            cases = [case for case in CASES if (case.how in ALONE) == (FAULTS[fault][0] == "row")]
            noticed: Any = next((case for case in cases if measure(case) > ALLOWED[case.how]), None)
            del sys.modules[full]
        print(json.dumps({"fault": fault, "noticed": noticed}), flush=True)


if __name__ == "__main__":
    main()
