"""A decoder layer of 8B by torch.compile beside our kernels, in one run: python -m radixmesh.bench.compiled OUT.json

Attention itself is left out of both, where it would be the same kernel: q goes on as it is. Weights of several layers
are read in turn, so that none is in the GPU's own cache.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from kernels_cuda.gated import gated
from kernels_cuda.norm import add_norm
from kernels_cuda.rope_write import rope_write
from kernels_cuda.row import row_times
from radixmesh.bench.kernels_gpu import DTYPE, timed
from radixmesh.bench.record import write

ROWS, LAYERS = (1, 256, 8192), 4
HIDDEN, FFN, Q_HEADS, KV_HEADS, HEAD, EPS = 4096, 14336, 32, 8, 128, 1e-5
Weights = dict[str, torch.Tensor]


def weights() -> Weights:
    """Random, of a layer."""
    qkv = (Q_HEADS + 2 * KV_HEADS) * HEAD
    shapes = {"qkv": (qkv, HIDDEN), "out": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN)}
    made = {name: torch.randn(s, device="cuda", dtype=DTYPE) * s[1] ** -0.5 for name, s in shapes.items()}
    return made | {name: torch.ones(HIDDEN, device="cuda", dtype=DTYPE) for name in ("norm", "mlp_norm")}


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """RMSNorm."""
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * w


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotated, in halves."""
    return x * cos + x.roll(HEAD // 2, -1) * sin


def plain(x: torch.Tensor, w: Weights, cos: torch.Tensor, sin: torch.Tensor, store: torch.Tensor) -> torch.Tensor:
    """The layer as one would write it for a compiler."""
    sizes = [Q_HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    q, k, v = (y.unflatten(1, (-1, HEAD)) for y in F.linear(norm(x, w["norm"]), w["qkv"]).split(sizes, 1))
    store[: len(x)] = torch.stack((turned(k, cos, sin), v), 1)
    x = x + F.linear(turned(q, cos, sin).flatten(1), w["out"])
    gate, up = F.linear(norm(x, w["mlp_norm"]), w["gate_up"]).chunk(2, 1)
    return x + F.linear(F.silu(gate) * up, w["down"])


def ours(
    x: torch.Tensor, w: Weights, cos: torch.Tensor, sin: torch.Tensor, store: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """The same by the kernels of a step. at int64[T]: entries of the store."""
    sizes = [Q_HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    _, h = add_norm(x, None, w["norm"], EPS, "plain")
    q, k, v = (y.unflatten(1, (-1, HEAD)) for y in times(h, w["qkv"]).split(sizes, 1))
    q = rope_write(q, k, v, (cos, sin), at, store)
    x, h = add_norm(x, times(q.flatten(1), w["out"]), w["mlp_norm"], EPS, "plain")
    gate, up = times(h, w["gate_up"]).chunk(2, 1)
    return x + times(gated(gate, up, "silu"), w["down"])


def times(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [T, in] times w [out, in]."""
    return row_times(x, w) if len(x) == 1 else F.linear(x, w)


def measure(rows: int) -> dict[str, Any]:
    """Microseconds of a layer; seconds until torch.compile's first call is done; how far it is from ours."""
    x = torch.randn((rows, HIDDEN), device="cuda", dtype=DTYPE)
    angle = torch.rand((rows, 1, HEAD // 2), device="cuda") * 6.28
    cos = torch.cat([angle.cos()] * 2, -1).to(DTYPE)
    sin = torch.cat([-angle.sin(), angle.sin()], -1).to(DTYPE)
    store = torch.zeros((rows + 1, 2, KV_HEADS, HEAD), device="cuda", dtype=DTYPE)
    at = torch.arange(rows, device="cuda")
    layers = [weights() for _ in range(LAYERS)]
    out: dict[str, Any] = {"rows": rows}
    out["kernels_us"] = 1e3 * timed(lambda i: ours(x, layers[i], cos, sin, store, at), LAYERS)
    expected = ours(x, layers[0], cos, sin, store, at).float()
    out["eager_us"] = 1e3 * timed(lambda i: plain(x, layers[i], cos, sin, store), LAYERS)
    torch._dynamo.reset()
    made = torch.compile(plain, dynamic=False)
    began = time.perf_counter()
    found = made(x, layers[0], cos, sin, store)
    torch.cuda.synchronize()
    out["compile_s"] = time.perf_counter() - began
    out["compiled_us"] = 1e3 * timed(lambda i: made(x, layers[i], cos, sin, store), LAYERS)
    out["off"] = float((found.float() - expected).abs().max() / expected.abs().max())
    return out


if __name__ == "__main__":
    figures = []
    with torch.inference_mode():
        for count in ROWS:
            figures.append(measure(count))
            print(figures[-1], flush=True)
            write(Path(sys.argv[1]) if sys.argv[1:] else None, "compiled", figures)
