"""Experts on the GPU that is here: a layer of Qwen3-30B-A3B, beside torch's own grouped product and a loop of products.

Times as in kernels_gpu: of CUDA graphs of many calls, medians of repeats; each call has tokens and matrices of its own.
Rates are of what the two products need: the matrices of the experts that were chosen, once, and what goes in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.model.quant import BY, MOST, SIDE
from kernels_cuda import grouped_matmul, grouped_row, route
from kernels_cuda.grouped_matmul import Matrices
from radixmesh.bench.kernels_gpu import DTYPE, timed

COUNT, TOP, HIDDEN, SIZE = 128, 8, 2048, 768
TOKENS = (1, 2, 8, 32, 64, 256, 512, 2048, 8192)
KINDS = ("bfloat16", "int8", "fp8")
LAYERS = 4
"""Whose matrices are read in turn, 1.2 GB each in bfloat16."""


def measure(only: str, ceiling: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record a case, whose name holds `only`. ceiling: "copy_gbs" and "matrix_tflops"."""
    for kind in KINDS:
        names = {tokens: f"experts {tokens}, {kind}" for tokens in TOKENS}
        if not any(only in name for name in names.values()):
            continue
        layers = [_matrices(kind) for _ in range(LAYERS)]
        for tokens, name in names.items():
            if only in name:
                yield {"case": name} | _layer(tokens, layers, ceiling)


def _matrices(kind: str) -> list[Matrices]:
    """gate, up and down of a layer, of random numbers; of 8 bits random ones of those."""
    out, native = [], torch.cuda.get_device_capability() >= (8, 9)
    for shape in ((COUNT, SIZE, HIDDEN), (COUNT, SIZE, HIDDEN), (COUNT, HIDDEN, SIZE)):
        w = torch.randn(shape, device="cuda", dtype=DTYPE)
        if kind == "bfloat16":
            out.append(Matrices(w * shape[2] ** -0.5))
            continue
        body = (40 * w).clamp_(-MOST[kind], MOST[kind]).to(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
        scales = (COUNT, 1, shape[1]) if BY[kind] == "row" else (COUNT, -(-shape[1] // SIDE), -(-shape[2] // SIDE))
        out.append(Matrices(body, torch.rand(scales, device="cuda") / 1000, BY[kind], None, native))
    return out


def _layer(tokens: int, layers: list[list[Matrices]], ceiling: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of each part; share of the copy's speed and of the matrix rate that the two products have."""
    calls = 16 if tokens <= 64 else LAYERS
    of = [layers[i % LAYERS] for i in range(calls)]
    x = [torch.randn((tokens, HIDDEN), device="cuda", dtype=DTYPE) for _ in range(calls)]
    scores = [torch.randn((tokens, COUNT), device="cuda", dtype=DTYPE) for _ in range(calls)]
    routed = [route.route(s, TOP, True) for s in scores]
    plans = [route.sort(chosen, COUNT) for _, chosen in routed]
    kernel = grouped_row if tokens == 1 else grouped_matmul
    h = [kernel.gated(x[i], of[i][0], of[i][1], plans[i]) for i in range(calls)]

    def whole(i: int) -> torch.Tensor:
        share, chosen = route.route(scores[i], TOP, True)
        plan = route.sort(chosen, COUNT)
        return kernel.summed(kernel.gated(x[i], of[i][0], of[i][1], plan), of[i][2], share, plan)

    parts: dict[str, Callable[[int], Any]] = {
        "route": lambda i: route.route(scores[i], TOP, True),
        "sort": lambda i: route.sort(routed[i][1], COUNT),
        "gated": lambda i: kernel.gated(x[i], of[i][0], of[i][1], plans[i]),
        "summed": lambda i: kernel.summed(h[i], of[i][2], routed[i][0], plans[i]),
        "whole": whole,
    }
    if tokens == 1:
        del parts["sort"]  # nothing to sort
    out: dict[str, Any] = {f"{name}_us": round(1e3 * timed(call, calls), 2) for name, call in parts.items()}
    if of[0][0].scale is None and tokens > 1:
        for name, call in _peers(x, h, of, [chosen for _, chosen in routed], plans).items():
            out |= _beside(name, call, calls)
    used = sum(chosen.unique().numel() for _, chosen in routed) / calls
    ms = (out["gated_us"] + out["summed_us"]) / 1e3
    bytes_ = used * sum(w.body[0].nbytes for w in of[0]) + 2 * tokens * (2 * HIDDEN + TOP * 2 * SIZE)
    flops = 6 * tokens * TOP * SIZE * HIDDEN
    out |= {"experts": round(used, 1), "of_copy": round(bytes_ / ms / 1e6 / ceiling["copy_gbs"], 3)}
    return out | {"of_matrix": round(flops / ms / 1e9 / ceiling["matrix_tflops"], 3)}


def _beside(name: str, call: Callable[[int], Any], count: int) -> dict[str, Any]:
    """Microseconds of another's product, or why there are none."""
    try:
        return {f"{name}_us": round(1e3 * timed(call, count), 2)}
    except Exception as error:  # noqa: BLE001 a peer that fails must not stop the table
        return {f"{name}_error": " ".join(str(error).split())[-200:]}


def _peers(x: Any, h: Any, of: Any, chosen: Any, plans: Any) -> dict[str, Callable[[int], Any]]:
    """The three products alone, of rows that are sorted already: torch's grouped one, and the library's one by one,
    where a graph knows which experts were chosen."""
    sizes = [torch.bincount(c.flatten(), minlength=COUNT) for c in chosen]
    ends = [s.cumsum(0).int() for s in sizes]
    rows = [x[i][plan.order.long() // TOP] for i, plan in enumerate(plans)]
    cut = [s.tolist() for s in sizes]

    def three(i: int, product: Callable[[Any, Any, int], Any]) -> None:
        for a, w in ((rows[i], of[i][0]), (rows[i], of[i][1]), (h[i], of[i][2])):
            product(a, w.body, i)

    def one_by_one(a: torch.Tensor, body: torch.Tensor, i: int) -> None:
        for e, part in enumerate(a.split(cut[i])):
            if len(part):
                torch.mm(part, body[e].t())

    return {
        "torch": lambda i: three(i, lambda a, body, i: torch._grouped_mm(a, body.mT, ends[i])),
        "loop": lambda i: three(i, one_by_one),
    }
