"""Kernels that no step of the warm-up happens to need, compiled and loaded ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from backends.api.build import Host
from backends.api.protocol import Backend
from backends.torch.attend import choose
from backends.torch.branches import Layout
from backends.torch.buckets import MIXED
from backends.torch.caches import Caches
from engine.config import Resolved
from engine.mesh import share
from engine.model.groups import places
from engine.model.spec import Experts, ModelSpec
from kernels_cuda import attention as gpu
from kernels_cuda import cascade
from models_torch.experts import waits
from models_torch.moe import moe
from models_torch.ops import Joined

STRIDE = 256
"""Tokens between sizes of a step that may have other kernels."""
ROWS = (2, 17, 33, 65, 129, 193, 257)
"""The least numbers of rows that kernels of products (kernels_cuda.quantised_matmul, scaled_matmul) differ for."""


def steps(backend: Backend) -> None:
    """A large step, then small ones that are drawn, greedy, and of as many rows as some kernel is for: what is not
    captured is compiled and loaded, and reserves memory. Leaves slots seated."""
    host, limits = Host(backend), backend.limits
    room = min(p * g.page for p, g in zip(limits.pages, limits.groups, strict=True))
    most = min(limits.max_tokens, limits.max_len - 2, room - 2)
    drawn = {"temperature": 1.0, "top_k": 2, "top_p": 0.5, "min_p": 0.1}
    text = host.open()
    for tokens, how in (([0] * most, drawn), ([-1], drawn), ([-1], {})):
        host.run([(text, host.row(text, tokens, **how))])
    host.close(text)
    for tokens in (n for n in ROWS if n <= most):
        spare = min(p - -(-tokens // g.page) for p, g in zip(limits.pages, limits.groups, strict=True))
        rows = min(tokens, limits.max_rows, limits.slots, max(1, spare))
        texts = [host.open() for _ in range(rows)]
        host.run([(t, host.row(t, [0] * (1 if i else tokens - rows + 1))) for i, t in enumerate(texts)])
        for t in texts:
            host.close(t)


def attend(spec: ModelSpec, config: Resolved, caches: Caches, dtype: torch.dtype, layout: Layout | None = None) -> None:
    """Run each kind of layer over an empty cache, with one row short, of several tokens and long, in all numbers of
    parts that a plan may come to; and as rows that read pages together, where a layout says how. Writes nothing."""
    seen = set()
    for layer, place in zip(spec.layers, places(spec), strict=True):
        a, store = layer.mixer, caches.groups[place.group][place.rank]
        if a in seen or choose(a, config)[0] != "triton":
            continue
        seen.add(a)
        heads, kv_heads = share(a.q_heads, "q_heads", config.mesh), store.shape[2]
        q = torch.zeros((1, heads, a.head_dim), dtype=dtype, device=store.device)
        none = torch.zeros(1, dtype=torch.int32, device=store.device)
        first = torch.arange(2, dtype=torch.int32, device=store.device)
        rows = gpu.Rows(first, none, none, none[None])
        sinks = torch.zeros(heads, dtype=dtype, device=store.device) if a.sinks else None
        given = {"page": config.page, "scale": a.scale, "window": a.window, "cap": a.cap, "sinks": sinks}
        if store.dtype in gpu.EIGHT:
            given["scales"] = torch.ones((2, kv_heads), device=store.device)
        if layout is not None and a.window is None:
            tiles = cascade.Tiles(none.new_zeros((1, 5)), none, none)
            shape = cascade.Shape(tiles=1, rows=1, wide=1, slots=1, parts=1)
            plan = gpu.Plan(rows=1, tokens=1, short=1, few=1, reach=gpu.PART, sms=1)
            gpu.attention(q, store, rows, plan, **given, shared=(tiles, shape))
        for plan in plans(kv_heads):
            gpu.attention(q, store, rows, plan, **given)
        plain = a.window is None and a.cap is None and not a.sinks
        if gpu.hopper(
            gpu.arch_of(q.device), a.head_dim, heads // kv_heads, dtype, store.dtype, config.page, plain=plain
        ):
            many = gpu.Plan(rows=1, tokens=gpu.WHOLE, short=0, few=1, reach=gpu.PART, sms=1)
            gpu.attention(q, store, rows, many, **given)


def products(weights: Mapping[str, Any], tokens: int) -> None:
    """The matrix products of the first layer, over steps of every size from the largest captured one to `tokens`. A
    library loads a kernel when it first launches it, for which the host waits for the device, and takes others for
    other sizes."""
    layer = weights["layers"][0]
    for part in (layer["attention"], layer.get("mlp", {})):
        for name, w in part.items():
            body = w.body if isinstance(w, Joined) else w
            if not isinstance(body, torch.Tensor) or body.ndim < 2 or not body.is_floating_point():
                continue
            matrix = body.flatten(1) if name == "out" else body.flatten(0, -2)
            x = torch.zeros((tokens, matrix.shape[1]), dtype=matrix.dtype, device=matrix.device)
            for n in range(MIXED[-1] + STRIDE, tokens + 1, STRIDE):
                torch.nn.functional.linear(x[:n], matrix)


def plans(kv_heads: int) -> list[gpu.Plan]:
    """Of one row of one token, for every kernel that a plan may ask for."""
    out, parts = [], 1
    while parts <= gpu.PARTS:
        sms, reach = max(1, parts * kv_heads // gpu.WAVES), parts * gpu.PART
        out += [gpu.Plan(rows=1, tokens=1, short=1, few=few, reach=reach, sms=sms) for few in (1, gpu.FEW)]
        out.append(gpu.Plan(rows=1, tokens=1, short=0, few=1, reach=reach, sms=parts * kv_heads))
        parts *= 4
    return out


def experts(spec: ModelSpec, weights: Mapping[str, Any], most: int, dtype: torch.dtype, device: torch.device) -> None:
    """Send tokens through each kind of experts, as many as have tiles of every height that steps of up to `most` tokens
    come to."""
    seen = set()
    for layer, parts in zip(spec.layers, weights["layers"], strict=True):
        e = layer.feed
        if not isinstance(e, Experts) or e in seen or waits(e, device):
            continue
        seen.add(e)
        for tokens in heights(e, most):
            moe(e, parts["moe"], torch.zeros((tokens, spec.hidden), dtype=dtype, device=device))


def heights(e: Experts, most: int) -> Iterator[int]:
    """Numbers of tokens, up to `most`, that differ in the kernels that they are sorted and multiplied by."""
    from kernels_cuda import route

    seen = set()
    for tokens in range(1, most + 1):
        choices = tokens * e.top_k
        made = tokens == 1 or (route.height(choices, e.count), route.chunk(choices))
        if made not in seen:
            seen.add(made)
            yield tokens
