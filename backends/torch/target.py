"""The Triton kernels that serving a model would run on a GPU, compiled for one that need not be here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backends.torch.caches import DTYPES as HELD
from backends.torch.params import DTYPES
from engine.config import Resolved
from engine.mesh import share
from engine.model.spec import ModelSpec
from kernels_cuda import build, cases
from kernels_cuda.attention import PART, PARTS, supports


def kernels(spec: ModelSpec, config: Resolved, arch: str) -> list[cases.Case]:
    """Of every kind of layer: rows of one token and tiles of prompts, with the keys in every number of parts that a
    step may have; each once. Empty where no kernel is for the model: it runs in plain torch."""
    dtype, store = DTYPES[config.dtype], HELD[config.cache_dtype]
    parts, found = 1, dict[Any, cases.Case]()
    counts = [1]
    while parts < PARTS and parts * PART < config.max_len:
        parts *= 2
        counts.append(parts)
    for layer in kinds(spec, config):
        for case in cases.attention(layer, dtype, store, arch, (1, 0), tuple(counts)):
            found.setdefault(case.key, case)
    return list(found.values())


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
