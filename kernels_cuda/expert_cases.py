"""The kernels of experts, as they are compiled without a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels_cuda.cases import NAMES, Case

BITS = ("sm_80", "gfx942")
"""Without float8_e4m3fn in hardware."""


def experts(
    *,
    hidden: int,
    size: int,
    count: int,
    top_k: int,
    dtype: torch.dtype,
    arch: str,
    kind: str = "none",
    clamped: bool = False,
) -> Iterator[Case]:
    """Those of one device, with its activations in `dtype`. size: of its part of an expert. kind: of 8 bits."""
    from kernels_cuda import grouped_matmul, grouped_row, route

    x, up = f"*{NAMES[dtype]}", lambda n: 1 << max(n - 1, 0).bit_length()
    what = f"{count} experts, {NAMES[dtype]}" + (f", {kind}" if kind != "none" else "")
    types: dict[str, str] = {"scores": x, "share": x, "chosen": "*i32"}
    constants: dict[str, Any] = {"EXPERTS": count, "E": up(count), "TOP": top_k, "K": up(top_k), "RENORMALISED": True}
    yield Case(f"route {what}", "route", "_route", types, constants, {"num_warps": 1 if count <= 256 else 4})
    types = {"chosen": "*i32", "order": "*i32", "tiles": "*i32", "count": "i32", "slots": "i32"}
    for _, chunk, warps in route.CHUNKS:
        constants = {"R": 16, "CHUNK": chunk, "TILES": route.TILES}
        yield Case(f"sort {what}", "route", "_sort", types, constants, {"num_warps": warps})

    held, scales = (x, x) if kind == "none" else ("*u8", "*fp32")
    how = {"none": "plain", "int8": "int8"}.get(kind, "bits" if arch in BITS else "native")
    scaled = {"KIND": how, "SCALED": "" if kind == "none" else "block" if kind == "fp8" else "row"}
    common: dict[str, str] = {"order": "*i32", "tiles": "*i32", "slots": "i32", "out": x, "chosen": "*i32"}
    two = common | {"x": x, "gate": held, "up": held, "gate_scale": scales, "up_scale": scales}
    two |= {"gate_bias": x, "up_bias": x, "alpha": "fp32", "limit": "fp32"}
    one = common | {"h": x, "w": held, "scale": scales, "share": x, "choices": "i32"}
    shapes = {"_gate_up": (two, size, hidden), "_down": (one, hidden, size)}
    more = {"BIASED": clamped, "CLAMPED": clamped}
    for function, (types, columns, inner) in shapes.items():
        for rows in grouped_matmul.GATED:
            b = grouped_matmul.choose(rows, function == "_gate_up", dtype, arch)
            constants = scaled | {"columns": columns, "inner": inner, "EVEN": inner % b.inner == 0, "R": rows}
            constants |= {"C": b.columns, "I": b.inner, "GROUP": b.group, "WIDE": grouped_matmul.NAMES[dtype]}
            constants |= more | {"TOP": top_k} if function == "_gate_up" else {}
            options = {"num_warps": b.warps, "num_stages": b.stages}
            yield Case(f"{function[1:]} {what}, tiles of {rows}", "grouped_matmul", function, types, constants, options)
    sizes = {"columns": hidden, "TOP": top_k, "BLOCK": grouped_matmul.BLOCK}
    yield Case(f"sum {what}", "grouped_matmul", "_sum", {"each": x, "out": x}, sizes, {"num_warps": 4})

    some, step = grouped_row.shape(hidden)
    constants = scaled | more | {"columns": size, "inner": hidden, "C": some, "I": step}
    yield Case(f"row_gated {what}", "grouped_row", "_row_gated", two, constants, {"num_warps": 4})
    constants = scaled | {"columns": hidden, "inner": size, "TOP": top_k, "K": up(top_k)}
    constants |= {"I": grouped_row.step(size, top_k)}
    yield Case(f"row_summed {what}", "grouped_row", "_row_summed", one, constants, {"num_warps": 4})
