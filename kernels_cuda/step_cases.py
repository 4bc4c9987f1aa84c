"""The kernels of a step beside attention, as they are compiled without a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels_cuda.cases import NAMES, Case


def step(
    *, hidden: int, ffn: int, q_heads: int, kv_heads: int, head_dim: int, dim: int, vocab: int, dtype: torch.dtype
) -> Iterator[Case]:
    """Those of a model, with its activations in `dtype`. dim: rotated dimensions of a head."""
    from kernels_cuda import begin, gated, norm, rope_write, row, sample

    x, up = f"*{NAMES[dtype]}", lambda n: 1 << max(n - 1, 0).bit_length()
    numbers, real, whole = "*fp32", "*fp64", "*i64"

    types = dict.fromkeys(("x", "y", "w", "total", "out"), x) | {"rows": "i32", "x_stride": "i32", "y_stride": "i32"}
    some = max(1, norm.TILE // up(hidden))
    constants = {"heads": 1, "size": hidden, "BLOCK": up(hidden), "SOME": some, "KIND": 0, "ADD": True}
    yield Case(f"norm {hidden}", "norm", "_norm", types | {"eps": "fp32"}, constants, {"num_warps": 8})

    types = {"gate": x, "up": x, "out": x, "gate_stride": "i32", "up_stride": "i32"}
    constants = {"size": ffn, "GELU": False, "BLOCK": gated.BLOCK}
    yield Case(f"gated {ffn}", "gated", "_gated", types, constants, {"num_warps": 4})

    types = dict.fromkeys(("q", "k", "v", "cos", "sin", "store", "out"), x) | {"write": whole}
    types |= {"q_stride": "i32", "k_stride": "i32", "v_stride": "i32"}
    constants = {"q_heads": q_heads, "kv_heads": kv_heads, "size": head_dim, "half": dim // 2, "HALF": up(dim // 2)}
    constants |= {"REST": up(max(head_dim - dim, 1)), "SIZE": up(head_dim), "HEADS": rope_write.HEADS}
    constants |= {"GROUPS": -(-q_heads // rope_write.HEADS)}
    yield Case(f"rope_write {head_dim}", "rope_write", "_rope_write", types, constants, {"num_warps": 4})

    constants = {"half": dim // 2, "HALF": up(dim // 2)}
    types = {"frequencies": "*fp32", "positions": whole, "cos": x, "sin": x, "magnitude": "fp32"}
    yield Case(f"angles {dim}", "angles", "_angles", types, constants, {"num_warps": 1})

    names = ("slots", "starts", "lens", "length", "before", "after", "entry", "page", "table")
    types = dict.fromkeys(names, whole) | {"rows": "i32", "edits": "i32"}
    yield Case("seat", "begin", "_seat", types, {"FIRST": True}, {"num_warps": 8})
    names = (*begin.Step._fields, "last", "before", "table", "base", "positions", "ids", "write")
    types = dict.fromkeys(names, whole) | dict.fromkeys(("first32", "start32", "base32", "table32"), "*i32")
    types |= dict.fromkeys(("rows", "tokens_", "across"), "i32")
    constants = {"width": 512, "PAGE": 16, "FIRST": True}
    yield Case("look", "begin", "_look", types, constants, {"num_warps": 4})

    for act in (0, 1):
        some, chunk, warps = row.shape(ffn, hidden, dtype.itemsize, bool(act))
        types = {"x": x, "w": x, "scale": x, "out": x, "w_stride": "i32", "width": "i32", "many": "i32"}
        constants = {"inner": hidden, "SOME": some, "CHUNK": chunk, "LANE": 16 // dtype.itemsize, "KIND": "wide"}
        constants |= {"BLOCKED": False, "ACT": act}
        what = f"row {ffn} x {hidden}{', gated' * act}"
        yield Case(what, "row", "_row_times", types, constants, {"num_warps": warps, "num_stages": 1})

    parts = -(-vocab // sample.SPLIT)
    sizes = {"vocab": vocab, "parts": parts}
    wide = {"SPLIT": sample.SPLIT, "BLOCK": sample.BLOCK}
    types = {"logits": numbers, "stride": "i32", "peak": numbers, "place": "*i32"}
    yield Case("largest", "sample", "_largest", types | {"sound": "*i32"}, sizes | wide, {"num_warps": 8})
    for first, more in ((True, "*i32"), (False, real)):
        joined = {"peak": numbers, "place": "*i32", "more": more, "high": numbers, "out": whole, "rows": "i32"}
        yield Case("join", "sample", "_join", joined, sizes | {"PARTS": up(parts), "FIRST": first}, {"num_warps": 1})
    edges = {"logits": numbers, "stride": "i32", "high": numbers, "temperatures": real, "top_k": whole, "top_p": real}
    constants = {"vocab": vocab, "BLOCK": sample.BLOCK}
    yield Case("edges", "sample", "_edges", edges | {"edges": "*i32"}, constants, {"num_warps": 8})
    noisy = types | {"high": numbers, "edges": "*i32", "temperatures": real, "min_p": real, "seed": whole}
    yield Case("noisy", "sample", "_noisy", noisy | {"position": whole}, sizes | wide, {"num_warps": 8})
