"""The edge of top-k and of top-p: the smallest distance from a row's largest logit within which lies enough of it.

A distance is a float32 >= 0, whose bits are ordered as it is. Programs share a row: twice they add up roughly what lies
within a few distances, which leaves a hundredth of its range. Of that they add up exactly what lies before it, and keep
what lies inside, among which one program finds the edge. Whoever was misled, or has too much to keep, looks through the
whole row instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLIT = 4096
"""Entries of a row that one program looks at."""
WAYS = (8, 16)
"""Distances of the first and of the second look."""
SECTION = 256
"""Distances that a program may keep."""
RUN: tl.constexpr = tl.constexpr(128)
"""Entries side by side that a program looks at; the next are another's, so that all find much alike."""
INF: tl.constexpr = tl.constexpr(0x7F800000)
"""Bits of float32 infinity."""
SLACK: tl.constexpr = tl.constexpr(2.0**-17)
"""More than float32 sums are off by, of themselves."""
SPAN: tl.constexpr = tl.constexpr(32.0)
"""Logits, or values where a temperature is above 1, farther than which the first look makes no difference."""

LOOSE = ("temperatures", "wanted")
"""What must not make another compiled kernel by where it happens to lie."""


def edges(
    logits: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
) -> torch.Tensor:
    """The farthest distances (bits, int32[R]) that top-k and then top-p keep of logits [R, V]; infinity: all.

    high float32[R]: the largest of each row; low float32[R, ...]: the lowest finite ones of parts of it. The rest as
    kernels_cuda.sample.Filters has it.
    """
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, SPLIT)
    fresh = lambda kind, *shape: torch.empty(shape, dtype=kind, device=logits.device)  # noqa: E731
    edge = torch.full((rows,), INF.value, dtype=torch.int32, device=logits.device)
    spans = fresh(torch.int32, 2, rows, 2)
    first, second = (fresh(torch.float32, rows, parts, ways) for ways in WAYS)
    sums, counts = fresh(torch.float64, 3, rows, parts), fresh(torch.int32, rows, parts)
    held = fresh(torch.int32, rows, parts, SECTION)
    row = (logits, logits.stride(0), high)
    sizes = {"vocab": vocab, "parts": parts, "PARTS": triton.next_power_of_2(parts), "SPLIT": SPLIT}
    looks = {"lows": low.shape[1], "LOWS": triton.next_power_of_2(low.shape[1]), "FIRST": WAYS[0], "SECOND": WAYS[1]}
    for count, want in ((True, top_k), (False, top_p)):
        if want is None:
            continue
        asked, sizes["COUNT"] = (temperature, want, edge, spans), count
        for fine, shares in ((False, first), (True, second)):
            _look[(rows, parts)](*row, low, *asked, first, shares, rows, **sizes, **looks, FINE=fine, num_warps=8)
        _keep[(rows, parts)](
            *row, *asked, second, sums, counts, held, rows, **sizes, SECOND=WAYS[1], SECTION=SECTION, num_warps=8
        )
        _settle[(rows,)](*row, *asked, sums, counts, held, rows, **sizes, SECTION=SECTION, num_warps=8)
    return edge


@triton.jit
def scaled(logits, stride, row, token, peak, temperature, vocab: tl.constexpr):
    """Values of a row: distances to its largest, over the temperature; -inf past the vocabulary."""
    x = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x - peak, tl.zeros_like(x) + temperature)


@triton.jit
def bits(value):
    """Bits of the distance of a value <= 0."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _tokens(part, parts: tl.constexpr, SPLIT: tl.constexpr):
    """The entries of a part."""
    i = tl.arange(0, SPLIT)
    return (i // RUN * parts + part) * RUN + i % RUN


@triton.jit
def _on(temperature, want, vocab: tl.constexpr, COUNT: tl.constexpr):
    """Whether a row that draws has the filter."""
    return (temperature > 0) & (want < (vocab if COUNT else 1))


@triton.jit
def _reach(i, near, far, WAYS: tl.constexpr):
    """Bits of the i-th of WAYS distances: evenly from near to far, then infinity."""
    a = tl.maximum(near, 0).to(tl.float32, bitcast=True)
    b = far.to(tl.float32, bitcast=True)
    even = (a + (b - a) * ((i + 1).to(tl.float32) / (WAYS - 1))).to(tl.int32, bitcast=True)
    return tl.where(i < WAYS - 2, tl.minimum(even, far), tl.where(i == WAYS - 2, far, INF))


@triton.jit
def _span(
    shares, want, near, far, parts: tl.constexpr, PARTS: tl.constexpr, WAYS: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Between which two of the distances that were looked at the edge lies, by the shares of a row's parts."""
    part, way = tl.arange(0, PARTS)[:, None], tl.arange(0, WAYS)[None, :]
    share = tl.sum(tl.load(shares + part * WAYS + way, mask=part < parts, other=0.0), 0)
    need = want.to(tl.float32)
    slack = 0.0
    if not COUNT:
        need = need * tl.max(share, 0)
        slack = SLACK
    below = tl.minimum(tl.sum((share < need * (1 - slack)).to(tl.int32), 0), WAYS - 1)
    above = tl.minimum(tl.sum((share < need * (1 + slack)).to(tl.int32), 0), WAYS - 1)
    start = tl.where(below > 0, _reach(below - 1, near, far, WAYS), near)
    return start, _reach(above, near, far, WAYS)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=LOOSE)
def _look(
    logits, stride, high, low, temperatures, wanted, edges, spans, first, shares, rows,
    vocab: tl.constexpr, parts: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, COUNT: tl.constexpr,
    lows: tl.constexpr, LOWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """What of a part of a row lies within a few distances: over all of its range, or, FINE, between two of those."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, want = tl.load(temperatures + row).to(tl.float32), tl.load(wanted + row)
    if _on(temperature, want, vocab, COUNT):
        peak = tl.load(high + row)
        i = tl.arange(0, LOWS)
        lowest = tl.min(tl.load(low + row * lows + i, mask=i < lows, other=float("inf")), 0)
        reach = tl.minimum(peak - lowest, tl.maximum(temperature, 1.0) * SPAN)
        near = tl.full((), -1, tl.int32)
        far = bits(tl.div_rn(reach, temperature)) + 8
        if FINE:
            near, far = _span(first + row * parts * FIRST, want, near, far, parts, PARTS, FIRST, COUNT)
            if part == 0:
                tl.store(spans + row * 2, near)
                tl.store(spans + row * 2 + 1, far)
        token = _tokens(part, parts, SPLIT)
        x = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        value = (x - peak) * (1.0 / temperature)  # not rounded as it should be, which may only mislead
        distance = bits(value)
        if COUNT:
            mass = tl.where(token < vocab, 1.0, 0.0)
        else:
            mass = tl.where(distance <= tl.load(edges + row), tl.exp(value), 0.0)
        WAYS: tl.constexpr = SECOND if FINE else FIRST
        to = shares + (row * parts + part) * WAYS
        for way in tl.static_range(WAYS):
            within = _reach(tl.full((), way, tl.int32), near, far, WAYS)
            tl.store(to + way, tl.sum(tl.where(distance <= within, mass, 0.0), 0))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=LOOSE)
def _keep(
    logits, stride, high, temperatures, wanted, edges, spans, shares, sums, counts, held, rows,
    vocab: tl.constexpr, parts: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, COUNT: tl.constexpr,
    SECOND: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """Of a part of a row what lies before the span that is left, within it too, and, of mass, in all, exactly; and the
    distances inside of it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, want = tl.load(temperatures + row).to(tl.float32), tl.load(wanted + row)
    if _on(temperature, want, vocab, COUNT):
        near, far = tl.load(spans + row * 2), tl.load(spans + row * 2 + 1)
        near, far = _span(shares + row * parts * SECOND, want, near, far, parts, PARTS, SECOND, COUNT)
        if part == 0:
            tl.store(spans + (rows + row) * 2, near)
            tl.store(spans + (rows + row) * 2 + 1, far)
        token = _tokens(part, parts, SPLIT)
        value = scaled(logits, stride, row, token, tl.load(high + row), temperature, vocab)
        distance = bits(value)
        there = token < vocab
        if not COUNT:
            there = there & (distance <= tl.load(edges + row))
        inside = (there & (distance > near) & (distance <= far)).to(tl.int32)
        found = tl.sum(inside, 0)
        here, whole = row * parts + part, rows * parts
        tl.store(counts + here, found)
        if COUNT:
            before = tl.sum((there & (distance <= near)).to(tl.int32), 0)
            tl.store(sums + here, before.to(tl.float64))
            tl.store(sums + whole + here, (before + found).to(tl.float64))
        else:
            mass = tl.where(there, tl.exp(value.to(tl.float64)), 0.0)
            tl.store(sums + here, tl.sum(tl.where(distance <= near, mass, 0.0), 0))
            tl.store(sums + whole + here, tl.sum(tl.where(distance <= far, mass, 0.0), 0))
            tl.store(sums + 2 * whole + here, tl.sum(mass, 0))
        if found > 0:
            place = tl.cumsum(inside, 0) - 1
            tl.store(held + here * SECTION + place, distance, mask=(inside > 0) & (place < SECTION))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=LOOSE)
def _settle(
    logits, stride, high, temperatures, wanted, edges, spans, sums, counts, held, rows,
    vocab: tl.constexpr, parts: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, COUNT: tl.constexpr,
    SECTION: tl.constexpr,
):  # fmt: skip
    """The edge of a row, not beyond the one that it has."""
    row = tl.program_id(0).to(tl.int64)
    temperature, want = tl.load(temperatures + row).to(tl.float32), tl.load(wanted + row)
    if _on(temperature, want, vocab, COUNT):
        edge = tl.load(edges + row)
        part = tl.arange(0, PARTS)
        inside = part < parts
        here, whole = row * parts + part, rows * parts
        before = tl.sum(tl.load(sums + here, mask=inside, other=0.0), 0)
        within = tl.sum(tl.load(sums + whole + here, mask=inside, other=0.0), 0)
        need = want.to(tl.float64)
        if not COUNT:
            need = need * tl.sum(tl.load(sums + 2 * whole + here, mask=inside, other=0.0), 0)
        most = tl.max(tl.load(counts + here, mask=inside, other=0), 0)
        near, far = tl.load(spans + (rows + row) * 2), tl.load(spans + (rows + row) * 2 + 1)
        known = (before < need) & (need <= within) & ((most <= SECTION) | (far - near <= 1))
        if known:
            edge = tl.minimum(_among(counts, held, row, near, far, before, need, parts, PARTS, SECTION, COUNT), edge)
        else:
            peak = tl.load(high + row)
            edge = _through(logits, stride, row, peak, temperature, edge, need, vocab, SPLIT, COUNT)
        tl.store(edges + row, edge)


@triton.jit
def _among(
    counts, held, row, near, far, before, need,
    parts: tl.constexpr, PARTS: tl.constexpr, SECTION: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The edge between near and far, by the distances that were kept, halving."""
    i = tl.arange(0, PARTS * SECTION)
    part, place = i // SECTION, i % SECTION
    count = tl.load(counts + row * parts + part, mask=part < parts, other=0)
    there = place < tl.minimum(count, SECTION)
    distance = tl.load(held + row * parts * SECTION + i, mask=there, other=INF)
    if COUNT:
        mass = there.to(tl.float64)
    else:
        mass = tl.exp(-distance.to(tl.float32, bitcast=True).to(tl.float64))
    while far - near > 1:
        middle = near + (far - near) // 2
        enough = before + tl.sum(tl.where(distance <= middle, mass, 0.0), 0) >= need
        near, far = tl.where(enough, near, middle), tl.where(enough, middle, far)
    return far


@triton.jit
def _through(
    logits, stride, row, peak, temperature, within, need, vocab: tl.constexpr, SPLIT: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """The edge by all of a row, of which what is `within` counts, halving."""
    near, far = tl.full((), -1, tl.int32), tl.full((), INF, tl.int32)
    column = tl.arange(0, SPLIT)
    while far - near > 1:
        middle = near + (far - near) // 2
        total = tl.zeros((SPLIT,), tl.float64)
        for i in range(0, vocab, SPLIT):
            value = scaled(logits, stride, row, i + column, peak, temperature, vocab)
            distance = bits(value)
            if COUNT:
                mass = tl.where(i + column < vocab, 1.0, 0.0).to(tl.float64)
            else:
                mass = tl.where(distance <= within, tl.exp(value.to(tl.float64)), 0.0)
            total += tl.where(distance <= middle, mass, 0.0)
        enough = tl.sum(total, 0) >= need
        near, far = tl.where(enough, near, middle), tl.where(enough, middle, far)
    return tl.minimum(far, within)
