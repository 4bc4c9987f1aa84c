"""Every parameter of a model: its name, shape and logical axes, derived from the description alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.model.spec import Attention, Experts, Mlp, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter. axes: one logical axis (engine.mesh.RULES) a dimension. Matrices stand output first, as in
    Hugging Face, with heads told apart: q is [q_heads, head, hidden], so that most tensors load as a view. exact: is
    float32, whatever the others become."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    exact: bool = False


def params(spec: ModelSpec) -> dict[str, Param]:
    """name -> Param, for the whole model on one device. Layer i's names start with "layers.{i}."."""
    return {p.name: p for p in _params(spec)}


def _param(name: str, **dims: int) -> Param:
    return Param(name=name, shape=tuple(dims.values()), axes=tuple(dims))


def _params(spec: ModelSpec) -> Iterator[Param]:
    yield _param("embed", vocab=spec.vocab, hidden=spec.hidden)
    for i, layer in enumerate(spec.layers):
        at = f"layers.{i}."
        yield _param(at + "attention_norm", hidden=spec.hidden)
        yield from _attention(at + "attention.", spec.hidden, layer.mixer)
        if layer.sandwich:
            yield _param(at + "attention_out_norm", hidden=spec.hidden)
        yield _param(at + "mlp_norm", hidden=spec.hidden)
        if isinstance(layer.feed, Experts):
            yield from _experts(at + "moe.", spec.hidden, layer.feed)
        else:
            yield from _mlp(at + "mlp.", spec.hidden, layer.feed)
        if layer.sandwich:
            yield _param(at + "mlp_out_norm", hidden=spec.hidden)
    yield _param("final_norm", hidden=spec.hidden)
    if not spec.tied:
        yield _param("head", vocab=spec.vocab, hidden=spec.hidden)


def _attention(at: str, hidden: int, a: Attention) -> Iterator[Param]:
    yield _param(at + "q", q_heads=a.q_heads, head=a.head_dim, hidden=hidden)
    yield _param(at + "k", kv_heads=a.kv_heads, head=a.head_dim, hidden=hidden)
    yield _param(at + "v", kv_heads=a.kv_heads, head=a.head_dim, hidden=hidden)
    if a.bias:
        yield _param(at + "q_bias", q_heads=a.q_heads, head=a.head_dim)
        yield _param(at + "k_bias", kv_heads=a.kv_heads, head=a.head_dim)
        yield _param(at + "v_bias", kv_heads=a.kv_heads, head=a.head_dim)
    if a.qk_norm:
        yield _param(at + "q_norm", head=a.head_dim)
        yield _param(at + "k_norm", head=a.head_dim)
    if a.sinks:
        yield _param(at + "sinks", q_heads=a.q_heads)
    yield _param(at + "out", hidden=hidden, q_heads=a.q_heads, head=a.head_dim)
    if a.out_bias:
        yield _param(at + "out_bias", hidden=hidden)
    if a.scaled:
        for name in ("scales", "inverses"):
            yield Param(name=at + name, shape=(2, a.kv_heads), axes=("pair", "kv_heads"), exact=True)


def _mlp(at: str, hidden: int, m: Mlp) -> Iterator[Param]:
    yield _param(at + "gate", ffn=m.size, hidden=hidden)
    yield _param(at + "up", ffn=m.size, hidden=hidden)
    yield _param(at + "down", hidden=hidden, ffn=m.size)
    if m.bias:
        yield _param(at + "gate_bias", ffn=m.size)
        yield _param(at + "up_bias", ffn=m.size)
        yield _param(at + "down_bias", hidden=hidden)


def _experts(at: str, hidden: int, e: Experts) -> Iterator[Param]:
    """Each expert is split over "ffn" as an Mlp is; the router is whole on every device."""
    yield _param(at + "router", experts=e.count, hidden=hidden)
    yield _param(at + "gate", experts=e.count, ffn=e.size, hidden=hidden)
    yield _param(at + "up", experts=e.count, ffn=e.size, hidden=hidden)
    yield _param(at + "down", experts=e.count, hidden=hidden, ffn=e.size)
    if e.bias:
        yield _param(at + "router_bias", experts=e.count)
        yield _param(at + "gate_bias", experts=e.count, ffn=e.size)
        yield _param(at + "up_bias", experts=e.count, ffn=e.size)
        yield _param(at + "down_bias", experts=e.count, hidden=hidden)
