"""A model as data. Nothing here computes on tensors; every backend reads the same description."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from engine.model.rope import Rope as Rope

Norm: TypeAlias = Literal["plain", "wide", "offset"]
"""RMSNorm, in float32. "plain": rounded, then times the weight (Llama); "wide": times the weight, then rounded
(GPT-OSS); "offset": times 1 + weight, then rounded (Gemma). In float32 the first two are one."""


EIGHT = ("int8", "fp8")
"""Types of a cache of 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention over a paged cache; query head h reads key-value head h * kv_heads // q_heads.

    bias: on q, k, v. out_bias: on the output projection. qk_norm: RMSNorm over each head of q and k, before rope.
    window: how many positions back a query sees, itself included; None = all. scale: multiplies the scores.
    cap: a scaled score s becomes cap * tanh(s / cap). sinks: each query head has a score of its own, learnt, that takes
    part in the softmax and has no value. scaled: keys and values are kept in 8 bits, with a scale for
    each head (`eight`); inverses of scales are parameters too, since devices multiply alike and divide each its way.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    scaled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Gated feed-forward: down(act(gate(x)) * up(x)). "gelu_tanh": GELU in its tanh form."""

    size: int
    act: Literal["silu", "gelu_tanh"] = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """`count` gated feed-forwards, of which each token takes the top_k that the router scores highest.

    size: of one expert. The weights of the chosen are their shares of the softmax over all scores; renormalised: over
    the scores of the chosen alone, so that they sum to 1.
    act: "silu" as in Mlp; "clamped": gate is at most `limit`, up within +-limit, and the product is
    (up + 1) * gate * sigmoid(alpha * gate) (GPT-OSS). bias: on the router and on every matrix.
    """

    count: int
    top_k: int
    size: int
    renormalised: bool
    act: Literal["silu", "clamped"] = "silu"
    alpha: float = 1.702
    limit: float = 7.0
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One pre-norm block: x += mixer(norm(x)); x += feed(norm(x)). sandwich: a norm on what each adds, too."""

    mixer: Attention
    feed: Mlp | Experts
    sandwich: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrow:
    """How a checkpoint holds matrices in float8_e4m3fn. suffix: in place of ".weight" names the tensor of scales. by:
    what has one. inputs: it has scales of what is multiplied, too."""

    suffix: str
    by: Literal["tensor", "row", "block"]
    inputs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model.

    family: name of the file in archs that made it. norm_eps, norm: of every RMSNorm. tied: the head is the embedding.
    max_len: positions the model was made for. dtype: of the checkpoint. eos: ids that end a text.
    embed_scale: multiplies embeddings, rounded to their dtype. logit_cap: a logit y becomes cap * tanh(y / cap).
    narrow: how the checkpoint holds matrices that are in 8 bits.
    """

    family: str
    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied: bool
    max_len: int
    dtype: str
    eos: tuple[int, ...] = ()
    norm: Norm = "plain"
    embed_scale: float = 1.0
    logit_cap: float | None = None
    narrow: Narrow | None = None

    def period(self) -> int:
        """The smallest p such that layer i equals layer i - p: length of the pattern that can be scanned."""
        n = len(self.layers)
        return next(
            p for p in range(1, n + 1) if n % p == 0 and all(self.layers[i] == self.layers[i - p] for i in range(p, n))
        )


def eight(spec: ModelSpec, cache_dtype: str) -> ModelSpec:
    """The description as a backend runs it whose cache has `cache_dtype`: in 8 bits, layers have scales for it."""
    if cache_dtype not in EIGHT:
        return spec
    return replace(spec, layers=tuple(replace(x, mixer=replace(x.mixer, scaled=True)) for x in spec.layers))


def fit(spec: ModelSpec, reach: int) -> ModelSpec:
    """The description as an engine runs it that goes to `reach` positions: ropes that depend on a length get it."""

    def fitted(layer: Layer) -> Layer:
        rope = layer.mixer.rope
        if rope is None or rope.kind not in ("dynamic", "longrope"):
            return layer
        return replace(layer, mixer=replace(layer.mixer, rope=replace(rope, reach=reach)))

    return replace(spec, layers=tuple(fitted(layer) for layer in spec.layers))
