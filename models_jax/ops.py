"""The operations a model is written in, for JAX. models_torch/ops.py has the same names and the same meaning."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from engine.mesh import RULES
from engine.model.spec import Norm
from kernels_pallas import gpu_row
from models_jax import quantised
from models_jax.quantised import Quantised
from models_jax.turned import Turned

Array: TypeAlias = jax.Array
Matrix: TypeAlias = jax.Array | Turned | Quantised
"""A weight that is multiplied with."""
Stream: TypeAlias = jax.Array
"""What runs through the layers."""


def precision(dtype: Any) -> jax.lax.Precision:
    """float32 means float32: TPUs and GPUs would otherwise multiply in fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def contract(x: Array, w: Matrix, out: Any = None) -> Array:
    """x [T, in] times w [out, in], or what was turned to [in, out], summed in float32 -> [T, out]."""
    if isinstance(w, Quantised):
        return quantised.multiply(x, w, precision(x.dtype)).astype(out or x.dtype)
    if not isinstance(w, Turned) and not gpu_row.supports(x, w):
        row = partial(gpu_row.row_times, dtype=jnp.dtype(out or x.dtype))
        return jax.lax.platform_dependent(x, w, cuda=row, default=partial(_product, dims=((1,), (1,)), out=out))
    if isinstance(w, Turned) and x.dtype == jnp.bfloat16 and x.shape[0] == 1:
        # a CPU multiplies one row without its bfloat16 instructions: twelve times slower than two
        return contract(jnp.concatenate([x, x]), w, out)[:1]
    dims = ((1,), (0,)) if isinstance(w, Turned) else ((1,), (1,))
    return _product(x, w.body if isinstance(w, Turned) else w, dims=dims, out=out)


def _product(x: Array, w: Array, *, dims: Any, out: Any) -> Array:
    # asked for in float32, a GPU's library would write that and another kernel round it
    kind = jnp.dtype(out or x.dtype) if dims == ((1,), (1,)) else jnp.float32
    y = jax.lax.dot_general(x, w, (dims, ((), ())), precision=precision(x.dtype), preferred_element_type=kind)
    return y.astype(out or x.dtype)


def linear(x: Array, w: Matrix, bias: Array | None) -> Array:
    """x [T, in], w [out, in] -> [T, out]."""
    y = contract(x, w)
    return y if bias is None else y + bias


def heads(x: Array, w: Matrix, bias: Array | None) -> Array:
    """x [T, hidden], w [heads, head_dim, hidden] -> [T, heads, head_dim]."""
    if isinstance(w, Turned):
        matrix: Matrix = Turned(body=w.body.reshape(w.body.shape[0], -1))
        count, size = w.body.shape[1:]
    elif isinstance(w, Quantised):
        matrix, count, size = w, -1, w.head
    else:
        matrix = w.reshape(-1, w.shape[-1])
        count, size = w.shape[:2]
    y = linear(x, matrix, None if bias is None else bias.reshape(-1))
    return y.reshape(x.shape[0], count, size)


def merge(o: Array, w: Matrix) -> Array:
    """o [T, heads, head_dim], w [hidden, heads, head_dim] -> [T, hidden]; a partial sum where heads are split."""
    if isinstance(w, Turned):
        return contract(o.reshape(o.shape[0], -1), Turned(body=w.body.reshape(-1, w.body.shape[-1])))
    if isinstance(w, Quantised):
        return contract(o.reshape(o.shape[0], -1), w)
    return contract(o.reshape(o.shape[0], -1), w.reshape(w.shape[0], -1))


def qkv(x: Array, p: Mapping[str, Any], head_dim: int) -> tuple[Array, Array, Array]:
    """x [T, hidden] -> q, k, v [T, heads, head_dim] each, by the matrices and biases of those names in p."""
    q, k, v = (heads(x, p[name], p.get(f"{name}_bias")) for name in ("q", "k", "v"))
    return q, k, v


def gated(x: Array, p: Mapping[str, Any], act: str) -> Array:
    """act(gate(x)) * up(x), by the matrices and biases of those names in p: x [T, hidden] -> [T, ffn]."""
    turn = silu if act == "silu" else gelu_tanh
    return turn(linear(x, p["gate"], p.get("gate_bias"))) * linear(x, p["up"], p.get("up_bias"))


def add(x: Stream, y: Array) -> Stream:
    """x + y, both [T, hidden]."""
    return x + y


def pick(x: Stream, at: Array) -> Array:
    """Rows of x [T, size], at int[O] -> [O, size]."""
    return x[at]


def rms_norm(x: Array, w: Array, eps: float, kind: Norm = "plain") -> Array:
    """Over the last dimension, in float32."""
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    if kind == "plain":
        return w * h.astype(x.dtype)
    weight = w.astype(jnp.float32)
    return (h * (1 + weight if kind == "offset" else weight)).astype(x.dtype)


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return jax.nn.silu(x)


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form."""
    return jax.nn.gelu(x, approximate=True)


def clamped(gate: Array, up: Array, alpha: float, limit: float) -> Array:
    """GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), of clamped gate and up."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * (gate * jax.nn.sigmoid(alpha * gate))


def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap)."""
    return cap * jnp.tanh(x / cap)


def scale(x: Array, by: float) -> Array:
    """x times a number rounded to x's dtype."""
    return x * jnp.asarray(by, x.dtype)


def angles(frequencies: NDArray[np.float32], magnitude: float, positions: Array, dtype: Any) -> tuple[Array, Array]:
    """cos and sin times magnitude, [T, 1, dim/2], of positions int32[T] times frequencies float32[dim/2]."""
    a = positions.astype(jnp.float32)[:, None, None] * jnp.asarray(frequencies)
    return (jnp.cos(a) * magnitude).astype(dtype), (jnp.sin(a) * magnitude).astype(dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding, rotate-half form, of the first 2 * cos.shape[-1] dimensions of x [T, heads, head_dim]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def embed(tokens: Array, w: jax.Array | Turned) -> Array:
    """tokens int32[T], w [vocab, hidden] -> [T, hidden]. A device looks up the part of the vocabulary that it holds."""
    size = w.body.shape[1] if isinstance(w, Turned) else w.shape[0]

    def look_up(at: Array) -> Array:
        return w.body[:, at].T if isinstance(w, Turned) else w[at]

    if parts("vocab") == 1:
        return look_up(tokens)
    local = tokens - jax.lax.axis_index(RULES["vocab"]) * size
    held = (local >= 0) & (local < size)
    return psum(jnp.where(held[:, None], look_up(jnp.clip(local, 0, size - 1)), 0), "vocab")


def unembed(x: Array, w: Matrix) -> Array:
    """x [R, hidden], w [vocab, hidden] -> float32[R, vocab]."""
    return contract(x, w, out=jnp.float32)


def psum(x: Array, axis: str) -> Array:
    """Sum over the devices that split the logical axis."""
    return jax.lax.psum(x, RULES[axis]) if parts(axis) > 1 else x


def gather(x: Array, axis: str, dim: int) -> Array:
    """Join the parts of dimension `dim` that devices hold along the logical axis."""
    return jax.lax.all_gather(x, RULES[axis], axis=dim, tiled=True) if parts(axis) > 1 else x


def parts(axis: str) -> int:
    """Devices that split the logical axis. XLA keeps a reduction over one device as a copy, so none is asked for."""
    mesh_axis = RULES[axis]
    return 1 if mesh_axis is None else jax.lax.axis_size(mesh_axis)
