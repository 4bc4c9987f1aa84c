"""The operations a model is written in, for torch. models_jax/ops.py has the same names and the same meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from engine.mesh import RULES
from engine.model.spec import Norm
from models_torch.packed import Packed
from models_torch.quantised import Quantised

Array: TypeAlias = torch.Tensor
Matrix: TypeAlias = torch.Tensor | Packed | Quantised
"""A weight that is multiplied with."""


@dataclass(slots=True)
class Sum:
    """x + y, both [T, hidden], that is made by the norm that reads it next, in one pass. value: once it is made."""

    x: Array
    y: Array
    value: Array | None = None


Stream: TypeAlias = torch.Tensor | Sum
"""What runs through the layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Matrices of one input, one below the other [sum(sizes), in], multiplied at once. bias [sum(sizes)] or None."""

    body: Array | Quantised
    sizes: tuple[int, ...]
    bias: Array | None = None

    @property
    def nbytes(self) -> int:
        return self.body.nbytes + (0 if self.bias is None else self.bias.nbytes)


@cache
def kernel(name: str, device: str) -> Any:
    """The module of kernels_cuda on a kind of device, None where plain torch computes: on CPUs, and without triton."""
    if device != "cuda" or find_spec("triton") is None:
        return None
    return import_module(f"kernels_cuda.{name}")


class Comm(Protocol):
    """The devices that compute a model together, as one of them sees them. psum may change x. held: whether a capture
    can hold what they exchange."""

    held: bool

    def parts(self, axis: str) -> int: ...

    def index(self, axis: str) -> int: ...

    def psum(self, x: Array) -> Array: ...

    def gather(self, x: Array, dim: int) -> Array: ...


_COMM: ContextVar[Comm | None] = ContextVar("comm", default=None)


@contextmanager
def over(comm: Comm | None) -> Iterator[None]:
    """Inside, a model is computed by these devices together; None is one alone. What shard_map is for jax."""
    token = _COMM.set(comm)
    try:
        yield
    finally:
        _COMM.reset(token)


_BREAK: ContextVar[Callable[[Callable[[], Array]], Array] | None] = ContextVar("break", default=None)


@contextmanager
def broken(by: Callable[[Callable[[], Array]], Array]) -> Iterator[None]:
    """Inside, what `outside` is given goes to `by`, which captures what is around it."""
    token = _BREAK.set(by)
    try:
        yield
    finally:
        _BREAK.reset(token)


def outside(call: Callable[[], Array]) -> Array:
    """What `call` gives, which no capture can hold: it waits for the host, or for other devices. Where a step is
    captured, a piece ends ahead of it and the next begins after it; each replay calls it between them."""
    by = _BREAK.get()
    return call() if by is None else by(call)


def linear(x: Array, w: Matrix, bias: Array | None) -> Array:
    """x [T, in], w [out, in] -> [T, out]."""
    y = one_row(x, w)
    if y is None and not isinstance(w, Packed | Quantised):
        return F.linear(x, w, bias)
    y = w.multiply(x) if y is None else y  # type: ignore[union-attr]
    return y if bias is None else y.add_(bias)


def one_row(x: Array, w: Matrix, act: str = "", dtype: torch.dtype | None = None, out: Array | None = None) -> Any:
    """x [1, in] times w [out, in] by the kernel of GPUs for one row, see `kernels_cuda.row`; None where it is not for
    them."""
    row = kernel("row", x.device.type) if len(x) == 1 else None
    if row is None or isinstance(w, Packed):
        return None
    if not isinstance(w, Quantised):
        return None if row.supports(x, w, None, act) else row.row_times(x, w, dtype, out, act=act)
    if w.how == "plain" or row.supports(x, w.body, w.scale, act):
        return None
    return row.row_times(x, w.body, dtype, out, scale=w.scale, by=w.by, native=w.how != "bits", act=act)


def qkv(x: Array, p: Mapping[str, Any], head_dim: int) -> tuple[Array, Array, Array]:
    """x [T, hidden] -> q, k, v [T, heads, head_dim] each, by the matrices and biases of those names in p. Joined ones
    are one product, whose parts keep their distances."""
    joined = p.get("qkv")
    if joined is None:
        return tuple(heads(x, p[name], p.get(f"{name}_bias")) for name in ("q", "k", "v"))  # type: ignore[return-value]
    parts = linear(x, joined.body, joined.bias).split(joined.sizes, 1)
    return tuple(part.unflatten(1, (-1, head_dim)) for part in parts)  # type: ignore[return-value]


def gated(x: Array, p: Mapping[str, Any], act: str) -> Array:
    """act(gate(x)) * up(x), by the matrices and biases of those names in p: x [T, hidden] -> [T, ffn]."""
    joined = p.get("gate_up")
    if joined is not None and joined.bias is None:
        made = one_row(x, joined.body, act)
        if made is not None:
            return made  # type: ignore[no-any-return]
    if joined is None:
        gate, up = linear(x, p["gate"], p.get("gate_bias")), linear(x, p["up"], p.get("up_bias"))
    else:
        gate, up = linear(x, joined.body, joined.bias).split(joined.sizes, 1)
    fused = kernel("gated", x.device.type)
    if fused is not None and not fused.supports(gate, up, act):
        return fused.gated(gate, up, act)  # type: ignore[no-any-return]
    return (silu if act == "silu" else gelu_tanh)(gate) * up


def heads(x: Array, w: Matrix, bias: Array | None) -> Array:
    """x [T, hidden], w [heads, head_dim, hidden] -> [T, heads, head_dim]."""
    matrix = w if isinstance(w, Packed | Quantised) else w.flatten(0, 1)
    return linear(x, matrix, None if bias is None else bias.flatten()).view(x.shape[0], w.shape[0], w.shape[1])


def merge(o: Array, w: Matrix) -> Array:
    """o [T, heads, head_dim], w [hidden, heads, head_dim] -> [T, hidden]; a partial sum where heads are split."""
    return linear(o.flatten(1), w if isinstance(w, Packed | Quantised) else w.flatten(1), None)


@lru_cache(maxsize=64)
def _number(value: float, device: torch.device) -> Array:
    """float32[] on the device, kept: an operation with a Python number makes and converts a tensor each time."""
    return torch.full((), value, dtype=torch.float32, device=device)


def add(x: Stream, y: Array) -> Stream:
    """x + y, both [T, hidden]. Where a kernel adds and norms in one pass, this waits for the norm."""
    first = whole(x)
    fused = kernel("norm", y.device.type)
    return first + y if fused is None or fused.supports(first, y) else Sum(first, y)


def whole(x: Stream) -> Array:
    """The stream as an array."""
    if not isinstance(x, Sum):
        return x
    if x.value is None:
        x.value = x.x + x.y
    return x.value


def pick(x: Stream, at: Array) -> Array:
    """Rows of x [T, size], at int[O] -> [O, size]."""
    return whole(x).index_select(0, at)


def rms_norm(x: Stream, w: Array, eps: float, kind: Norm = "plain") -> Array:
    """Over the last dimension, in float32.

    In fewer operations than torch's own, which on a CPU takes three times as long for one row.
    """
    if isinstance(x, Sum) and x.value is None:
        x.value, normed = kernel("norm", x.x.device.type).add_norm(x.x, x.y, w, eps, kind)
        return normed  # type: ignore[no-any-return]
    x = whole(x)
    fused = kernel("norm", x.device.type)
    if fused is not None and not fused.supports(x):
        return fused.add_norm(x, None, w, eps, kind)[1]  # type: ignore[no-any-return]
    h = x.float()
    size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    scale = torch.addcmul(_number(eps, x.device), size, size, value=1 / x.shape[-1]).rsqrt_()
    if kind == "plain":
        return (h * scale).to(x.dtype).mul_(w)
    h = h * scale
    return (torch.addcmul(h, h, w.float()) if kind == "offset" else h.mul_(w)).to(x.dtype)


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return F.silu(x)


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def clamped(gate: Array, up: Array, alpha: float, limit: float) -> Array:
    """GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), of clamped gate and up."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap)."""
    return torch.tanh(x / cap) * cap


def scale(x: Array, by: float) -> Array:
    """x times a number rounded to x's dtype."""
    return x * _number(by, x.device).to(x.dtype)


@lru_cache(maxsize=64)
def _upload(frequencies: bytes, device: torch.device) -> Array:
    """float32[dim/2] on the device, kept: a copy at each step would be one more."""
    return torch.frombuffer(bytearray(frequencies), dtype=torch.float32).to(device)


def angles(
    frequencies: NDArray[np.float32], magnitude: float, positions: Array, dtype: torch.dtype
) -> tuple[Array, Array]:
    """What `rotate` takes, of positions int32[T] times frequencies float32[dim/2]: [T, 1, dim] twice, times magnitude.

    cos stands twice, sin once negative, so that a rotation is two products with whole heads.
    """
    fused = kernel("angles", positions.device.type)
    if fused is not None:
        return fused.angles(_upload(frequencies.tobytes(), positions.device), magnitude, positions, dtype)  # type: ignore[no-any-return]
    a = positions.float()[:, None, None] * _upload(frequencies.tobytes(), positions.device)
    cos, sin = a.cos(), a.sin()
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding, rotate-half form, of the first cos.shape[-1] dimensions of x [T, heads, head_dim]."""
    dim = cos.shape[-1]
    part = x if dim == x.shape[-1] else x[..., :dim]
    turned = (part * cos).addcmul_(part.roll(dim // 2, -1), sin)
    return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:]], -1)


def embed(tokens: Array, w: torch.Tensor | Packed) -> Array:
    """tokens int32[T], w [vocab, hidden] -> [T, hidden]. A device looks up the part of the vocabulary that it holds."""
    if parts("vocab") == 1:
        return _look_up(tokens, w)
    comm, size = _COMM.get(), w.shape[0]
    assert comm is not None
    local = tokens - comm.index("vocab") * size
    held = (local >= 0) & (local < size)
    return psum(_look_up(local.clamp(0, size - 1), w).masked_fill_(~held[:, None], 0), "vocab")


def _look_up(tokens: Array, w: torch.Tensor | Packed) -> Array:
    return w.look_up(tokens) if isinstance(w, Packed) else F.embedding(tokens, w)


def unembed(x: Array, w: Matrix, out: Array | None = None) -> Array:
    """x [R, hidden], w [vocab, hidden] -> float32[R, vocab]; put into `out` where one is given."""
    y: Array
    if isinstance(w, Packed) or x.device.type != "cuda" or x.dtype != w.dtype or x.dtype == torch.float32:
        y = linear(x, w, None).float()
        return y if out is None else out.copy_(y)
    made = one_row(x, w, dtype=torch.float32, out=out)
    if made is not None:
        return made  # type: ignore[no-any-return]
    if torch.version.hip:
        y = linear(x, w, None).float()
        return y if out is None else out.copy_(y)
    # as it is summed: not rounded, and not read once more
    return (
        torch.mm(x, w.t(), out_dtype=torch.float32)
        if out is None
        else torch.mm(x, w.t(), out_dtype=torch.float32, out=out)
    )


def psum(x: Array, axis: str) -> Array:
    """Sum over the devices that split the logical axis. May change x."""
    comm = _COMM.get()
    if comm is None or comm.parts(axis) == 1:
        return x
    return comm.psum(x) if comm.held else outside(lambda: comm.psum(x))


def gather(x: Array, axis: str, dim: int) -> Array:
    """Join the parts of dimension `dim` that devices hold along the logical axis."""
    comm = _COMM.get()
    if comm is None or comm.parts(axis) == 1:
        return x
    return comm.gather(x, dim) if comm.held else outside(lambda: comm.gather(x, dim))


def parts(axis: str) -> int:
    """Devices that split the logical axis."""
    comm = _COMM.get()
    assert axis in RULES, axis
    return 1 if comm is None else comm.parts(axis)
