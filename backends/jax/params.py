"""Weights on the device: the tree that models_jax reads, its shapes and shardings, and how it is filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from backends.jax.mesh import partition
from engine.config import Resolved
from engine.model.params import Param, params
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource
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

    @property
    def shape(self) -> tuple[int, ...]:
        """On one device that holds everything."""
        one = self.turn(self.members[0].shape)
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
        return leaf.hold(jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=NamedSharding(mesh, leaf.spec)))

    return map_leaves(make, leaves)


def upload(leaves: Tree, config: Resolved, mesh: Mesh, source: WeightSource) -> Tree:
    """Read each device's part of every parameter, cast it and put it on the device. Raises ModelError naming a tensor.

    Always copies: on the CPU jax would otherwise keep the source's memory, a file that may change under it.
    """
    dtype = DTYPES[config.dtype]

    def fill(leaf: Leaf) -> Any:
        def part(index: tuple[slice, ...]) -> NDArray[Any]:
            if not leaf.stacked:
                axes = leaf.turn(tuple(range(len(index))))
                asked = tuple(index[axes.index(d)] for d in range(len(index)))
                return np.array(source.read(leaf.members[0].name, asked).transpose(axes), dtype, order="C")
            rows = [source.read(p.name, index[1:]) for p in leaf.members[index[0]]]
            out = np.empty((len(rows), *rows[0].shape), dtype)
            for i, row in enumerate(rows):
                out[i] = row
            return out

        return leaf.hold(jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, leaf.spec), part))

    return map_leaves(fill, leaves)
