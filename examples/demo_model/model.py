"""A Llama in flax.nnx, arithmetic as in Hugging Face's LlamaForCausalLM, so that its weights export name for name."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Attention = Literal["cudnn", "xla"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    vocabulary: int = 1664
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 512
    context: int = 2048
    rope_theta: float = 10000.0
    epsilon: float = 1e-5


class Norm(nnx.Module):
    def __init__(self, shape: Shape) -> None:
        self.weight = nnx.Param(jnp.ones(shape.hidden, jnp.float32))
        self.epsilon = shape.epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
        return (wide * self.weight[...]).astype(x.dtype)


class Linear(nnx.Module):
    """Weights `[out, in]`, as checkpoints hold them: float32 to be trained, bfloat16 to be multiplied."""

    def __init__(self, inputs: int, outputs: int, *, scale: float, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (outputs, inputs), jnp.float32))

    def __call__(self, x: Array) -> Array:
        return x @ self.weight[...].astype(x.dtype).T


def rotate(x: Array, theta: float) -> Array:
    """Rotary positions 0, 1, ... of `[B, T, heads, head_dim]`; pairs are (i, i + head_dim/2), as in Hugging Face."""
    steps, width = x.shape[1], x.shape[-1]
    frequency = theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = jnp.outer(jnp.arange(steps, dtype=jnp.float32), frequency)[:, None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x.dtype)


def drop(x: Array, rate: float, key: Array | None) -> Array:
    """Dropout where a key is given, which is in training only."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class SelfAttention(nnx.Module):
    def __init__(self, shape: Shape, *, attention: Attention, scale: float, rngs: nnx.Rngs) -> None:
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden, queries, scale=0.02, rngs=rngs)
        self.k_proj = Linear(shape.hidden, keys, scale=0.02, rngs=rngs)
        self.v_proj = Linear(shape.hidden, keys, scale=0.02, rngs=rngs)
        self.o_proj = Linear(queries, shape.hidden, scale=scale, rngs=rngs)
        self.head_dim, self.theta, self.attention = shape.head_dim, shape.rope_theta, attention

    def __call__(self, x: Array) -> Array:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (projection(x).reshape(heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.attention)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class Mlp(nnx.Module):
    def __init__(self, shape: Shape, *, scale: float, rngs: nnx.Rngs) -> None:
        self.gate_proj = Linear(shape.hidden, shape.ffn, scale=0.02, rngs=rngs)
        self.up_proj = Linear(shape.hidden, shape.ffn, scale=0.02, rngs=rngs)
        self.down_proj = Linear(shape.ffn, shape.hidden, scale=scale, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, shape: Shape, *, attention: Attention, rngs: nnx.Rngs) -> None:
        scale = 0.02 / (2 * shape.layers) ** 0.5  # what is added to the residual starts small
        self.input_layernorm = Norm(shape)
        self.self_attn = SelfAttention(shape, attention=attention, scale=scale, rngs=rngs)
        self.post_attention_layernorm = Norm(shape)
        self.mlp = Mlp(shape, scale=scale, rngs=rngs)

    def __call__(self, x: Array, dropout: float, key: Array | None) -> Array:
        first, second = (None, None) if key is None else jax.random.split(key)
        x = x + drop(self.self_attn(self.input_layernorm(x)), dropout, first)
        return x + drop(self.mlp(self.post_attention_layernorm(x)), dropout, second)


class Llama(nnx.Module):
    """Tokens `[B, T]` to logits `[B, T, vocabulary]` in float32; the embedding is also the output."""

    def __init__(self, shape: Shape, *, attention: Attention, seed: int = 0) -> None:
        rngs = nnx.Rngs(params=seed)
        self.embed_tokens = Linear(shape.hidden, shape.vocabulary, scale=0.02, rngs=rngs)
        self.layers = nnx.List([Layer(shape, attention=attention, rngs=rngs) for _ in range(shape.layers)])
        self.norm = Norm(shape)

    def __call__(self, tokens: Array, dropout: float = 0.0, key: Array | None = None) -> Array:
        table = self.embed_tokens.weight[...]
        x = table[tokens].astype(jnp.bfloat16)  # looked up in float32: so its gradient is summed in float32
        keys = [None] * (len(self.layers) + 1) if key is None else jax.random.split(key, len(self.layers) + 1)
        x = drop(x, dropout, keys[-1])
        for layer, own in zip(self.layers, keys[:-1], strict=True):
            x = layer(x, dropout, own)
        return jnp.einsum("bth,vh->btv", self.norm(x), table.astype(x.dtype), preferred_element_type=jnp.float32)
