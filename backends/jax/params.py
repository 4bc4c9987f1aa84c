"""Weights on the device: the tree that models_jax reads, its shapes and shardings, and how it is filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from backends.jax.mesh import laid, partition, replicated
from engine.config import Resolved
from engine.mesh import RULES, MeshSpec, shard_shape
from engine.model import quant
from engine.model.params import Param, params
from engine.model.spec import ModelSpec
from engine.model.weights import PERIOD, STRIDE, RandomWeights, WeightSource, read_part
from models_jax.quantised import Quantised
from models_jax.stacked import Stacked
from models_jax.turned import Turned

Tree: TypeAlias = Any
DTYPES: dict[str, Any] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
INNER = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""Last part of a matrix's name -> how many trailing dimensions a product sums over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One array of the tree. members: the parameters that it holds; more than one where `stacked`: [members, ...].
    turned: trailing dimensions that stand first (models_jax.turned). whole: a scan hands it on unsliced
    (models_jax.stacked). part: "body" or "scale" of the matrix that is made of the parameter as `form` says."""

    members: tuple[Param, ...]
    stacked: bool
    turned: int = 0
    whole: bool = False
    part: str = ""
    form: quant.Form | None = None

    def shape(self, mesh: MeshSpec) -> tuple[int, ...]:
        """Of the array on all devices of a mesh."""
        if self.form is not None:
            local = self.form.body_shape(mesh) if self.part == "body" else self.form.scale_shape(mesh)
            one = tuple(
                n * (1 if axis is None else getattr(mesh, axis)) for n, axis in zip(local, self.split, strict=True)
            )
        else:
            one = self.turn(laid(self.members[0].shape, self.members[0].axes, mesh))
        return (len(self.members), *one) if self.stacked else one

    @property
    def spec(self) -> PartitionSpec:
        """How it is split over the mesh."""
        one = self.turn(tuple(partition(self.members[0].axes))) if self.form is None else self.split
        return PartitionSpec(None, *one) if self.stacked else PartitionSpec(*one)

    @property
    def split(self) -> tuple[str | None, ...]:
        """The mesh axis that splits each dimension, of a part of a quantised matrix."""
        assert self.form is not None
        axes = quant.split_by(self.form)
        by_row = self.part == "scale" and quant.BY[self.form.kind] == "row"
        return (*axes[:-2], None, axes[-2]) if by_row else axes

    def dtype(self, wide: Any) -> Any:
        """Of the array, where what is neither quantised nor exact is `wide`."""
        if self.form is None:
            return np.dtype(np.float32) if self.members[0].exact else wide
        return quant.DTYPES[self.form.kind] if self.part == "body" else np.dtype(np.float32)

    def turn(self, dims: tuple[Any, ...]) -> tuple[Any, ...]:
        """Something of each dimension of the parameter, in the order in which they stand."""
        return (*dims[len(dims) - self.turned :], *dims[: len(dims) - self.turned])

    def hold(self, array: Any) -> Any:
        """What the tree has in this place: the array, or that it is turned or stacked."""
        if self.whole:
            return Stacked(body=array)
        return Turned(body=array) if self.turned else array


def tree(spec: ModelSpec, stack: str, platform: str, quantise: str = "none") -> Tree:
    """The parameter tree with a Leaf for each array. stack: "list" = a list of layers, "scan" = a tuple with one tree
    for each layer of the repeating pattern, stacked over its repeats. On a CPU matrices are turned.
    quantise: what becomes of the layers' matrices (engine.model.quant)."""
    flat = params(spec)
    count, inner = len(spec.layers), INNER | ({"embed": 1} if spec.tied else {})
    turned = inner if platform == "cpu" and stack == "list" else {}
    out: dict[str, Any] = {
        n: Leaf(members=(p,), stacked=False, turned=turned.get(n, 0))
        for n, p in flat.items()
        if not n.startswith("layers.")
    }
    if stack == "list":
        out["layers"] = [_layer(flat, [i], turned, quantise, stacked=False) for i in range(count)]
    else:
        period = spec.period()
        out["layers"] = tuple(
            _layer(flat, range(r, count, period), turned, quantise, stacked=True) for r in range(period)
        )
    return out


def _layer(
    flat: dict[str, Param], layers: Sequence[int], turned: Mapping[str, int], quantise: str, *, stacked: bool
) -> Tree:
    """{"attention_norm": Leaf, "attention": {"q": Leaf, ...}, ...} of layers of one kind."""
    first = f"layers.{layers[0]}."
    out: dict[str, Any] = {}
    for name in flat:
        if name.startswith(first):
            *path, last = name.removeprefix(first).split(".")
            members = tuple(flat[name.replace(first, f"layers.{i}.")] for i in layers)
            at = out
            for part in path:
                at = at.setdefault(part, {})
            at[last] = _leaf(members, turned.get(last, 0), quantise, stacked)
    return out


def _leaf(members: tuple[Param, ...], turned: int, quantise: str, stacked: bool) -> Any:
    """What holds a parameter of these layers. What kernels read, experts and what is quantised, is not sliced."""
    form = quant.form(members[0], quantise)
    experts = members[0].axes[0] == "experts" and len(members[0].shape) == 3
    if form is None:
        turned = 0 if members[0].axes[0] == "experts" else turned
        return Leaf(members=members, stacked=stacked, turned=turned, whole=stacked and experts)
    body, scale = (
        Leaf(members=members, stacked=stacked, whole=stacked, part=part, form=form) for part in ("body", "scale")
    )
    return Quantised(body=body, scale=scale, by=quant.BY[form.kind], head=form.head)


def map_leaves(make: Callable[[Leaf], Any], leaves: Tree) -> Tree:
    """The tree with `make(leaf)` in place of each Leaf."""
    return jax.tree.map(make, leaves, is_leaf=lambda x: isinstance(x, Leaf))


def shapes(leaves: Tree, config: Resolved, mesh: Mesh) -> Tree:
    """Shapes, dtypes and shardings, for a compile without weights."""
    dtype = DTYPES[config.dtype]

    def make(leaf: Leaf) -> Any:
        sharding = NamedSharding(mesh, leaf.spec)
        return leaf.hold(jax.ShapeDtypeStruct(leaf.shape(config.mesh), leaf.dtype(dtype), sharding=sharding))

    return map_leaves(make, leaves)


def upload(leaves: Tree, config: Resolved, mesh: Mesh, source: WeightSource) -> Tree:
    """Read each device's part of every parameter, cast it and put it on the device. Raises ModelError naming a tensor.

    Always copies: on the CPU jax would otherwise keep the source's memory, a file that may change under it.
    """
    wide = DTYPES[config.dtype]
    made: dict[str, tuple[Any, Any]] = {}

    def fill(leaf: Leaf) -> Any:
        dtype = leaf.dtype(wide)
        if leaf.form is not None:
            return leaf.hold(_fill_quantised(leaf, config.mesh, mesh, source, made))
        if isinstance(source, RandomWeights) and config.platform != "cpu" and mesh.size == 1 and not leaf.stacked:
            return draw(source, leaf.members[0], dtype, mesh)

        def part(index: tuple[slice, ...]) -> NDArray[Any]:
            if not leaf.stacked:
                axes = leaf.turn(tuple(range(len(index))))
                asked = tuple(index[axes.index(d)] for d in range(len(index)))
                read = _read(source, leaf.members[0], asked, config.mesh)
                return np.array(read.transpose(axes), dtype, order="C")
            rows = [_read(source, p, index[1:], config.mesh) for p in leaf.members[index[0]]]
            out = np.empty((len(rows), *rows[0].shape), dtype)
            for i, row in enumerate(rows):
                out[i] = row
            return out

        shape, sharding = leaf.shape(config.mesh), NamedSharding(mesh, leaf.spec)
        return leaf.hold(jax.make_array_from_callback(shape, sharding, part))

    return map_leaves(fill, leaves)


def _fill_quantised(
    leaf: Leaf, sizes: MeshSpec, mesh: Mesh, source: WeightSource, made: dict[str, tuple[Any, Any]]
) -> jax.Array:
    """The bodies or the scales of quantised matrices. made: those of which the other is still to come, by name."""
    for p in leaf.members:
        if p.name not in made:
            made[p.name] = quant.read_quantised(source, replace(leaf.form, param=p))
    local = leaf.form.body_shape(sizes) if leaf.part == "body" else leaf.form.scale_shape(sizes)

    def part(index: tuple[slice, ...]) -> NDArray[Any]:
        own = index[1:] if leaf.stacked else index
        at = {a or "": (s.start or 0) // n for a, s, n in zip(leaf.split, own, local, strict=True)}
        found = [leaf.form.cut(*made[p.name], sizes, at)[leaf.part == "scale"] for p in leaf.members]
        return np.stack(found)[index[0]] if leaf.stacked else np.array(found[0])

    out = jax.make_array_from_callback(leaf.shape(sizes), NamedSharding(mesh, leaf.spec), part)
    if leaf.part == "scale":
        for p in leaf.members:
            del made[p.name]
    return out


def draw(source: RandomWeights, p: Param, dtype: Any, mesh: Mesh) -> jax.Array:
    """A parameter of random weights, made on the device of a mesh of one: what `source.read` gives, to the bit."""
    if (value := source.constant(p.name)) is not None:
        tape, start = np.full(1, value, np.float32), 0
    else:
        tape, start = source.tape(p), source.start(p.name)
    return _windows(p.shape, dtype, replicated(mesh))(tape, np.uint32(start))


@cache
def _windows(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """The program that cuts rows from a tape: (tape [N], start uint32) -> [shape]. A tape of one number fills it."""

    def cut(tape: jax.Array, start: jax.Array) -> jax.Array:
        if tape.shape[0] == 1:
            return jnp.full(shape, tape[0], dtype)
        row = jnp.arange(math.prod(shape[:-1]), dtype=jnp.uint32)
        begin = (row * jnp.uint32(STRIDE) + start) % jnp.uint32(PERIOD)  # PERIOD divides what uint32 wraps at
        window = jax.vmap(lambda at: jax.lax.dynamic_slice(tape, (at,), shape[-1:]))
        return window(begin.astype(jnp.int32)).astype(dtype).reshape(shape)

    return jax.jit(cut, out_shardings=sharding)


def _read(source: WeightSource, p: Param, index: tuple[slice, ...], mesh: MeshSpec) -> NDArray[Any]:
    """The part of a parameter that stands at `index` of its array on all devices."""
    local = shard_shape(p.shape, p.axes, mesh)
    at = {RULES[axis] or "": (s.start or 0) // n for axis, s, n in zip(p.axes, index, local, strict=True)}
    return read_part(source, p, mesh, at)
