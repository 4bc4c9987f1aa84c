"""The kernels of a step beside attention, as they are compiled without a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels_cuda.attention import EIGHT, FLOAT8
from kernels_cuda.cases import NAMES, Case


def step(
    *,
    hidden: int,
    ffn: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dim: int,
    vocab: int,
    dtype: torch.dtype,
    store: torch.dtype,
) -> Iterator[Case]:
    """Those of a model, with its activations in `dtype` and its cache in `store`. dim: rotated dimensions of a head."""
    from kernels_cuda import begin, gated, norm, rope_write, row

    x, whole, up = f"*{NAMES[dtype]}", "*i64", lambda n: 1 << max(n - 1, 0).bit_length()

    types = dict.fromkeys(("x", "y", "w", "total", "out"), x) | {"rows": "i32", "x_stride": "i32", "y_stride": "i32"}
    some = max(1, norm.TILE // up(hidden))
    constants = {"heads": 1, "size": hidden, "BLOCK": up(hidden), "SOME": some, "KIND": 0, "ADD": True}
    yield Case(f"norm {hidden}", "norm", "_norm", types | {"eps": "fp32"}, constants, {"num_warps": 8})

    types = {"gate": x, "up": x, "out": x, "gate_stride": "i32", "up_stride": "i32"}
    constants = {"size": ffn, "GELU": False, "BLOCK": gated.BLOCK}
    yield Case(f"gated {ffn}", "gated", "_gated", types, constants, {"num_warps": 4})

    held = "*u8" if store == FLOAT8 else f"*{NAMES[store]}"
    types = dict.fromkeys(("q", "k", "v", "cos", "sin", "out"), x) | {"write": "*i64", "store": held}
    types["inverses"] = "*fp32" if store in EIGHT else x
    types |= {"q_stride": "i32", "k_stride": "i32", "v_stride": "i32"}
    constants = {"q_heads": q_heads, "kv_heads": kv_heads, "size": head_dim, "half": dim // 2, "HALF": up(dim // 2)}
    constants |= {"REST": up(max(head_dim - dim, 1)), "SIZE": up(head_dim), "HEADS": rope_write.HEADS}
    constants |= {"GROUPS": -(-q_heads // rope_write.HEADS), "KIND": rope_write.KINDS.get(store, 0)}
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
    yield Case("places", "begin", "_look", types, constants, {"num_warps": 4})

    for act in (0, 1):
        some, chunk, warps = row.shape(ffn, hidden, dtype.itemsize, bool(act))
        types = {"x": x, "w": x, "scale": x, "out": x, "w_stride": "i32", "width": "i32", "many": "i32"}
        constants = {"inner": hidden, "SOME": some, "CHUNK": chunk, "LANE": 16 // dtype.itemsize, "KIND": "wide"}
        constants |= {"BLOCKED": False, "ACT": act}
        what = f"row {ffn} x {hidden}{', gated' * act}"
        yield Case(what, "row", "_row_times", types, constants, {"num_warps": warps, "num_stages": 1})

    yield from _sampler(vocab)


def _sampler(vocab: int) -> Iterator[Case]:
    """Those that choose tokens, of logits in float32."""
    from kernels_cuda import cut, sample

    numbers, real, whole, some = "*fp32", "*fp64", "*i64", "*i32"
    up = lambda n: 1 << max(n - 1, 0).bit_length()  # noqa: E731
    parts, row = -(-vocab // sample.SPLIT), {"logits": numbers, "stride": "i32"}
    sizes = {"vocab": vocab, "parts": parts}
    wide = {"SPLIT": sample.SPLIT, "BLOCK": sample.BLOCK}
    types = row | {"peak": numbers, "low": numbers, "place": some, "sound": some}
    for low in (False, True):
        yield Case("largest", "sample", "_largest", types, sizes | wide | {"LOW": low}, {"num_warps": 8})
    for first, more in ((True, some), (False, real)):
        joined = {"peak": numbers, "place": some, "more": more, "high": numbers, "out": whole, "rows": "i32"}
        yield Case("join", "sample", "_join", joined, sizes | {"PARTS": up(parts), "FIRST": first}, {"num_warps": 1})
    types = row | {"peak": numbers, "place": some, "high": numbers, "edges": some, "temperatures": real}
    types |= {"min_p": real, "seed": whole, "position": whole}
    yield Case("noisy", "sample", "_noisy", types, sizes | wide, {"num_warps": 8})

    lows, parts = parts, -(-vocab // cut.SPLIT)
    first, second = cut.WAYS
    sizes = {"vocab": vocab, "parts": parts, "PARTS": up(parts), "SPLIT": cut.SPLIT}
    looks = sizes | {"lows": lows, "LOWS": up(lows), "FIRST": first, "SECOND": second}
    kept = sizes | {"SECTION": cut.SECTION}
    for count, want in ((True, whole), (False, real)):
        given = row | {
            "high": numbers,
            "temperatures": real,
            "wanted": want,
            "edges": some,
            "spans": some,
            "rows": "i32",
        }
        told, how = {"sums": real, "counts": some, "held": some}, {"COUNT": count}
        for fine in (False, True):
            types = given | {"low": numbers, "first": numbers, "shares": numbers}
            yield Case("look", "cut", "_look", types, looks | how | {"FINE": fine}, {"num_warps": 8})
        types = given | told | {"shares": numbers}
        yield Case("keep", "cut", "_keep", types, kept | how | {"SECOND": second}, {"num_warps": 8})
        yield Case("settle", "cut", "_settle", given | told, kept | how, {"num_warps": 8})
