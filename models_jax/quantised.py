"""Matrices of int8 or float8_e4m3fn, and products with them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.chip import INTERPRETED, chip
from kernels_pallas.product import SIDE
from kernels_pallas.quantised_matmul import quantised_matmul, supports
from models_jax.stacked import entry, plain, whole


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A matrix whose numbers are body times their scales; both are arrays, or Stacked.

    body [out, in], or [E, out, in] of experts; scale float32[1, out] of each row, or float32[out / 128, in / 128],
    rounded up, of each block (engine.model.quant); head: dimensions of a head where outputs are heads, else 0.
    """

    body: Any
    scale: Any
    by: Literal["row", "block"] = field(metadata={"static": True})
    head: int = field(default=0, metadata={"static": True})

    def one(self, index: Any) -> Quantised:
        """The matrix of one expert."""
        return replace(self, body=entry(self.body, index), scale=entry(self.scale, index))

    def dequantised(self) -> jax.Array:
        """float32[..., out, in]."""
        body, scale = plain(self.body), plain(self.scale)
        if self.by == "row":
            return body.astype(jnp.float32) * jnp.swapaxes(scale, -1, -2)
        scale = jnp.repeat(jnp.repeat(scale, SIDE, -2)[..., : body.shape[-2], :], SIDE, -1)[..., : body.shape[-1]]
        return body.astype(jnp.float32) * scale


def multiply(x: jax.Array, w: Quantised, precision: jax.lax.Precision) -> jax.Array:
    """x [T, in] times a quantised matrix -> float32[T, out], or x's dtype where a kernel rounds it."""
    (body, layer), (scale, _) = whole(w.body), whole(w.scale)
    on = chip()
    if on != INTERPRETED and not supports(on, x.shape[0], *body.shape[-2:], x.dtype, body.dtype, by=w.by):
        return quantised_matmul(x, body, scale, w.by, layer)
    dims = (((1,), (1,)), ((), ()))
    if w.by == "row":  # exact in bfloat16 too: 8 bits fit
        y = jax.lax.dot_general(
            x, plain(w.body).astype(x.dtype), dims, precision=precision, preferred_element_type=jnp.float32
        )
        return y * plain(w.scale)
    return jax.lax.dot_general(x.astype(jnp.float32), w.dequantised(), dims, precision=jax.lax.Precision.HIGHEST)
