"""The Triton kernels that serving a model would run on a GPU, compiled for one that need not be here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backends.torch.caches import DTYPES as HELD
from backends.torch.params import DTYPES
from engine.config import Resolved
from engine.mesh import share
from engine.model.spec import Experts, ModelSpec
from kernels_cuda import build, cases
from kernels_cuda.attention import FEW, PART, splits, supports
from kernels_cuda.expert_cases import experts
from kernels_cuda.step_cases import step


def kernels(spec: ModelSpec, config: Resolved, arch: str) -> list[cases.Case]:
    """Of every kind of layer: rows of one token or a few and tiles of prompts, with the keys in every number of parts
    that a step may have, and rows that read the same pages; and what a step is beside attention. Each once. Attention
    that no kernel is for runs in plain torch."""
    dtype, store = DTYPES[config.dtype], HELD[config.cache_dtype]
    lengths = (PART << i for i in range(((config.max_len - 1) // PART).bit_length() + 1))
    parts = sorted({splits(1, length, 1 << 20) for length in lengths})  # of a device with no end of processors
    found = dict[Any, cases.Case]()
    for layer in kinds(spec, config):
        for case in cases.attention(layer, dtype, store, arch, (1, FEW, 0), tuple(parts)):
            found.setdefault(case.key, case)
        for case in cases.branches(layer, dtype, store, arch) if config.cascade != "off" else ():
            found.setdefault(case.key, case)
    for case in beside(spec, config, arch):
        found.setdefault(case.key, case)
    return list(found.values())


def beside(spec: ModelSpec, config: Resolved, arch: str) -> Iterator[cases.Case]:
    """The kernels of a step that are not attention, as one device of the mesh runs them."""
    shapes = {
        (a.q_heads, a.kv_heads, a.head_dim, a.head_dim if a.rope is None else a.rope.dim, feed.size)
        for a, feed in ((layer.mixer, layer.feed) for layer in spec.layers)
    }
    for e in dict.fromkeys(layer.feed for layer in spec.layers if isinstance(layer.feed, Experts)):
        yield from experts(
            hidden=spec.hidden,
            size=share(e.size, "ffn", config.mesh),
            count=e.count,
            top_k=e.top_k,
            dtype=DTYPES[config.dtype],
            arch=arch,
            kind=config.quantise,
            clamped=e.act == "clamped",
        )
    for q_heads, kv_heads, head_dim, dim, ffn in sorted(shapes):
        yield from step(
            hidden=spec.hidden,
            ffn=share(ffn, "ffn", config.mesh),
            q_heads=share(q_heads, "q_heads", config.mesh),
            kv_heads=share(kv_heads, "kv_heads", config.mesh),
            head_dim=head_dim,
            dim=dim,
            vocab=spec.vocab,
            dtype=DTYPES[config.dtype],
            store=HELD[config.cache_dtype],
        )


def kinds(spec: ModelSpec, config: Resolved) -> list[cases.Layer]:
    """The kinds of attention of a model, as one device of the mesh computes them."""
    layers = (
        cases.Layer(
            q_heads=share(a.q_heads, "q_heads", config.mesh),
            kv_heads=share(a.kv_heads, "kv_heads", config.mesh),
            head_dim=a.head_dim,
            page=config.page,
            window=a.window,
            capped=a.cap is not None,
            sinks=a.sinks,
        )
        for a in (layer.mixer for layer in spec.layers)
    )
    return list(dict.fromkeys(layers))


def examine(spec: ModelSpec, config: Resolved, arch: str) -> Iterator[dict[str, Any]]:
    """{"layer", "plain"}: a kind of layer, and why it runs in plain torch or ""; then what kernels_cuda.build tells of
    each kernel, as it is done."""
    dtype, store = DTYPES[config.dtype], HELD[config.cache_dtype]
    for layer in kinds(spec, config):
        why = supports(layer.head_dim, layer.q_heads // layer.kv_heads, dtype, store, arch)
        yield {"layer": str(layer), "plain": why}
    for case in kernels(spec, config, arch):
        yield build.build(case, arch)
