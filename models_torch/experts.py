"""Rows to experts and back, for torch. models_jax/experts.py has the same names and the same meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from models_torch import ops
from models_torch.ops import Array, Matrix
from models_torch.quantised import Quantised

TILE = 8
"""Tokens of a step in deterministic mode, where a product has one shape: of so many tokens an expert multiplies so many
rows, whoever chose it."""


class Order(NamedTuple):
    """The T * k choices of T tokens, sorted by expert. token int64[T*k]: whose choice a row is; back int64[T, k]: the
    row of each choice; spans: (expert, its first row, one past its last) of those that were chosen."""

    token: Array
    back: Array
    spans: list[tuple[int, int, int]]


def route(scores: Array, top_k: int, renormalised: bool) -> tuple[Array, Array]:
    """scores [T, E] -> shares [T, k] of the softmax, of the chosen alone where renormalised, and int64[T, k] chosen."""
    high = scores.float()
    top, chosen = high.topk(top_k, dim=-1)
    total = torch.logsumexp(top if renormalised else high, dim=-1, keepdim=True)
    return (top - total).exp().to(scores.dtype), chosen


def sort(chosen: Array, count: int) -> Order:
    """Sort the choices int64[T, k] of `count` experts. The host waits for the router: it starts a product an
    expert."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    sizes, spans, start = torch.bincount(flat, minlength=count).tolist(), [], 0
    for e, size in enumerate(sizes):
        if size:
            spans.append((e, start, start + size))
        start += size
    return Order(order // chosen.shape[1], order.argsort().view(chosen.shape), spans)


def spread(x: Array, order: Order) -> Array:
    """x [T, hidden] -> a row for each choice, [T*k, hidden]."""
    return x.index_select(0, order.token)


def multiply(rows: Array, w: Array | Quantised | Sequence[Matrix], bias: Array | None, order: Order) -> Array:
    """rows [T*k, in], w [E, out, in] or E matrices -> [T*k, out]: each row by the matrix of its expert."""

    def one(e: int, part: Array) -> Array:
        count, whole = len(part), part
        if len(order.back) == TILE:
            whole = F.pad(part, (0, 0, 0, TILE - count))
        return ops.linear(whole, w[e], None if bias is None else bias[e])[:count]

    return torch.cat([one(e, rows[a:b]) for e, a, b in order.spans])


def collect(y: Array, share: Array, order: Order) -> Array:
    """y [T*k, hidden] -> [T, hidden]: the sum of each token's choices, by their shares."""
    return (y[order.back] * share[:, :, None]).sum(1)


def mix(bias: Array, share: Array, chosen: Array) -> Array:
    """bias [E, hidden] -> [T, hidden]: the chosen experts' biases, by their shares."""
    return (bias[chosen] * share[:, :, None]).sum(1)
