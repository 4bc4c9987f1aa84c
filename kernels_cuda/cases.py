"""Kernels as they are compiled, without a device: each with the types of its arguments, its constants and options.

A model's layers, in a step of many rows and in a prompt, give the cases of `radixmesh compile --target cuda:sm_90`; a
small list of odd shapes gives those of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels_cuda import cascade
from kernels_cuda.attention import EIGHT, FLOAT8, WHOLE, Plan, constants, hopper, supports, whole

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", FLOAT8: "fp8e4nv"}
"""Types of elements, as Triton names them."""
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
"""What everything is compiled for."""
FRESH = Plan(rows=1, tokens=WHOLE, short=0, few=1, reach=WHOLE, sms=1, fresh=True)
"""A step of one prompt."""


@dataclass(frozen=True)
class Case:
    """One compiled kernel. module, function: where it stands, in kernels_cuda; types: of each argument, "constexpr"
    left out; constants: the rest; options: warps and stages."""

    name: str
    module: str
    function: str
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(hash=False)
    options: Mapping[str, int] = field(hash=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for cases that are one compiled kernel."""
        return (self.function, *map(tuple, (self.types.items(), self.constants.items(), self.options.items())))


@dataclass(frozen=True)
class Layer:
    """Attention as a kind of layer needs it, on one device. page: tokens of a page of its cache."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page: int
    window: int | None = None
    capped: bool = False
    sinks: bool = False

    @property
    def plain(self) -> bool:
        """Without window, cap or sinks."""
        return not (self.window or self.capped or self.sinks)

    def __str__(self) -> str:
        more = [f"window {self.window}"] * bool(self.window) + ["cap"] * self.capped + ["sinks"] * self.sinks
        return f"{self.q_heads}/{self.kv_heads} heads of {self.head_dim}" + "".join(f", {m}" for m in more)


def attention(
    layer: Layer,
    dtype: torch.dtype,
    store: torch.dtype,
    arch: str,
    few: tuple[int, ...],
    parts: tuple[int, ...],
    narrow: bool = True,
) -> Iterator[Case]:
    """The kernels of a layer: short rows of `few` tokens (0: tiles of long rows), each in so many parts."""
    if supports(layer.head_dim, layer.q_heads // layer.kv_heads, dtype, store, arch):
        return
    element = NAMES[dtype]
    held = "u8" if store == FLOAT8 else NAMES[store]
    for tokens in few:
        for cut in parts:
            fixed, shape = constants(
                arch=arch,
                q_heads=layer.q_heads,
                kv_heads=layer.kv_heads,
                head_dim=layer.head_dim,
                dtype=dtype,
                store=store,
                page=layer.page,
                window=layer.window,
                capped=layer.capped,
                sinks=layer.sinks,
                parts=cut,
                few=tokens,
                narrow=narrow,
            )
            sums = "*fp32" if cut > 1 else f"*{element}"
            types = {"q": f"*{element}", "store": f"*{held}", "out": f"*{element}", "part": sums, "stat": sums}
            types |= dict.fromkeys(("first", "start", "base", "table"), "*i32")
            types |= {"sinks": f"*{element}", "scales": "*fp32" if store in EIGHT else f"*{element}"}
            types |= dict.fromkeys(("rows", "width", "skip"), "i32") | dict.fromkeys(("scale", "cap"), "fp32")
            what = f"rows of {tokens}" if tokens else "tiles"
            name = f"attention {layer}, {element} over {NAMES[store]}, {what}, {cut} parts"
            yield Case(name, "paged", "paged", types, fixed, {"num_warps": shape.warps, "num_stages": shape.stages})
    group = layer.q_heads // layer.kv_heads
    if 0 in few and hopper(arch, layer.head_dim, group, dtype, store, layer.page, plain=layer.plain):
        yield _hopper(layer, element)
    elif 0 in few and whole(FRESH, arch, layer.head_dim, dtype, store, plain=layer.plain):
        descriptor = f"tensordesc<{element}[64, 1, {layer.head_dim}]>"
        types = {"q": f"*{element}", "keys": descriptor, "values": descriptor, "out": f"*{element}"}
        types |= {"first": "*i32", "rows": "i32", "scale": "fp32"}
        given = {"Q_HEADS": layer.q_heads, "KV_HEADS": layer.kv_heads, "DIM": layer.head_dim, "ROWS": 64, "STEP": 64}
        yield Case(
            f"attention {layer}, {element}, fresh prompts", "dense", "dense", types, given,
            {"num_warps": 4, "num_stages": 3},
        )  # fmt: skip
    for cut in parts:
        if cut > 1:
            types = {
                "part": "*fp32",
                "stat": "*fp32",
                "out": f"*{element}",
                "first": "*i32",
                "low": "i32",
                "high": "i32",
            }
            given = {"Q_HEADS": layer.q_heads, "DIM": layer.head_dim, "WIDE": fixed["WIDE"], "SPLITS": cut}
            yield Case(f"merge of {cut} parts, {layer}, {element}", "merge", "merge", types, given, {"num_warps": 4})


def _hopper(layer: Layer, element: str) -> Case:
    """Long rows of a layer on sm_90."""
    from kernels_cuda.hopper import CHUNK, FIXED, LINES

    types = {"q": f"*{element}", "entries": f"tensordesc<{element}[{layer.page}, {CHUNK.value}],{LINES!r}>"}
    types |= {"out": f"*{element}"} | dict.fromkeys(("first", "start", "base", "table"), "*i32")
    types |= dict.fromkeys(("rows", "width", "skip", "tiles"), "i32") | {"scale": "fp32"}
    given = {"Q_HEADS": layer.q_heads, "KV_HEADS": layer.kv_heads, "DIM": layer.head_dim, "PAGE": layer.page}
    return Case(
        f"attention {layer}, {element}, prompts over pages", "hopper", "prefill", types, given | FIXED, {"num_warps": 4}
    )


def branches(layer: Layer, dtype: torch.dtype, store: torch.dtype, arch: str) -> Iterator[Case]:
    """The kernels of rows that read the same pages."""
    group = layer.q_heads // layer.kv_heads
    if cascade.refuses(head_dim=layer.head_dim, group=group, dtype=dtype, store=store, arch=arch, window=layer.window):
        return
    fixed, tuned = cascade.constants(
        arch=arch,
        q_heads=layer.q_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        dtype=dtype,
        store=store,
        page=layer.page,
        capped=layer.capped,
        narrow=True,
    )
    element, numbers = NAMES[dtype], ("first", "start", "covered", "used")
    held = "u8" if store == FLOAT8 else NAMES[store]
    sums = {"sums": "*fp32", "stats": "*fp32"} | dict.fromkeys(numbers, "*i32") | {"slots": "i32", "parts": "i32"}
    types = {"q": f"*{element}", "store": f"*{held}", "table": "*i32", "tiles": "*i32"} | sums
    types |= {"scales": "*fp32" if store in EIGHT else f"*{element}", "count": "i32", "width": "i32"}
    types |= {"scale": "fp32", "cap": "fp32"}
    what = f"{layer}, {element} over {NAMES[store]}"
    options = {"num_warps": tuned.warps, "num_stages": tuned.stages}
    yield Case(f"tree {what}", "tree", "tree", types, fixed, options)
    given = {name: fixed[name] for name in ("Q_HEADS", "DIM", "WIDE", "STEP")} | {"SINKS": layer.sinks}
    types = sums | {"out": f"*{element}", "sinks": f"*{element}"}
    yield Case(f"join {layer}, {element}", "tree", "join", types, given, {"num_warps": 1})
