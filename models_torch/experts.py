"""Rows to experts and back, for torch. models_jax/experts.py has the same names and the same meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from engine.model.spec import Experts
from models_torch import ops
from models_torch.ops import Array, Matrix
from models_torch.quantised import Quantised

TILE = 8
"""Tokens of a step in deterministic mode, where a product has one shape: of so many tokens an expert multiplies so many
rows, whoever chose it."""
Matrices: TypeAlias = torch.Tensor | Quantised | Sequence[Matrix]
"""w [E, out, in], or E matrices."""


class Order(NamedTuple):
    """The T * k choices of T tokens, sorted by expert. token int64[T*k]: whose choice a row is; back int64[T, k]: the
    row of each choice; spans: (expert, its first row, one past its last) of those that were chosen."""

    token: Array
    back: Array
    spans: list[tuple[int, int, int]]


def waits(e: Experts, device: torch.device) -> bool:
    """Whether the host waits for the router, to start a product an expert: on CPUs, and where no kernel is for it."""
    kernel = ops.kernel("route", device.type)
    return kernel is None or e.count > kernel.MOST


def route(scores: Array, top_k: int, renormalised: bool) -> tuple[Array, Array]:
    """scores [T, E] -> shares [T, k] of the softmax, of the chosen alone where renormalised, and int[T, k] chosen."""
    kernel = ops.kernel("route", scores.device.type)
    if kernel is not None and not kernel.supports(scores, top_k):
        return kernel.route(scores, top_k, renormalised)  # type: ignore[no-any-return]
    high = scores.float()
    top, chosen = high.topk(top_k, dim=-1)
    total = torch.logsumexp(top if renormalised else high, dim=-1, keepdim=True)
    return (top - total).exp().to(scores.dtype), chosen


def sort(chosen: Array, count: int) -> Any:
    """Sort the choices int[T, k] of `count` experts: an Order, for which the host waits, or the plan of kernels."""
    kernel = ops.kernel("route", chosen.device.type)
    if kernel is not None and count <= kernel.MOST:
        return kernel.sort(chosen, count)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    spans: list[tuple[int, int, int]] = []

    def ask() -> Array:
        start = 0
        spans.clear()
        for e, size in enumerate(torch.bincount(flat, minlength=count).tolist()):
            if size:
                spans.append((e, start, start + size))
            start += size
        return flat

    ops.outside(ask)
    return Order(order // chosen.shape[1], order.argsort().view(chosen.shape), spans)


def gated(e: Experts, p: Mapping[str, Any], x: Array, order: Any) -> Array:
    """x [T, hidden] -> act(gate(x)) * up(x) of each choice, by the matrices and biases of those names in p:
    [T*k, size]."""
    if not isinstance(order, Order):
        clamp = None if e.act == "silu" else (e.alpha, e.limit)
        gate, up = (_whole(p[name], p.get(f"{name}_bias")) for name in ("gate", "up"))
        return _kernel(order, x).gated(x, gate, up, order, clamp)  # type: ignore[no-any-return]
    rows = spread(x, order)
    one = multiply(rows, p["gate"], p.get("gate_bias"), order)
    two = multiply(rows, p["up"], p.get("up_bias"), order)
    return ops.silu(one) * two if e.act == "silu" else ops.clamped(one, two, e.alpha, e.limit)


def spread(x: Array, order: Order) -> Array:
    """x [T, hidden] -> a row for each choice, [T*k, hidden]."""
    return x.index_select(0, order.token)


def multiply(rows: Array, w: Matrices, bias: Array | None, order: Order) -> Array:
    """rows [T*k, in], w [E, out, in] -> [T*k, out]: each row by the matrix of its expert."""

    def one(e: int, part: Array) -> Array:
        count, whole = len(part), part
        if len(order.back) == TILE:
            whole = F.pad(part, (0, 0, 0, TILE - count))
        return ops.linear(whole, w[e], None if bias is None else bias[e])[:count]

    return ops.outside(lambda: torch.cat([one(e, rows[a:b]) for e, a, b in order.spans]))


def collect(h: Array, w: Matrices, share: Array, order: Any) -> Array:
    """h [T*k, size], w [E, hidden, size] -> [T, hidden]: the sum of what each token's choices make of h, by their
    shares."""
    if not isinstance(order, Order):
        return _kernel(order, h).summed(h, _whole(w, None), share, order)  # type: ignore[no-any-return]
    return (multiply(h, w, None, order)[order.back] * share[:, :, None]).sum(1)


def mix(bias: Array, share: Array, chosen: Array) -> Array:
    """bias [E, hidden] -> [T, hidden]: the chosen experts' biases, by their shares."""
    return (bias[chosen] * share[:, :, None]).sum(1)


def _kernel(plan: Any, x: Array) -> Any:
    """The module that multiplies by a plan."""
    return ops.kernel("grouped_row" if plan.order is None else "grouped_matmul", x.device.type)


def _whole(w: Any, bias: Array | None) -> Any:
    """Experts' matrices as kernels take them."""
    from kernels_cuda.grouped_matmul import Matrices as Given

    if isinstance(w, Quantised):
        return Given(w.body, w.scale, w.by, bias, w.how not in ("plain", "bits"))
    return Given(w, bias=bias)
