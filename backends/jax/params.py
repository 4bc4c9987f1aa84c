"""Weights on the device: the tree that models_jax reads, its shapes and shardings, and how it is filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from engine.model.params import Param, params
from engine.model.spec import ModelSpec
from engine.model.weights import PERIOD, STRIDE, RandomWeights, WeightSource, read_part
from models_jax.turned import Turned

Tree: TypeAlias = Any
DTYPES: dict[str, Any] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
INNER = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""Last part of a matrix's name -> how many trailing dimensions a product sums over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One array of the tree. members: the parameters that it holds; more than one where `stacked`: [members, ...].
    turned: trailing dimensions that stand first (models_jax.turned)."""

    members: tuple[Param, ...]
    stacked: bool
    turned: int = 0

    def shape(self, mesh: MeshSpec) -> tuple[int, ...]:
        """Of the array on all devices of a mesh."""
        one = self.turn(laid(self.members[0].shape, self.members[0].axes, mesh))
        return (len(self.members), *one) if self.stacked else one

    @property
    def spec(self) -> PartitionSpec:
        """How it is split over the mesh."""
        one = self.turn(tuple(partition(self.members[0].axes)))
        return PartitionSpec(None, *one) if self.stacked else PartitionSpec(*one)

    def turn(self, dims: tuple[Any, ...]) -> tuple[Any, ...]:
        """Something of each dimension of the parameter, in the order in which they stand."""
        return (*dims[len(dims) - self.turned :], *dims[: len(dims) - self.turned])

    def hold(self, array: Any) -> Any:
        """What the tree has in this place: the array, or that it is turned."""
        return Turned(body=array) if self.turned else array


def tree(spec: ModelSpec, stack: str, platform: str) -> Tree:
    """The parameter tree with a Leaf for each array. stack: "list" = a list of layers, "scan" = a tuple with one tree
    for each layer of the repeating pattern, stacked over its repeats. On a CPU matrices are turned."""
    flat = params(spec)
    count, inner = len(spec.layers), INNER | ({"embed": 1} if spec.tied else {})
    turned = inner if platform == "cpu" and stack == "list" else {}
    out: dict[str, Any] = {
        n: Leaf(members=(p,), stacked=False, turned=turned.get(n, 0))
        for n, p in flat.items()
        if not n.startswith("layers.")
    }
    if stack == "list":
        out["layers"] = [_layer(flat, [i], turned, stacked=False) for i in range(count)]
    else:
        period = spec.period()
        out["layers"] = tuple(_layer(flat, range(r, count, period), turned, stacked=True) for r in range(period))
    return out


def _layer(flat: dict[str, Param], layers: Sequence[int], turned: Mapping[str, int], *, stacked: bool) -> Tree:
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
            stack = members[0].axes[0] == "experts"
            at[last] = Leaf(members=members, stacked=stacked, turned=0 if stack else turned.get(last, 0))
    return out


def map_leaves(make: Callable[[Leaf], Any], leaves: Tree) -> Tree:
    """The tree with `make(leaf)` in place of each Leaf."""
    return jax.tree.map(make, leaves, is_leaf=lambda x: isinstance(x, Leaf))


def shapes(leaves: Tree, config: Resolved, mesh: Mesh) -> Tree:
    """Shapes, dtypes and shardings, for a compile without weights."""
    dtype = DTYPES[config.dtype]

    def make(leaf: Leaf) -> Any:
        sharding = NamedSharding(mesh, leaf.spec)
        return leaf.hold(jax.ShapeDtypeStruct(leaf.shape(config.mesh), dtype, sharding=sharding))

    return map_leaves(make, leaves)


def upload(leaves: Tree, config: Resolved, mesh: Mesh, source: WeightSource) -> Tree:
    """Read each device's part of every parameter, cast it and put it on the device. Raises ModelError naming a tensor.

    Always copies: on the CPU jax would otherwise keep the source's memory, a file that may change under it.
    """
    dtype = DTYPES[config.dtype]

    def fill(leaf: Leaf) -> Any:
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


def draw(source: RandomWeights, p: Param, dtype: Any, mesh: Mesh) -> jax.Array:
    """A parameter of random weights, made on the device of a mesh of one: what `source.read` gives, to the bit."""
    if p.name.endswith("norm"):
        tape, start = np.full(1, source.norm, np.float32), 0
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
