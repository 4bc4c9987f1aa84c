"""A compiled program as plain data and bytes, and back. Nothing is pickled: docs/decisions/0018.

jax's own form (jax.experimental.serialize_executable) pickles what stands around an executable: shapes, shardings,
layouts, trees. Here that is JSON, and the executable is what the runtime serialises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental.layout import Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backends.jax.caches import State
from backends.jax.choosing import Scores
from backends.jax.step import Kept
from engine.errors import ConfigError

Data: TypeAlias = dict[str, Any]
Loaded: TypeAlias = Callable[..., Any]

NAMED: Mapping[str, Any] = {kind.__name__: kind for kind in (State, Kept, Scores)}
"""Named tuples that programs return."""
EMPTY = ("unordered_effects", "ordered_effects", "keepalive", "host_callbacks", "mut")
"""Parts of a program that ours have none of."""
PARTS = {
    *EMPTY,
    *(
        "xla_executable",
        "device_list",
        "backend",
        "committed",
        "name",
        "kept_var_idx",
        "all_args_info",
        "pgle_profiler",
    ),
    *("input_avals", "input_shardings", "xla_in_layouts", "dispatch_in_layouts"),
    *("output_avals", "output_shardings", "xla_out_layouts"),
}
"""What jax keeps around an executable, as jax 0.10 and 0.12 have it."""


def freeze(compiled: jax.stages.Compiled) -> tuple[Data, bytes]:
    """What a program takes and returns, as JSON has it, and the executable. Raises ConfigError for what has no form."""
    around = compiled._executable._unloaded_executable  # type: ignore[attr-defined]
    _known(type(around))
    for name in EMPTY:
        if getattr(around, name):
            raise _unable(f"a program with {name}")
    if compiled._params.const_args:
        raise _unable("a program with constants of its own")
    kept = sorted(around.kept_var_idx)
    data = {
        "name": around.name,
        "arguments": len(jax.tree.leaves(compiled.args_info)),
        "kept": kept,
        "inputs": _values(around.input_avals, around.input_shardings, around.xla_in_layouts),
        "outputs": _values(around.output_avals, around.output_shardings, around.xla_out_layouts),
        "tree": _tree(jax.tree.unflatten(compiled.out_tree, range(compiled.out_tree.num_leaves))),
    }
    inner = around.xla_executable
    held = inner.serialize() if hasattr(inner, "serialize") else inner.client.serialize_executable(inner)
    return data, held


def thaw(data: Data, held: bytes, mesh: Mesh) -> Loaded:
    """The program on the devices of a mesh, called as the compiled one is. Raises KeyError, TypeError or ValueError
    for data that `freeze` did not make, JaxRuntimeError for an executable that the runtime can't read."""
    from jax._src.interpreters import pxla
    from jax._src.lib import xla_client

    _known(pxla.UnloadedMeshExecutable)
    devices = xla_client.DeviceList(tuple(mesh.devices.flat))
    client = mesh.devices.flat[0].client
    avals, shardings, layouts = _read(data["inputs"], mesh)
    out_avals, out_shardings, out_layouts = _read(data["outputs"], mesh)
    around = pxla.UnloadedMeshExecutable(
        xla_executable=client.deserialize_executable(held, executable_devices=devices),
        device_list=devices,
        backend=client,
        input_avals=avals,
        input_shardings=shardings,
        output_avals=out_avals,
        output_shardings=out_shardings,
        committed=True,
        name=data["name"],
        unordered_effects=[],
        ordered_effects=[],
        keepalive=[],
        host_callbacks=[],
        kept_var_idx=set(data["kept"]),
        mut=None,
        xla_in_layouts=layouts,
        dispatch_in_layouts=pxla.get_dispatch_layouts(layouts, shardings, avals),
        xla_out_layouts=out_layouts,
        all_args_info=None,
        pgle_profiler=None,
    )
    flat = tuple(jax.stages.ArgInfo(None, donated=False) for _ in range(data["arguments"]))  # type: ignore[arg-type]
    tree = jax.tree.structure(_grow(data["tree"]))
    program = jax.stages.Compiled(around.load(), [], (flat, {}), tree, no_kwargs=True)

    def call(*args: Any) -> Any:
        return program(*jax.tree.leaves(args))

    return call


def _known(kind: type) -> None:
    """Refuse a jax whose executables have other parts: one that is left out would be lost silently."""
    have = {f.name for f in fields(kind)}
    if have != PARTS:
        odd = ", ".join(sorted(have ^ PARTS))
        raise _unable(f"programs of jax {jax.__version__}, which keeps them otherwise ({odd})")


def _unable(what: str) -> ConfigError:
    return ConfigError(f"backend.jax.bundle: {what} can't be bundled", field="backend.jax.bundle")


def _values(avals: Any, shardings: Any, layouts: Any) -> list[Data]:
    """Of each array: shape, dtype, how it is split and how it lies."""
    out = []
    for aval, sharding, layout in zip(avals, shardings, layouts, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise _unable(f"an array split as {sharding}")
        spec = [list(part) if isinstance(part, tuple) else part for part in sharding.spec]
        value = {
            "shape": list(aval.shape),
            "dtype": aval.dtype.name,
            "weak": aval.weak_type,
            "spec": spec,
            "memory": sharding.memory_kind,
        }
        if layout is not None:
            value["order"] = list(layout.major_to_minor)
            value["tiling"] = None if layout.tiling is None else [list(tile) for tile in layout.tiling]
            value["bits"] = layout.sub_byte_element_size_in_bits
        out.append(value)
    return out


def _read(values: list[Data], mesh: Mesh) -> tuple[list[Any], list[NamedSharding], list[Layout | None]]:
    """The reverse of _values."""
    avals, shardings, layouts = [], [], []
    for v in values:
        parts = [tuple(part) if isinstance(part, list) else part for part in v["spec"]]
        avals.append(jax.core.ShapedArray(tuple(v["shape"]), _dtype(v["dtype"]), weak_type=v["weak"]))
        shardings.append(NamedSharding(mesh, PartitionSpec(*parts), memory_kind=v["memory"]))
        tiling = v.get("tiling")
        layouts.append(
            Layout(tuple(v["order"]), None if tiling is None else tuple(tuple(tile) for tile in tiling), v["bits"])
            if "order" in v
            else None
        )
    return avals, shardings, layouts


def _dtype(name: str) -> np.dtype[Any]:
    return jax.numpy.dtype(name)


def _tree(tree: Any) -> Any:
    """A tree of numbers as JSON has it: a list that begins with its kind, or null."""
    if isinstance(tree, int):
        return None
    if tree is None:
        return ["none"]
    if isinstance(tree, dict):
        return ["dict", {name: _tree(value) for name, value in tree.items()}]
    kind = type(tree).__name__
    if type(tree) in (tuple, list) or NAMED.get(kind) is type(tree):
        return [kind, *(_tree(value) for value in tree)]
    raise _unable(f"a program that returns {kind}")


def _grow(data: Any) -> Any:
    """The reverse of _tree."""
    if data is None:
        return 0
    kind, *rest = data
    if kind == "none":
        return None
    if kind == "dict":
        return {name: _grow(value) for name, value in rest[0].items()}
    inner = [_grow(value) for value in rest]
    if kind in ("tuple", "list"):
        return tuple(inner) if kind == "tuple" else inner
    return NAMED[kind](*inner)
